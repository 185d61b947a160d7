"""From a QONNX file of ours to the network hls4ml is given, code for code.

A file's layers are followed by factors and offsets (scales, biases, batch normalisation) in real
numbers, and then by a quantizer. Hardware has sums of integers. What stands between a layer's sums
and the next quantizer is one factor and one offset for each channel; it is carried along until the
quantizer is met, and then made as short as the quantizer allows
(:mod:`export.hls4ml_flow.fixed_point`). Operations that keep the order of values, such as ReLU and
max pooling, commute with a quantizer and come after it, on the few bits of its codes.

Where every scale is a power of two, codes times scale are fixed-point numbers as they are, and no
factor remains. Other scales stay outside: the tensor holds the codes, and the factor behind the
next layer holds the scales.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx

from export import graph
from export.format import QuantizerInFile
from export.hls4ml_flow import fixed_point, settling
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.fixed_point import Array, FixedType, power_of_two
from export.hls4ml_flow.pending import Pending, Unsupported
from export.hls4ml_flow.tensors import Value
from sdq.quantizers import code_range


@dataclass(frozen=True)
class Tap:
    """Where a simulation shows a quantizer's codes.

    Args:
        tensor: of the new network.
        shape: its shape without the batch, channels last.
        flat: whether the file has it in one dimension.
        scale: what one code is in it.
        type: its.
    """

    tensor: str
    shape: tuple[int, ...]
    flat: bool
    scale: float
    type: FixedType


@dataclass(frozen=True, eq=False)
class Network:
    """What hls4ml is given.

    Args:
        model: QONNX with channels last.
        layers: configuration of each layer, by name.
        input: the tensor it takes.
        output: the tensor it gives.
        flat: whether the file gives it in one dimension.
        taps: by activation quantizer.
        inexact: what is rounded otherwise than in the file, in sentences; empty if nothing is.
        io_type: how its layers hand over tensors.
    """

    model: onnx.ModelProto
    layers: dict[str, dict[str, Any]]
    input: Value
    output: Value
    flat: bool
    taps: dict[str, Tap]
    inexact: tuple[str, ...]
    io_type: str


@dataclass
class Reader:
    """Goes through a file's nodes and builds the new network.

    Args:
        model: a file of the format ``qonnx``.
        quantizers: what that format reads from it.
        builder: an empty one.
    """

    model: onnx.ModelProto
    quantizers: Mapping[str, QuantizerInFile]
    builder: Builder
    tensors: dict[str, Pending] = field(default_factory=dict)
    taps: dict[str, Tap] = field(default_factory=dict)
    inexact: list[str] = field(default_factory=list)
    float_averages: set[str] = field(default_factory=set)
    image: Value | None = None

    def __post_init__(self) -> None:
        self.constants = graph.constants(self.model)
        self.readers = Counter(x for node in self.model.graph.node for x in node.input)

    def network(self, operators: "Mapping[str, Operator]") -> Network:
        """Return the network for hls4ml.

        Args:
            operators: what each of the file's operators becomes.

        Raises:
            Unsupported: something in the file has no counterpart.
        """
        self._start()
        for node in self.model.graph.node:
            if node.name.startswith(graph.PREPROCESSING) or not self._follows(node):
                continue
            if node.op_type not in operators:
                raise unknown(node, operators)
            self.tensors[node.output[0]] = self._shared(node, operators[node.op_type](self, node))
        whole = self.settled(self.model.graph.output[0].name, "output")
        output = self.builder.unflattened(whole)
        assert self.image is not None
        return Network(
            self.builder.model(output), self.builder.layers, self.image, output,
            len(whole.shape) == 1, self.taps, tuple(self.inexact),
            "io_stream" if self.builder.stream else "io_parallel",
        )  # fmt: skip

    def settled(self, tensor: str, where: str) -> Value:
        """Return a tensor of the file as one of the new network, made once."""
        value = settling.settled(self.builder, self.tensors[tensor], where, self.inexact)
        self.tensors[tensor] = Pending.of(value)
        return value

    def input(self, node: onnx.NodeProto) -> Value:
        """Return what a layer reads: a tensor of integers."""
        if not self.tensors[node.input[0]].quantized:
            raise Unsupported(
                node.name, "read a tensor of 2 to 8 bits", "one that is not quantized",
                "set act_bits and input_bits to at most 8",
            )  # fmt: skip
        return self.settled(node.input[0], node.name)

    def constant(self, node: onnx.NodeProto, index: int) -> Array:
        """Return a constant input of a node."""
        return self.constants[node.input[index]]

    def quantize(self, node: onnx.NodeProto) -> Pending:
        """Go through a quantizer of activations."""
        name, x = node.name.removesuffix(".quant"), self.tensors[node.input[0]]
        quantizer, signed = self.quantizers[name], bool(graph.attribute(node, "signed", 1))
        assert isinstance(quantizer.bits, int)
        if quantizer.bits > 8:
            raise Unsupported(name, "have at most 8 bits", quantizer.bits, "set act_bits to 8")
        scale = float(quantizer.scale)
        unit = 1.0 if power_of_two(scale) else scale
        step = scale / unit
        integer = quantizer.bits + math.frexp(step)[1] - 1
        kind = FixedType(quantizer.bits, integer, signed, saturating=True)
        if x.value.tensor:
            ends = code_range(quantizer.bits, signed)
            source = replace(x, factor=x.factor / unit, offset=x.offset / unit)
            borders = fixed_point.borders(*ends, step)
            try:
                sums = settling.before_quantizer(self.builder, name, source, borders)
            except fixed_point.TooFine as error:
                raise self._too_fine(name, x.path, str(error)) from error
            value = self.builder.quantize(name, sums, kind, unit)
        else:
            value = self._quantized_image(name, x, kind, unit)
        for after in x.after:
            if signed or not after.relu:
                value = after.apply(self.builder, value)
        if value.traced:
            shape = value.image or value.shape
            self.taps[name] = Tap(value.traced, shape, len(value.shape) == 1, step, value.type)
        return Pending.of(value)

    def _too_fine(self, name: str, path: str, why: str) -> Unsupported:
        """Return what is to be said where nothing that is short enough keeps a quantizer's codes.

        Sums of values that are not quantized lie so near to each other that some always fall
        beside a border.
        """
        if path in self.float_averages:
            return Unsupported(
                path, "average quantized values", f"others, and {why}",
                "prepare with --integer-datapath, or QuantConfig(integer_datapath=True)",
            )  # fmt: skip
        return Unsupported(
            name, "read sums that constants of 52 bits scale", why,
            "a channel's factor may be too small beside the others': prepare with "
            "--batch-norm fold, or QuantConfig(batch_norm='fold')",
        )  # fmt: skip

    def _quantized_image(self, name: str, x: Pending, kind: FixedType, unit: float) -> Value:
        if self.image is not None or (x.factor != 1).any() or x.offset.any():
            raise Unsupported(
                name, "be the only reader of the images, and read them as they are",
                "several, or a computation before", "quantize the whole input first",
            )  # fmt: skip
        self.image = self.builder.input(x.value.shape, unit, kind)
        return self.image

    def _start(self) -> None:
        entry = self.model.graph.input[0]
        sizes = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
        if len(sizes) != 3:
            raise Unsupported("input", "be images (N, C, H, W)", f"{len(sizes) + 1} dimensions")
        name, (channels, height, width) = entry.name, sizes
        prepared = [n for n in self.model.graph.node if n.name.startswith(graph.PREPROCESSING)]
        if prepared:
            name, (height, width, channels) = prepared[-1].output[0], sizes
        value = Value("", (height, width, channels), 1.0, -math.inf, math.inf, 0.0)
        self.tensors[name] = Pending(value, np.ones(channels), np.zeros(channels))

    def _follows(self, node: onnx.NodeProto) -> bool:
        return any(x in self.tensors for x in node.input)

    def _shared(self, node: onnx.NodeProto, made: Pending) -> Pending:
        """Multiply once where several read the product."""
        several = self.readers[node.output[0]] > 1
        return settling.multiplied(self.builder, made) if several else made


Operator = Callable[[Reader, onnx.NodeProto], Pending]


def unknown(node: onnx.NodeProto, operators: Iterable[str]) -> Unsupported:
    """Return what is to be said of an operator that is not known here."""
    known = ", ".join(sorted(operators))
    return Unsupported(node.name, f"be one of {known}", node.op_type)
