"""Weights of few bits in few bits: INT2 and INT4 initializers, several codes a byte.

A Cast takes the codes to int8, where the Clip that states their bitwidth follows. All of it is
constant: onnxruntime computes it once, when it loads the file, and then has the int8 weights of the
unpacked file, with the same integer kernels.

Source: https://onnx.ai/onnx/technical/int4.html
"""

import numpy as np
import onnx
from onnx import TensorProto, helper

from export import graph

NEWEST = 25
"""The opset that has 2 bits; 4 bits are there from 21 on."""


def pack_weights_(model: onnx.ModelProto, opset: int) -> None:
    """Store the weights of up to 4 bits packed, in the smallest type the opset has.

    Args:
        model: with int8 weights, each with its Clip; changed in place.
        opset: 21 or newer.
    """
    stored = {x.name: x for x in model.graph.initializer}
    values = graph.constants(model)
    nodes = []
    for node in model.graph.node:
        entry = stored.get(node.input[0]) if node.op_type == "Clip" else None
        kind = _type(values, node, opset) if entry is not None else None
        if entry is not None and kind is not None:
            codes = values[entry.name]
            cast = f"{node.name.removesuffix('.clip')}.cast"
            nodes.append(helper.make_node("Cast", [entry.name], [cast], cast, to=TensorProto.INT8))
            node.input[0] = cast
            entry.CopyFrom(_packed(codes, kind, entry.name))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _type(values: graph.Constants, clip: onnx.NodeProto, opset: int) -> int | None:
    """Return the smallest type that holds a Clip's range; None if that is int8."""
    low, high = (int(values[name]) for name in clip.input[1:])
    for kind, bits in graph.PACKED.items():
        fits = -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1)
        if fits and (bits > 2 or opset >= NEWEST):
            return kind
    return None


def _packed(codes: np.ndarray, kind: int, name: str) -> onnx.TensorProto:
    bits = graph.PACKED[kind]
    each = 8 // bits
    flat = codes.reshape(-1).astype(np.int8).view(np.uint8) & (2**bits - 1)
    flat = np.pad(flat, (0, -len(flat) % each)).reshape(-1, each)
    shifts = np.arange(each, dtype=np.uint8) * bits  # the first code in the lowest bits
    raw = np.bitwise_or.reduce(flat << shifts, axis=1).astype(np.uint8)
    return TensorProto(name=name, data_type=kind, dims=codes.shape, raw_data=raw.tobytes())
