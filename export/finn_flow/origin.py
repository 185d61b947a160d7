"""Notes at a graph's nodes of which activation quantizer of the file they compute."""

import json
from dataclasses import asdict, dataclass

from onnx import NodeProto

TAG = "sdq.quantizer"
FLATTEN = "(flatten)"


@dataclass(frozen=True)
class Origin:
    """The quantizer of the file that a node computes.

    Args:
        name: of the activation quantizer.
        low: its lowest code.
        ceiling: a bound on its input, in its unit; None without one.
        behind: what the quantizer was moved in front of, in order: names of pooling nodes of the
            file, or ``FLATTEN``.
    """

    name: str
    low: int
    ceiling: float | None = None
    behind: tuple[str, ...] = ()


def origin(node: NodeProto) -> Origin | None:
    """Return what :func:`set_origin_` noted at a node, None if nothing."""
    text = next((entry.value for entry in node.metadata_props if entry.key == TAG), None)
    if text is None:
        return None
    values = json.loads(text)
    return Origin(**(values | {"behind": tuple(values["behind"])}))


def set_origin_(node: NodeProto, found: Origin) -> None:
    """Note at a node which quantizer it computes; FINN's transformations keep such notes."""
    kept = [entry for entry in node.metadata_props if entry.key != TAG]
    del node.metadata_props[:]
    node.metadata_props.extend(kept)
    entry = node.metadata_props.add()
    entry.key, entry.value = TAG, json.dumps(asdict(found))
