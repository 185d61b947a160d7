"""What each operator of a file becomes in the network for hls4ml.

Average pooling is a depthwise convolution of ones, whose factor is one over their number: hls4ml's
own average pooling rounds, and cannot be read back from a QONNX graph with channels last. Grouped
and dilated convolutions, which hls4ml has not, become dense ones with zeros.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx

from export import graph
from export.hls4ml_flow import fixed_point
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.fixed_point import Array, FixedType, power_of_two
from export.hls4ml_flow.pending import Pending, Unsupported
from export.hls4ml_flow.reading import Operator, Reader
from export.hls4ml_flow.tensors import Pads, Value, Weights
from export.operands import attributes

Window = tuple[tuple[int, int], tuple[int, int], Pads]
"""Kernel, strides, and pads: top, left, bottom, right."""


def _conv(reader: Reader, node: onnx.NodeProto) -> Pending:
    codes, scale, kind = _codes(reader, node)
    x, options = reader.input(node), attributes(node)
    if codes.ndim != 4:
        raise Unsupported(node.name, "be a convolution of images", f"{codes.ndim - 2} dimensions")
    groups, depthwise = options.get("group", 1), False
    if groups > 1:
        depthwise = groups == x.channels == len(codes)
        codes = codes if depthwise else _dense(codes, groups)
    codes = _spread(codes, options.get("dilations", [1, 1]))
    pads, strides = options.get("pads", [0, 0, 0, 0]), options.get("strides", [1, 1])
    channels_last = codes.transpose(0, 2, 3, 1)
    weights = Weights(channels_last, kind, tuple(strides), tuple(pads), depthwise)
    return _product(reader, node, x, weights, scale)


def _linear(reader: Reader, node: onnx.NodeProto) -> Pending:
    codes, scale, kind = _codes(reader, node)
    x = reader.input(node)
    if len(x.shape) != 1:
        raise Unsupported(node.name, "read (N, F)", f"{len(x.shape) + 1} dimensions", "flatten it")
    if x.image is not None:
        height, width, channels = x.image
        images = codes.reshape(len(codes), channels, height, width)
        codes = images.transpose(0, 2, 3, 1).reshape(len(codes), -1)
    return _product(reader, node, x, Weights(codes, kind), scale)


def _product(
    reader: Reader, node: onnx.NodeProto, x: Value, weights: Weights, scale: Array
) -> Pending:
    offset = np.zeros(len(weights.values))
    if len(node.input) > 2:
        offset = reader.constant(node, 2).reshape(-1).astype(np.float64)
    return Pending(x, np.broadcast_to(scale * x.unit, len(offset)), offset, node.name, weights)


def _codes(reader: Reader, node: onnx.NodeProto) -> tuple[Array, Array, FixedType]:
    """Return a layer's codes, what is left of their scale, and the type they have."""
    found = reader.quantizers.get(node.name.partition("#")[0])
    if found is None or found.codes is None:
        raise Unsupported(
            node.name, "have weights of 1 to 8 bits", "float",
            "quantize it: leave it out of --skip and --pin, and set first_last_bits to at most 8",
        )  # fmt: skip
    codes, scale = found.codes.double().numpy(), found.scale.double().numpy()
    half = 2.0 ** ((found.bits if isinstance(found.bits, int) else max(found.bits)) - 1)
    kind = fixed_point.holding(min(codes.min(), -half), max(codes.max(), half - 1), 1.0)
    if len(scale) == 1 and power_of_two(float(scale[0])):
        weights = Weights(codes, kind).scaled(float(scale[0]))
        return weights.values, np.ones(1), weights.type
    return codes, scale, kind


def _dense(codes: Array, groups: int) -> Array:
    """Return a grouped convolution's weights ``(K, C / g, kh, kw)`` as ``(K, C, kh, kw)``."""
    count, each = len(codes) // groups, codes.shape[1]
    whole = np.zeros((len(codes), each * groups, *codes.shape[2:]))
    for g in range(groups):
        rows = slice(g * count, (g + 1) * count)
        whole[rows, g * each : (g + 1) * each] = codes[rows]
    return whole


def _spread(codes: Array, dilations: list[int]) -> Array:
    """Return a dilated kernel's weights with the zeros between them."""
    (kh, kw), (dh, dw) = codes.shape[2:], dilations
    whole = np.zeros((*codes.shape[:2], (kh - 1) * dh + 1, (kw - 1) * dw + 1))
    whole[:, :, ::dh, ::dw] = codes
    return whole


def _batch_norm(reader: Reader, node: onnx.NodeProto) -> Pending:
    x = _unbent(reader, node, node.input[0])
    scale, shift, mean, variance = (
        reader.constant(node, i).astype(np.float64) for i in range(1, 5)
    )
    factor = scale / np.sqrt(variance + float(attributes(node).get("epsilon", 1e-5)))
    return replace(x, factor=x.factor * factor, offset=(x.offset - mean) * factor + shift)


def _add(reader: Reader, node: onnx.NodeProto) -> Pending:
    constants = [x for x in node.input if x not in reader.tensors]
    if not constants:
        x, y = _operands(reader, node)
        if x.shape != y.shape:
            raise Unsupported(node.name, "have operands of one shape", f"{x.shape} and {y.shape}")
        return Pending.of(reader.builder.add(node.name, x, y))
    tensor = next(x for x in node.input if x in reader.tensors)
    pending, values = _unbent(reader, node, tensor), reader.constants[constants[0]]
    if values.size not in (1, len(pending.factor)):
        raise Unsupported(node.name, "add one number, or one a channel", f"{values.size} numbers")
    return replace(pending, offset=pending.offset + values.astype(np.float64).reshape(-1))


def _concat(reader: Reader, node: onnx.NodeProto) -> Pending:
    axis = graph.attribute(node, "axis", 1)
    if axis != 1:
        raise Unsupported(node.name, "concatenate channels (dimension 1)", f"dimension {axis}")
    whole, *rest = _operands(reader, node)
    for y in rest:
        whole = reader.builder.concatenate(node.name, whole, y)
    return Pending.of(whole)


def _operands(reader: Reader, node: onnx.NodeProto) -> list[Value]:
    """Return tensors that have one unit."""
    if any(x not in reader.tensors for x in node.input):
        raise Unsupported(node.name, "have no constant among its operands", "one")
    values = [reader.settled(x, node.name) for x in node.input]
    if len({value.unit for value in values}) > 1:
        raise Unsupported(
            node.name, "have operands of one scale", "several",
            "prepare with --integer-datapath, or QuantConfig(integer_datapath=True)",
        )  # fmt: skip
    return values


def _unbent(reader: Reader, node: onnx.NodeProto, tensor: str) -> Pending:
    """Return a tensor with nothing behind its factor and offset."""
    if reader.tensors[tensor].after:
        reader.settled(tensor, node.name)
    return reader.tensors[tensor]


def _average(reader: Reader, node: onnx.NodeProto) -> Pending:
    if not reader.tensors[node.input[0]].quantized:
        reader.float_averages.add(node.name)
    x, options = reader.settled(node.input[0], node.name), attributes(node)
    if node.op_type == "AveragePool":
        kernel, strides, pads = _window(node, x)
        if any(pads) and not options.get("count_include_pad", 0):
            raise Unsupported(
                node.name, "count its padding, or have none", "padding that does not count",
                "set count_include_pad",
            )  # fmt: skip
    else:
        kernel, strides, pads = _whole(reader, node, x)
    ones = np.ones((x.channels, *kernel, 1))
    weights = Weights(ones, fixed_point.holding(0, 1, 1), strides, pads, depthwise=True)
    factor = np.full(x.channels, x.unit / math.prod(kernel))
    made = Pending(x, factor, np.zeros(x.channels), node.name, weights)
    return made.then(_flat(node)) if _drops(node) else made


def _max_pool(reader: Reader, node: onnx.NodeProto) -> Pending:
    def pool(builder: Builder, value: Value) -> Value:
        if node.op_type == "MaxPool":
            kernel, strides, pads = _window(node, value)
        else:
            kernel, strides, pads = _whole(reader, node, value)
        if any(pads) and value.least < 0:
            raise Unsupported(
                node.name, "have no padding where values can be negative", "padding",
                "put a ReLU before it",
            )  # fmt: skip
        if builder.stream and strides != kernel and value.shape[:2] != kernel:
            raise Unsupported(
                node.name, "pool windows that do not overlap, as hls4ml's streams want it",
                f"windows of {kernel[0]} x {kernel[1]} every {strides[0]} x {strides[1]}",
                "pool with a stride as wide as the window, or choose the option io_parallel",
            )  # fmt: skip
        value = builder.max_pool(node.name, value, kernel, strides, pads)
        return builder.flatten(node.name, value) if _drops(node) else value

    return reader.tensors[node.input[0]].then(pool)


def _window(node: onnx.NodeProto, x: Value) -> Window:
    options = attributes(node)
    (kh, kw), (sh, sw) = options["kernel_shape"], options.get("strides", [1, 1])
    top, left, bottom, right = options.get("pads", [0, 0, 0, 0])
    if set(options.get("dilations", [1])) != {1}:
        raise Unsupported(node.name, "not be dilated", options["dilations"])
    height, width = x.shape[0] + top + bottom, x.shape[1] + left + right
    if options.get("ceil_mode", 0) and ((height - kh) % sh or (width - kw) % sw):
        raise Unsupported(
            node.name, "leave out what does not fill a window", "ceil_mode", "pad the images"
        )
    return (kh, kw), (sh, sw), (top, left, bottom, right)


def _whole(reader: Reader, node: onnx.NodeProto, x: Value) -> Window:
    """Return the window that is the image."""
    axes = attributes(node).get("axes", [2, 3])
    if len(node.input) > 1:
        axes = reader.constant(node, 1).tolist()
    if {axis % 4 for axis in axes} != {2, 3} or len(x.shape) != 3:
        raise Unsupported(node.name, "be over height and width", f"dimensions {list(axes)}")
    kernel = (x.shape[0], x.shape[1])
    return kernel, kernel, (0, 0, 0, 0)


def _drops(node: onnx.NodeProto) -> bool:
    return node.op_type.startswith("Reduce") and not attributes(node).get("keepdims", 1)


def _relu(reader: Reader, node: onnx.NodeProto) -> Pending:
    x = reader.tensors[node.input[0]]
    return x.then(lambda builder, value: builder.relu(node.name, value), relu=True)


def _clip(reader: Reader, node: onnx.NodeProto) -> Pending:
    """A ReLU6 and the like: ``min(x, b) = b - relu(b - x)``, if the codes go beyond the bound."""
    low, high = (float(reader.constant(node, i)) for i in (1, 2))
    if low != 0:
        raise Unsupported(node.name, "be bounded below by 0", low, "use a ReLU")

    def clip(builder: Builder, value: Value) -> Value:
        value = builder.relu(node.name, value) if value.least < 0 else value
        bound = float(np.rint(high / value.unit / value.step)) * value.step
        if bound >= value.most:
            return value
        minus, offset = np.full(value.channels, -1.0), np.full(value.channels, bound)
        room = builder.affine(f"{node.name}_room", value, minus, offset, last=True)
        room = builder.relu(node.name, room)
        return builder.affine(f"{node.name}_bound", room, minus, offset, last=True)

    return reader.tensors[node.input[0]].then(clip)


def _flatten(reader: Reader, node: onnx.NodeProto) -> Pending:
    if node.op_type == "Reshape":
        sizes = reader.constant(node, 1).tolist()
        flat = len(sizes) == 2 and -1 in sizes
    else:
        sizes = graph.attribute(node, "axis", 1)
        flat = sizes == 1
    if not flat:
        raise Unsupported(node.name, "flatten all dimensions but the batch", sizes)
    return reader.tensors[node.input[0]].then(_flat(node))


def _flat(node: onnx.NodeProto) -> Callable[[Builder, Value], Value]:
    return lambda builder, value: builder.flatten(node.name, value)


def _same(reader: Reader, node: onnx.NodeProto) -> Pending:
    return reader.tensors[node.input[0]]


OPERATORS: dict[str, Operator] = {
    "Add": _add,
    "AveragePool": _average,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Flatten": _flatten,
    "Gemm": _linear,
    "GlobalAveragePool": _average,
    "GlobalMaxPool": _max_pool,
    "Identity": _same,
    "MatMul": _linear,
    "MaxPool": _max_pool,
    "Quant": Reader.quantize,
    "ReduceMax": _max_pool,
    "ReduceMean": _average,
    "Relu": _relu,
    "Reshape": _flatten,
}
