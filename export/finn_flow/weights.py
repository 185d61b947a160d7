"""Quantized weights as integers, with their scales behind the layer.

FINN+ does so too, one weight at a time with the whole graph gone through after each; not with a
weight whose channels have quantizers of their own, nor with codes that are all odd. Odd codes
``c = 2 q + 1`` are half a step from the file's ``q``: they are stored as they are, in one bit more.
One bit stays one bit, FINN's type BIPOLAR.
"""

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, helper
from qonnx.core.datatype import DataType
from qonnx.core.modelwrapper import ModelWrapper

from .graph_edits import attribute, constant, replace_

BIPOLAR = "BIPOLAR"
QUANTIZERS = ("Quant", "BipolarQuant")


def integer_weight_(model: ModelWrapper, node: NodeProto) -> bool:
    """Replace a layer by one with integer weights, its scales, and its bias.

    Returns:
        Whether it was a layer with a quantized weight.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return False
    parts = _parts(model, node.input[1])
    if not parts:
        return False
    values, scale = _whole(parts)
    if attribute(node, "transB", 0):
        values, scale = values.T, scale.T if scale.ndim == 2 else scale
    if scale.size == 1:
        scale = scale.reshape(())
    elif node.op_type == "Conv":
        scale = scale.reshape(1, -1, 1, 1)
    name = node.input[1]
    weight = constant(model, f"{name}.integers", values.astype(np.float32))
    model.set_tensor_datatype(weight, DataType[_type(parts)])
    kept = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    kind, kept = ("Conv", kept) if node.op_type == "Conv" else ("MatMul", {})
    output, bias = node.output[0], node.input[2] if len(node.input) > 2 else ""
    sums, scaled = f"{output}.sums", f"{output}.scaled" if bias else output
    shape = model.get_tensor_shape(output)
    nodes = [
        helper.make_node(kind, [node.input[0], weight], [sums], node.name, **kept),
        helper.make_node("Mul", [sums, constant(model, f"{name}.scale", scale)], [scaled]),
    ]
    model.set_tensor_shape(sums, shape)
    if bias:
        offset = model.get_initializer(bias).reshape([1, -1, 1, 1] if kind == "Conv" else [-1])
        nodes.append(
            helper.make_node("Add", [scaled, constant(model, f"{name}.bias", offset)], [output])
        )
        model.set_tensor_shape(scaled, shape)
    replace_(model, node, nodes)
    return True


@dataclass(frozen=True, eq=False)
class _Part:
    """Channels of a weight that have one quantizer; ``order`` and ``axis`` are the whole's."""

    codes: np.ndarray
    scale: np.ndarray
    bits: int
    order: np.ndarray | None
    axis: int


def _whole(parts: list[_Part]) -> tuple[np.ndarray, np.ndarray]:
    """Return the codes of all channels, and their scales."""
    if len(parts) == 1:
        values, scale = parts[0].codes, parts[0].scale
    else:
        values = np.concatenate([part.codes for part in parts], parts[0].axis)
        scale = np.concatenate([part.scale for part in parts], parts[0].axis)
    if parts[0].order is not None:
        values = values.take(parts[0].order, parts[0].axis)
        scale = scale.take(parts[0].order, parts[0].axis)
    return values, scale


def _type(parts: list[_Part]) -> str:
    bits = max(part.bits for part in parts)
    return BIPOLAR if bits == 1 else f"INT{bits}"


def _parts(model: ModelWrapper, tensor: str) -> list[_Part]:
    maker, order, axis = model.find_producer(tensor), None, 0
    if maker is not None and maker.op_type == "Gather":
        order = model.get_initializer(maker.input[1])
        maker = model.find_producer(maker.input[0])
    if maker is None:
        return []
    makers = [maker]
    if maker.op_type == "Concat":
        axis = attribute(maker, "axis", 0)
        makers = [model.find_producer(name) for name in maker.input]
    found = []
    for quant in makers:
        if quant is None or quant.op_type not in QUANTIZERS:
            return []
        weight, scale = (model.get_initializer(name) for name in quant.input[:2])
        if weight is None:
            return []
        bits = 1
        if quant.op_type == "Quant":
            zero, width = (float(model.get_initializer(name)) for name in quant.input[2:4])
            halved = zero == -0.5
            bits, scale = int(width) + halved, scale / 2 if halved else scale
        if order is not None or len(makers) > 1:
            shape = [1] * weight.ndim
            shape[axis] = weight.shape[axis]
            scale = np.broadcast_to(scale, shape)
        found.append(
            _Part(np.rint(weight / scale), np.asarray(scale, np.float32), bits, order, axis)
        )
    return found
