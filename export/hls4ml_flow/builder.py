"""The network that hls4ml is given: layers on images with the channels last, and a type for each.

hls4ml reads QONNX graphs of one narrow kind. This builder writes that kind, and beside it, layer by
layer, the fixed-point types that hold every value the layer can have. Tensors hold integers times a
power of two.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.hls4ml_flow import fixed_point
from export.hls4ml_flow.fixed_point import Array, FixedType, holding
from export.hls4ml_flow.tensors import Pads, Value, Weights

CHANNELS_LAST = "qonnx.custom_op.channels_last"
QUANT = "qonnx.custom_op.general"
UNROLLED = 4096
"""Multiplications in parallel: beyond it HLS compilers give up unrolling, and a layer's multipliers
are used several times instead."""


@dataclass
class Builder:
    """Collects the nodes of the new network and the configuration of its layers.

    Args:
        stream: layers hand over pixel by pixel, not whole tensors.
        parallel_products: multiplications a layer may do at once.
        reuse_factor: if given, of all layers; else each layer's follows from ``parallel_products``.
    """

    stream: bool
    parallel_products: int = UNROLLED
    reuse_factor: int | None = None
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def name(self, path: str) -> str:
        """Return a name for a layer: lower case, a C identifier, and not yet taken."""
        plain = "".join(c if c.isalnum() and c.isascii() else "_" for c in path.lower()).strip("_")
        plain = plain if plain[:1].isalpha() else f"layer_{plain}"
        name, count = plain, 1
        while name in self.taken:
            count += 1
            name = f"{plain}_{count}"
        self.taken.add(name)
        return name

    def input(self, shape: tuple[int, ...], unit: float, kind: FixedType) -> Value:
        """Add the network's input, whose values arrive rounded to a type."""
        name = self.name("images")
        low, high = _ends(kind)
        self.shapes[name] = shape
        self.layers[name] = {"Precision": {"result": str(kind.quantizer())}}
        return Value(name, shape, unit, low, high, kind.step)

    def quantize(self, path: str, x: Value, kind: FixedType, unit: float) -> Value:
        """Round to a type, half to even, and saturate."""
        name = self.name(path)
        scale = np.array(kind.step, np.float32)
        inputs = [
            self._constant(f"{name}_{part}", np.array(value, np.float32))
            for part, value in (("scale", scale), ("zero_point", 0), ("bits", kind.width))
        ]
        tensor = self._node(
            "Quant", name, [x.tensor, *inputs], x.shape, domain=QUANT,
            signed=int(kind.signed), narrow=0, rounding_mode="ROUND",
        )  # fmt: skip
        result = {"result": str(kind.quantizer())}
        self.layers[name] = {"Precision": result, "Trace": True}
        low, high = _ends(kind)
        return replace(
            x, tensor=tensor, unit=unit, least=low, most=high, step=kind.step, traced=tensor
        )

    def multiply(
        self, path: str, x: Value, weights: Weights, offset: Array | None, *, last: bool
    ) -> Value:
        """Add a convolution or linear layer.

        Args:
            path: of the layer.
            x: its input.
            weights: its constants.
            offset: its bias ``(K,)``, in units of the sums.
            last: no quantizer takes over its result.
        """
        name, sums = self.name(path), weights.sums(x)
        offset = np.zeros(len(sums.least)) if offset is None else offset
        step = min(sums.step, fixed_point.step_of(offset)) if offset.any() else sums.step
        low, high = float((sums.least + offset).min()), float((sums.most + offset).max())
        kind, shape = holding(min(low, 0.0), max(high, 0.0), step), weights.shape(x)
        bias = holding(float(offset.min()), float(offset.max()), fixed_point.step_of(offset))
        # hls4ml merges a linear layer's bias into it only where no type of the result is declared
        declared = last and not (weights.values.ndim == 2 and offset.any())
        self.layers[name] = {
            "Precision": {
                "weight": str(weights.type), "bias": str(bias), "accum": str(kind),
                "result": str(kind) if declared else "auto",
            },
            "Trace": True,
            **self._reuse(weights),
        }  # fmt: skip
        w = self._weight(name, weights)
        if weights.values.ndim == 2:
            tensor = self._node("MatMul", name, [x.tensor, w], shape)
            if offset.any():
                b = self._constant(f"{name}_bias", _short_float(offset))
                tensor = self._node("Add", self.name(f"{name}_add"), [tensor, b], shape)
        else:
            inputs = [x.tensor, w]
            if offset.any():
                inputs.append(self._constant(f"{name}_bias", _short_float(offset)))
            tensor = self._node(
                "Conv", name, inputs, shape, domain=CHANNELS_LAST,
                kernel_shape=weights.values.shape[1:3], strides=weights.strides, pads=weights.pads,
                dilations=(1, 1), group=x.channels if weights.depthwise else 1,
            )  # fmt: skip
        return Value(tensor, shape, 1.0, low, high, step, traced=tensor)

    def affine(
        self, path: str, x: Value, factor: Array, offset: Array, *, last: bool = False
    ) -> Value:
        """Multiply each channel by a factor ``(C,)`` and add an offset ``(C,)``.

        Args:
            path: of the layer.
            x: its input.
            factor: short enough for hardware.
            offset: likewise.
            last: no quantizer takes over its result.
        """
        name = self.name(path)
        types = [holding(float(v.min()), float(v.max()), fixed_point.step_of(v))
                 for v in (factor, offset)]  # fmt: skip
        zeros, ones = np.zeros(len(factor), np.float32), np.ones(len(factor), np.float32)
        inputs = [
            self._constant(f"{name}_{part}", values)
            for part, values in (
                ("factor", _short_float(factor)), ("offset", _short_float(offset)),
                ("mean", zeros), ("variance", ones),
            )
        ]  # fmt: skip
        domain = CHANNELS_LAST if len(x.shape) == 3 else ""
        tensor = self._node(
            "BatchNormalization", name, [x.tensor, *inputs], x.shape, domain=domain, epsilon=0.0
        )
        ends = np.stack([factor * x.least, factor * x.most])
        step = min(x.step * fixed_point.step_of(factor), fixed_point.step_of(offset))
        low, high = float((ends.min(0) + offset).min()), float((ends.max(0) + offset).max())
        y = replace(x, tensor=tensor, least=low, most=high, step=step, traced=tensor)
        result = str(y.type) if last else "auto"
        precision = {"scale": str(types[0]), "bias": str(types[1]), "result": result}
        self.layers[name] = {"Precision": precision, "Trace": True}
        return y

    def relu(self, path: str, x: Value) -> Value:
        """Take zero for what is negative."""
        name = self.name(path)
        tensor = self._node("Relu", name, [x.tensor], x.shape)
        y = replace(x, tensor=tensor, least=max(x.least, 0.0), most=max(x.most, 0.0), traced=tensor)
        self.layers[name] = {"Precision": {"result": str(y.type)}, "Trace": True}
        return y

    def max_pool(
        self, path: str, x: Value, kernel: tuple[int, int], strides: tuple[int, int],
        pads: Pads,
    ) -> Value:  # fmt: skip
        """Take the largest value of each window; padding counts as 0, below which nothing is."""
        name = self.name(path)
        x = self._padded(f"{name}_pad", x, pads) if any(pads) else x
        height, width = (
            (size - k) // stride + 1
            for size, k, stride in zip(x.shape, kernel, strides, strict=False)
        )
        shape = (height, width, x.channels)
        tensor = self._node(
            "MaxPool", name, [x.tensor], shape, domain=CHANNELS_LAST, kernel_shape=kernel,
            strides=strides, pads=(0, 0, 0, 0),
        )  # fmt: skip
        self.layers[name] = {"Precision": {"result": "auto", "accum": "auto"}, "Trace": True}
        return replace(x, tensor=tensor, shape=shape, traced=tensor)

    def _padded(self, path: str, x: Value, pads: Pads) -> Value:
        name, (top, left, bottom, right) = self.name(path), pads
        shape = (x.shape[0] + top + bottom, x.shape[1] + left + right, x.channels)
        amounts = np.array([0, top, left, 0, 0, bottom, right, 0], np.int64)
        constants = [self._constant(f"{name}_amounts", amounts)]
        tensor = self._node("Pad", name, [x.tensor, *constants], shape, mode="constant")
        self.layers[name] = {"Precision": {"result": "auto"}}
        return replace(x, tensor=tensor, shape=shape)

    def flatten(self, path: str, x: Value) -> Value:
        """Make one dimension of three."""
        if len(x.shape) == 1:
            return x
        name, shape = self.name(path), (math.prod(x.shape),)
        self.layers[name] = {"Precision": {"result": "auto"}}
        tensor = self._node("Flatten", name, [x.tensor], shape, axis=1)
        return replace(x, tensor=tensor, shape=shape, image=x.shape)

    def unflattened(self, x: Value) -> Value:
        """Take a flattening back, if nothing came after it: hls4ml wants none at the end."""
        if not self.nodes or self.nodes[-1].output[0] != x.tensor or x.image is None:
            return x
        flat = self.nodes.pop()
        del self.shapes[x.tensor], self.layers[flat.name]
        return replace(x, tensor=flat.input[0], shape=x.image, image=None)

    def add(self, path: str, x: Value, y: Value) -> Value:
        """Add two tensors of one unit."""
        name = self.name(path)
        tensor = self._node("Add", name, [x.tensor, y.tensor], x.shape)
        both = replace(
            x, tensor=tensor, least=x.least + y.least, most=x.most + y.most,
            step=min(x.step, y.step), traced=tensor,
        )  # fmt: skip
        self.layers[name] = {"Precision": {"result": str(both.type)}}
        return both

    def concatenate(self, path: str, x: Value, y: Value) -> Value:
        """Put the channels of two tensors of one unit side by side."""
        name, axis = self.name(path), len(x.shape)
        shape = (*x.shape[:-1], x.channels + y.channels)
        tensor = self._node("Concat", name, [x.tensor, y.tensor], shape, axis=axis)
        both = replace(
            x, tensor=tensor, shape=shape, least=min(x.least, y.least), most=max(x.most, y.most),
            step=min(x.step, y.step), traced=tensor,
        )  # fmt: skip
        self.layers[name] = {"Precision": {"result": str(both.type)}, "Trace": True}
        return both

    def model(self, output: Value) -> onnx.ModelProto:
        """Return the network as a QONNX model for a batch of one."""

        def info(name: str) -> onnx.ValueInfoProto:
            shape = self.shapes[name]
            rows = name in activations
            return helper.make_tensor_value_info(
                name, TensorProto.FLOAT, [1, *shape] if rows else shape
            )

        constants = {x.name for x in self.constants}
        activations = {name for name in self.shapes if name not in constants}
        made = {x for node in self.nodes for x in node.output}
        weights = {x for x in made if x.endswith("_weight")}
        activations -= weights
        inputs = [name for name in activations if name not in made]
        graph = helper.make_graph(
            self.nodes, "network", [info(x) for x in inputs], [info(output.tensor)], self.constants,
            value_info=[info(x) for x in self.shapes if x not in (*inputs, output.tensor)],
        )  # fmt: skip
        imports = [helper.make_opsetid(d, v) for d, v in (("", 17), (QUANT, 1), (CHANNELS_LAST, 1))]
        return helper.make_model(graph, opset_imports=imports, ir_version=8)

    def _node(
        self, op: str, name: str, inputs: list[str], shape: tuple[int, ...], **options: Any
    ) -> str:
        tensor = f"{name}_output"
        options = {key: value for key, value in options.items() if value != ""}
        self.nodes.append(helper.make_node(op, inputs, [tensor], name, **options))
        self.shapes[tensor] = shape
        return tensor

    def _constant(self, path: str, values: Array) -> str:
        name = self.name(path)  # in hls4ml a constant is a layer, and must not have another's name
        self.constants.append(numpy_helper.from_array(values, name))
        self.shapes[name] = values.shape
        return name

    def _weight(self, name: str, weights: Weights) -> str:
        values, kind = weights.values, weights.type
        values = values.T if values.ndim == 2 else values
        source = self._constant(f"{name}_codes", _short_float(values))
        inputs = [
            self._constant(f"{name}_weight_{part}", np.array(value, np.float32))
            for part, value in (("scale", kind.step), ("zero_point", 0), ("bits", kind.width))
        ]
        quantizer = helper.make_node(
            "Quant", [source, *inputs], [f"{name}_weight"], self.name(f"{name}_weight_quant"),
            domain=QUANT, signed=int(kind.signed), narrow=0, rounding_mode="ROUND",
        )  # fmt: skip
        self.nodes.append(quantizer)
        self.shapes[f"{name}_weight"] = values.shape
        return f"{name}_weight"

    def _reuse(self, weights: Weights) -> dict[str, Any]:
        products, outputs = weights.values.size, len(weights.values)
        wanted = self.reuse_factor or math.ceil(products / self.parallel_products)
        if weights.depthwise:  # hls4ml's Resource takes the weights it has from ONNX in wrong order
            return {"ReuseFactor": wanted, "Strategy": "Latency"}
        factor = allowed_reuse(wanted, products // outputs, outputs)
        strategy = "Latency" if factor == 1 and products <= UNROLLED else "Resource"
        return {"ReuseFactor": factor, "Strategy": strategy}


def allowed_reuse(wanted: int, inputs: int, outputs: int) -> int:
    """Return the next reuse factor that hls4ml's multiplications are written for, or the last.

    It divides the inputs, or is a multiple of them by a divisor of the outputs. hls4ml mends others
    itself, but not those of convolutions with a kernel of 1 x 1, which then stop the simulation.

    Args:
        wanted: at least so often is a multiplier used.
        inputs: products of one output.
        outputs: of the layer.
    """
    if wanted <= inputs:
        return next(n for n in range(wanted, inputs + 1) if inputs % n == 0)
    least = min(math.ceil(wanted / inputs), outputs)
    return inputs * next(n for n in range(least, outputs + 1) if outputs % n == 0)


def _ends(kind: FixedType) -> tuple[float, float]:
    if kind.signed:
        return -(2.0 ** (kind.integer - 1)), 2.0 ** (kind.integer - 1) - kind.step
    return 0.0, 2.0**kind.integer - kind.step


def _short_float(values: Array) -> Array:
    """Return float32 values if they are the same, else float64."""
    single = values.astype(np.float32)
    return single if (single == values).all() else values
