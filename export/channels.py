"""Weights whose output channels have bitwidths of their own, in files.

No node has a range of codes for each channel: the ends of a Clip are scalars, and of a Quant, whose
bitwidth may be any tensor by its specification, qonnx's executor and datatype inference take none
but a scalar. So the channels of each bitwidth have a quantizer of their own, and a Concat and a
Gather put them back in their order:

- ``onnx``: int8 initializers, each with its Clip, before the one DequantizeLinear. All of it is
  integer and constant: a runtime folds it into one int8 weight, and fuses what follows.
- ``qonnx``: float initializers, each with its Quant (one bit: BipolarQuant).

So the bits of every channel can be read from the nodes. A linear layer's weight that is multiplied
transposed is stored transposed. Where all channels have the same bits, the file is that of a layer
of these bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from export import graph
from export.format import Bits
from sdq.channel_bits import ChannelWeightQuantizer
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel
from sdq.quantizers import code_range, highest_odd_code

JOINS = ("Concat", "Gather")
"""The operators that put channels together."""


@dataclass(frozen=True, eq=False)
class Part:
    """The channels of one bitwidth.

    Args:
        bits: 1 to 8.
        channels: their indices, ascending.
        odd: whether all their codes are odd.
        scale: float32, of each, ``(k, 1, ...)``.
    """

    bits: int
    channels: np.ndarray
    odd: bool
    scale: np.ndarray


def parts(qmodel: QuantModel) -> dict[str, list[Part]]:
    """Return the parts of each layer whose channels differ in bits."""
    found = {}
    for bits in qmodel.policy:
        if bits.weight_bits == FLOAT_BITS:
            continue
        quantizer = qmodel.settled_quantizer(bits.name)
        if isinstance(quantizer, ChannelWeightQuantizer) and len(quantizer.channels) > 1:
            found[bits.name] = [
                Part(
                    part.bits, quantizer.channels[part.bits].cpu().numpy(), part.odd,
                    part.scale.detach().cpu().numpy(),
                )
                for part, _ in quantizer.parts(qmodel.weight(bits.name))
            ]  # fmt: skip
    return found


def split_codes_(model: onnx.ModelProto, layer: str, parts: list[Part], halved: bool) -> None:
    """Give the int8 weight of a layer a Clip for each bitwidth.

    Args:
        model: changed in place; the layer has a DequantizeLinear of its whole weight.
        layer: its name.
        parts: of :func:`parts`.
        halved: whether codes ``2 q + 1`` are stored as ``q``.
    """
    codes = _stored(model, f"{layer}.weight")
    own = {n.name: n for n in model.graph.node if n.name.startswith(f"{layer}.weight.")}
    reader = own[f"{layer}.weight.dequantizelinear"]
    axis = _drop_transpose_(model, own[f"{layer}.weight.mul"] if halved else reader)
    if axis:
        codes = codes.T
        del reader.attribute[:]
        reader.attribute.append(helper.make_attribute("axis", axis))
        if halved:
            scale = own[f"{layer}.weight.mul"].input[1]
            _store_(model, scale, _stored(model, scale).T)
    nodes, tensors = [], []
    for part in parts:
        name = f"{layer}.weight.{part.bits}_bits"
        _store_(model, name, codes.take(part.channels, axis))
        inputs = [name]
        for role, end in zip(("min", "max"), _stored_range(part, halved), strict=True):
            _store_(model, f"{name}.clip.{role}", np.array(end, np.int8))
            inputs.append(f"{name}.clip.{role}")
        tensors.append(f"{name}.clip")
        nodes.append(helper.make_node("Clip", inputs, tensors[-1:], tensors[-1]))
    reader.input[0] = f"{layer}.weight.together"
    nodes += _join_(model, layer, parts, tensors, reader.input[0], axis)
    _insert_(model, reader, nodes)


def split_weights_(model: onnx.ModelProto, layer: str, parts: list[Part]) -> None:
    """Put a Quant or BipolarQuant for each bitwidth in place of the Quant of a layer's weight.

    Args:
        model: changed in place.
        layer: its name.
        parts: of :func:`parts`.
    """
    weight = _stored(model, f"{layer}.weight")
    old = next(n for n in model.graph.node if n.input and n.input[0] == f"{layer}.weight")
    axis = _drop_transpose_(model, old)
    nodes, tensors = [], []
    for part in parts:
        name = f"{layer}.weight.{part.bits}_bits"
        values = weight[part.channels]
        _store_(model, name, values.T if axis else values)
        binary, halved = part.bits == 1, part.odd and part.bits > 1
        tensors.append(f"{name}.{'bipolarquant' if binary else 'quant'}")
        scale = part.scale * np.float32(2 if halved else 1)
        roles = {"scale": scale.T if axis else scale}
        if not binary:
            roles["zero_point"] = np.array(-0.5 if halved else 0, np.float32)
            roles["bits"] = np.array(part.bits, np.float32)
        for role, value in roles.items():
            _store_(model, f"{tensors[-1]}.{role}", value)
        node = helper.make_node(
            "BipolarQuant" if binary else "Quant",
            [name, *(f"{tensors[-1]}.{role}" for role in roles)],
            tensors[-1:], tensors[-1], domain=old.domain,
        )  # fmt: skip
        if not binary:
            node.attribute.extend(old.attribute)
        nodes.append(node)
    nodes += _join_(model, layer, parts, tensors, old.output[0], axis)
    _insert_(model, old, nodes)
    model.graph.node.remove(old)


@dataclass(frozen=True, eq=False)
class Join:
    """How a weight is put together in a file.

    Args:
        tensors: the pieces; of a weight in one piece itself alone.
        order: the place of each channel in what they are one after the other; None if in order.
        axis: of the channels.
    """

    tensors: list[str]
    order: np.ndarray | None = None
    axis: int = 0

    @classmethod
    def of(
        cls, makers: Mapping[str, onnx.NodeProto], values: graph.Constants, tensor: str
    ) -> "Join":
        """Read from a file what a tensor is put together from."""
        maker, order = makers.get(tensor), None
        if maker is not None and maker.op_type == "Gather":
            order = values[maker.input[1]]
            maker = makers.get(maker.input[0])
        if maker is None or maker.op_type != "Concat":
            return cls([tensor])
        return cls(list(maker.input), order, graph.attribute(maker, "axis", 0))

    def __call__(self, pieces: list[np.ndarray]) -> np.ndarray:
        """Return what arrays, one a piece, are together."""
        whole = np.concatenate(pieces, self.axis) if len(pieces) > 1 else pieces[0]
        return whole if self.order is None else whole.take(self.order, self.axis)

    def bits(self, widths: list[int], pieces: list[np.ndarray]) -> Bits:
        """Return the bits of a weight whose pieces have these; one number if all are the same."""
        if len(set(widths)) == 1:
            return widths[0]
        counts = [piece.shape[self.axis] for piece in pieces]
        each = np.repeat(widths, counts)
        return tuple((each if self.order is None else each[self.order]).tolist())


def _stored_range(part: Part, halved: bool) -> tuple[int, int]:
    """Return the lowest and highest integer that a part's codes are stored as."""
    if halved:
        return -(2 ** (part.bits - 1)), 2 ** (part.bits - 1) - 1
    if part.odd:
        return -highest_odd_code(part.bits), highest_odd_code(part.bits)
    return code_range(part.bits, signed=True)


def _join_(
    model: onnx.ModelProto,
    layer: str,
    parts: list[Part],
    tensors: list[str],
    output: str,
    axis: int,
) -> list[onnx.NodeProto]:
    """Return the nodes that put the parts' tensors back in the order of the channels."""
    places = np.concatenate([part.channels for part in parts]).argsort()
    name = f"{layer}.weight"
    if (np.diff(places) == 1).all():
        return [helper.make_node("Concat", tensors, [output], f"{name}.concat", axis=axis)]
    _store_(model, f"{name}.gather.indices", places.astype(np.int64))
    inputs = [f"{name}.concat", f"{name}.gather.indices"]
    return [
        helper.make_node("Concat", tensors, inputs[:1], f"{name}.concat", axis=axis),
        helper.make_node("Gather", inputs, [output], f"{name}.gather", axis=axis),
    ]


def _drop_transpose_(model: onnx.ModelProto, node: onnx.NodeProto) -> int:
    """Let a weight's last node give what its Transpose gave; return the channels' axis then."""
    readers = [n for n in model.graph.node if node.output[0] in n.input]
    if [n.op_type for n in readers] != ["Transpose"]:
        return 0
    node.output[0] = readers[0].output[0]
    model.graph.node.remove(readers[0])
    return 1


def _stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(x for x in model.graph.initializer if x.name == name))


def _store_(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    """Store an initializer, in place of one of this name if there is one."""
    entry = numpy_helper.from_array(np.asarray(value, order="C"), name)
    for old in model.graph.initializer:
        if old.name == name:
            old.CopyFrom(entry)
            return
    model.graph.initializer.append(entry)


def _insert_(model: onnx.ModelProto, before: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
    """Insert nodes before another."""
    kept = list(model.graph.node)
    place = next(i for i, node in enumerate(kept) if node.name == before.name)
    del model.graph.node[:]
    model.graph.node.extend([*kept[:place], *nodes, *kept[place:]])
