"""Small edits of a graph, which the rules of rewriting are made of."""

from typing import Any

import numpy as np
from onnx import NodeProto, helper
from qonnx.core.modelwrapper import ModelWrapper


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Return an attribute's value, or what it is where the node has none."""
    for entry in node.attribute:
        if entry.name == name:
            return helper.get_attribute_value(entry)
    return default


def set_attribute_(node: NodeProto, name: str, value: Any) -> None:
    """Set an attribute, whether the node has it or not."""
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def constant(model: ModelWrapper, name: str, value: np.ndarray) -> str:
    """Store a constant and return its name."""
    model.set_initializer(name, np.asarray(value))
    return name


def insert_(model: ModelWrapper, after: NodeProto, nodes: list[NodeProto]) -> None:
    """Put nodes behind a node."""
    place = list(model.graph.node).index(after) + 1
    for i, node in enumerate(nodes):
        model.graph.node.insert(place + i, node)


def replace_(model: ModelWrapper, old: NodeProto, nodes: list[NodeProto]) -> None:
    """Put nodes in a node's place."""
    insert_(model, old, nodes)
    model.graph.node.remove(old)
