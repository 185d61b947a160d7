"""Codes of activation quantizers, read from the thresholds of a graph that FINN made."""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from torch import Tensor

from export import graph
from export.finn_flow.origin import FLATTEN, Origin
from export.operands import attributes
from export.operators import OPERATORS


def read(
    nodes: Mapping[str, onnx.NodeProto], node: onnx.NodeProto, note: Origin, values: np.ndarray
) -> Tensor:
    """Return the codes ``(N, C, H, W)`` or ``(N, C)`` of the quantizer that a node computes.

    Args:
        nodes: of the file that FINN read, by name.
        node: a threshold, or a quantizer that is none.
        note: which quantizer that is.
        values: what the node gave.
    """
    codes = torch.from_numpy(_steps_above_lowest(node, values) + note.low)
    if codes.dim() == 4 and _channels_last(node):
        codes = codes.permute(0, 3, 1, 2)
    for name in note.behind:
        if name == FLATTEN:
            codes = codes.flatten(1)
        else:
            codes = OPERATORS["MaxPool"](attributes(nodes[name]), codes)
    return codes.int()


def _steps_above_lowest(node: onnx.NodeProto, values: np.ndarray) -> np.ndarray:
    """Return how many thresholds each value has reached."""
    if node.op_type == "Thresholding":
        return values - graph.attribute(node, "ActVal", 0)
    own = {a.name: a.f for a in node.attribute if a.name in ("out_scale", "out_bias")}
    return np.rint((values - own.get("out_bias", 0.0)) / own.get("out_scale", 1.0))


def _channels_last(node: onnx.NodeProto) -> bool:
    layout = next((a.s for a in node.attribute if a.name == "data_layout"), b"")
    return node.op_type == "Thresholding" or layout == b"NHWC"
