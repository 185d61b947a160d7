"""Look-ups by dictionary, for qonnx and FINN+ while they transform a graph.

A graph's tensors are lists, and qonnx goes through all of them for each tensor it looks for, some
ten thousand times in each of hundreds of transformations. Here it looks into a dictionary of
places. Graphs are edited under its hands, so every answer is checked against the list: that its
length and last entry are what they were, and that the entry found has the name. Entries are
appended, removed and replaced by qonnx 1.0.0 and finn-plus 1.6.1; the one function that renames
them where they stand empties the dictionaries.

Sorting a graph, which each transformation ends with, looks up nothing by list either; and shapes
are inferred without the weights, which would be written out and read in again for it.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from graphlib import TopologicalSorter
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, ValueInfoProto, numpy_helper, shape_inference
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.general import SortGraph
from qonnx.util import basic

KEPT = 16
"""Lists with a dictionary at a time: those of a graph, its copy and a few partitions."""

SHORT = 16
"""Shorter lists, such as the attributes of a node, are gone through."""

LARGE = 1024
"""Bytes of a constant; those that shapes depend on are smaller."""


@contextlib.contextmanager
def indexed() -> Iterator[None]:
    """Let qonnx find tensors by dictionary, for as long as this lasts. Answers are the same."""
    found = _Lists()
    ours: tuple[tuple[Any, str, Any], ...] = (
        (basic, "get_by_name", found.entry),
        (ModelWrapper, "get_initializer", _method(found.initializer)),
        (ModelWrapper, "get_tensor_valueinfo", _method(found.value_info)),
        (ModelWrapper, "get_tensor_shape", _method(found.shape)),
        (ModelWrapper, "rename_tensor", found.forgetting(ModelWrapper.rename_tensor)),
        (SortGraph, "apply", _sort),
        (shape_inference, "infer_shapes", _without_weights(shape_inference.infer_shapes)),
    )
    theirs = [(where, name, getattr(where, name)) for where, name, _ in ours]
    try:
        for where, name, value in ours:
            setattr(where, name, value)
        yield
    finally:
        for where, name, value in theirs:
            setattr(where, name, value)


def _method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a class binds to its objects, which it does not with methods of another."""
    return lambda model, *arguments, **options: function(model, *arguments, **options)


class _Places:
    """Where the entries of a list are, by name."""

    def __init__(self, entries: Sequence[Any], field: str) -> None:
        self.entries, self.field = entries, field
        self._read()

    def _read(self) -> None:
        names = [getattr(entry, self.field) for entry in self.entries]
        self.size, self.last = len(names), names[-1] if names else None
        self.places = {name: i for i, name in reversed(list(enumerate(names)))}

    def find(self, name: str) -> Any:
        """Return the first entry of a name, None if there is none."""
        size = len(self.entries)
        if size != self.size or (size and getattr(self.entries[-1], self.field) != self.last):
            self._read()
        place = self.places.get(name)
        if place is not None and getattr(self.entries[place], self.field) != name:
            self._read()
            place = self.places.get(name)
        return None if place is None else self.entries[place]


class _Lists:
    """Dictionaries of the lists that were used last, and qonnx's functions that look into lists."""

    def __init__(self) -> None:
        # a list that is held is one object in Python, and no other has its id
        self.known: OrderedDict[int, _Places] = OrderedDict()

    def entry(self, container: Sequence[Any], name: str, name_field: str = "name") -> Any:
        """Stand for ``get_by_name``."""
        if len(container) < SHORT:
            return next((x for x in container if getattr(x, name_field) == name), None)
        key = id(container)
        if key not in self.known:
            self.known[key] = _Places(container, name_field)
            if len(self.known) > KEPT:
                self.known.popitem(last=False)
        self.known.move_to_end(key)
        return self.known[key].find(name)

    def initializer(self, model: ModelWrapper, tensor_name: str, return_dtype: bool = False) -> Any:
        """Stand for ``ModelWrapper.get_initializer``."""
        tensor = self.entry(model.graph.initializer, tensor_name)
        if tensor is None:
            return (None, None) if return_dtype else None
        values: np.ndarray = numpy_helper.to_array(tensor)
        return (values, tensor.data_type) if return_dtype else values

    def value_info(self, model: ModelWrapper, tensor_name: str) -> ValueInfoProto | None:
        """Stand for ``ModelWrapper.get_tensor_valueinfo``."""
        graph = model.graph
        for entries in (graph.input, graph.output, graph.value_info):
            found: ValueInfoProto | None = self.entry(entries, tensor_name)
            if found is not None:
                return found
        return None

    def shape(
        self, model: ModelWrapper, tensor_name: str, fix_missing_init_shape: bool = False
    ) -> list[int] | None:
        """Stand for ``ModelWrapper.get_tensor_shape``."""
        known = self.value_info(model, tensor_name)
        if known is not None:
            return [dim.dim_value for dim in known.type.tensor_type.shape.dim]
        tensor = self.entry(model.graph.initializer, tensor_name)
        if tensor is None:
            return None
        if fix_missing_init_shape:
            model.set_tensor_shape(tensor_name, list(tensor.dims), dtype=tensor.data_type)
        return list(tensor.dims)

    def forgetting(self, renames: Any) -> Any:
        """Return a function that renames entries, after which no dictionary holds."""

        @wraps(renames)
        def then_forget(*arguments: Any) -> None:
            renames(*arguments)
            self.known.clear()

        return then_forget


def _sort(self: SortGraph, model: ModelWrapper) -> tuple[ModelWrapper, bool]:
    """Stand for ``SortGraph.apply``: by depth, and within it as before; loose nodes are dropped."""
    graph = model.graph
    nodes: list[NodeProto] = list(graph.node)
    if len(nodes) == 1:
        return model, False
    maker = {name: i for i, node in reversed(list(enumerate(nodes))) for name in node.output}
    given = {entry.name for entries in (graph.initializer, graph.input) for entry in entries}
    before = {
        i: {maker[name] for name in node.input if name in maker}
        for i, node in enumerate(nodes)
        if any(name in maker or name in given for name in node.input)
    }
    depth: dict[int, int] = {}
    for i in TopologicalSorter(before).static_order():
        depth[i] = 1 + max((depth[j] for j in before.get(i, ())), default=0)
    order = sorted(depth, key=lambda i: (depth[i], i))
    del graph.node[:]
    graph.node.extend(nodes[i] for i in order)
    return model, False


def _without_weights(infer_shapes: Callable[..., onnx.ModelProto]) -> Callable[..., Any]:
    """Return ``onnx.shape_inference.infer_shapes`` for models that lack their large constants."""

    @wraps(infer_shapes)
    def infer(model: onnx.ModelProto, *arguments: Any, **options: Any) -> onnx.ModelProto:
        large = [i for i, x in enumerate(model.graph.initializer) if len(x.raw_data) > LARGE]
        values = [model.graph.initializer[i].raw_data for i in large]
        for i in large:
            model.graph.initializer[i].ClearField("raw_data")
        inferred = model
        try:
            inferred = infer_shapes(model, *arguments, **options)
        finally:
            for graph in (model.graph, inferred.graph):
                for i, value in zip(large, values, strict=True):
                    graph.initializer[i].raw_data = value
        return inferred

    return infer
