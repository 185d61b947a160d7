"""What ONNX operators compute, on torch's functions, in whatever precision they are given.

Each takes the node's attributes and its inputs (None where one is left out). Only what our
exporters write is here; an operator with options nobody writes refuses them.

Source: ONNX operator schemas, https://onnx.ai/onnx/operators/; Quant and BipolarQuant:
https://github.com/fastmachinelearning/qonnx/tree/main/docs/qonnx-custom-ops
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from sdq.errors import RunError

Attributes = dict[str, Any]
Operator = Callable[..., Any]

_TYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
}


def attributes(node: onnx.NodeProto) -> Attributes:
    """Return a node's attributes, and the number of its outputs, on which a Split depends."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {"num_outputs": len(node.output), **found}


def tensor(proto: onnx.TensorProto, single: bool = False) -> Tensor:
    """Return a stored tensor; floats in float64, unless ``single``."""
    stored = numpy_helper.to_array(proto)
    packed = proto.data_type in (TensorProto.INT2, TensorProto.INT4)
    values = torch.from_numpy(np.array(stored, np.int8 if packed else stored.dtype))
    return values.double() if values.is_floating_point() and not single else values


def _ints(x: Tensor) -> list[int]:
    return [int(v) for v in x.reshape(-1).tolist()]


def _along(axis: int, x: Tensor, parameter: Tensor) -> Tensor:
    """Shape a per-axis parameter so that it broadcasts to ``x``."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return parameter.reshape(shape)


def _quantize_linear(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    kind = torch.uint8 if zero is None else zero.dtype
    axis = a.get("axis", 1)
    offset = 0 if zero is None else _along(axis, x, zero.double())
    codes = torch.round(x / _along(axis, x, scale)) + offset
    limits = torch.iinfo(kind)
    return codes.clamp(limits.min, limits.max).to(kind)


def _dequantize_linear(
    a: Attributes, x: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    axis = a.get("axis", 1)
    offset = 0 if zero is None else _along(axis, x, zero.double())
    values = (x.double() - offset) * _along(axis, x, scale)
    # a bias is a float32 constant, whose code may take all digits of one: every reader rounds it
    return values.float().double() if x.dtype is torch.int32 else values


def _quant(a: Attributes, x: Tensor, scale: Tensor, zero: Tensor, bits: Tensor) -> Tensor:
    mode = a.get("rounding_mode", b"ROUND").decode().upper()
    if mode not in ("ROUND", "HALF_EVEN"):
        raise RunError(f"export: Quant: rounding_mode must be ROUND, got {mode!r}")
    signed, narrow, width = a.get("signed", 1), a.get("narrow", 0), float(bits)
    low = -(2.0 ** (width - 1)) + narrow if signed else 0.0
    high = 2.0 ** (width - 1) - 1 if signed else 2.0**width - 1 - narrow
    codes = torch.round(x / scale + zero).clamp(low, high)
    return (codes - zero) * scale


def _window(a: Attributes, x: Tensor, fill: float) -> tuple[Tensor, bool]:
    """Pad as the node says; tell whether anything was padded."""
    mode, rank = a.get("auto_pad", b"NOTSET"), x.dim() - 2
    pads = list(a.get("pads", [0] * (2 * rank)))
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    if mode in (b"SAME_UPPER", b"SAME_LOWER") and set(strides) == {1}:
        both = [d * (k - 1) for d, k in zip(dilations, a["kernel_shape"], strict=True)]
        less, more = [p // 2 for p in both], [p - p // 2 for p in both]
        pads = less + more if mode == b"SAME_UPPER" else more + less
    elif mode not in (b"NOTSET", b"VALID"):
        raise RunError(f"export: auto_pad must be NOTSET, got {mode!r}")
    if not any(pads):
        return x, False
    half = len(pads) // 2
    order = [p for i in reversed(range(half)) for p in (pads[i], pads[i + half])]
    return F.pad(x, order, value=fill), True


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    x, _ = _window(a, x, 0.0)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    ones = [1] * (x.dim() - 2)
    strides, dilations = a.get("strides", ones), a.get("dilations", ones)
    result: Tensor = function(x, weight, bias, strides, 0, dilations, a.get("group", 1))
    return result


def _conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if a.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in a:
        raise RunError("export: ConvTranspose: pads must be given, not auto_pad or output_shape")
    function = F.conv_transpose1d if x.dim() == 3 else F.conv_transpose2d
    rank = x.dim() - 2
    ones, pads = [1] * rank, list(a.get("pads", [0] * (2 * rank)))
    result: Tensor = function(
        x, weight, bias, a.get("strides", ones), 0, a.get("output_padding", [0] * rank),
        a.get("group", 1), a.get("dilations", ones),
    )  # fmt: skip
    for axis, (first, last) in enumerate(zip(pads[:rank], pads[rank:], strict=True), start=2):
        result = result.narrow(axis, first, result.shape[axis] - first - last)
    return result


def _gemm(a: Attributes, x: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    x = x.T if a.get("transA", 0) else x
    y = y.T if a.get("transB", 0) else y
    product: Tensor = a.get("alpha", 1.0) * (x @ y)
    return product if bias is None else product + a.get("beta", 1.0) * bias


def _batch_norm(a: Attributes, x: Tensor, *parameters: Tensor) -> Tensor:
    weight, bias, mean, variance = (_along(1, x, p) for p in parameters)
    return (x - mean) / torch.sqrt(variance + a.get("epsilon", 1e-5)) * weight + bias


def _instance_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, list(range(2, x.dim())), correction=0, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + a.get("epsilon", 1e-5))
    return normal * _along(1, x, weight) + _along(1, x, bias)


def _layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = list(range(a.get("axis", -1) % x.dim(), x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + a.get("epsilon", 1e-5)) * weight
    return normal if bias is None else normal + bias


def _group_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, a["num_groups"], weight, bias, a.get("epsilon", 1e-5))


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    if a.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, a["blocksize"])
    n, c, h, w = x.shape
    size = a["blocksize"]
    x = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // size**2, h * size, w * size)


def _extreme(function: Callable[..., Tensor]) -> Operator:
    def apply(a: Attributes, *inputs: Tensor) -> Tensor:
        result, *rest = inputs
        for x in rest:
            result = function(result, x)
        return result

    return apply


def _modulo(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if a.get("fmod", 0) else torch.remainder(x, y)


def _gelu(a: Attributes, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=a.get("approximate", b"none").decode())


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    x, _ = _window(a, x, -torch.inf)
    function = F.max_pool1d if x.dim() == 3 else F.max_pool2d
    ones = [1] * (x.dim() - 2)
    return function(
        x, a["kernel_shape"], a.get("strides", ones), 0, a.get("dilations", ones),
        bool(a.get("ceil_mode", 0)),
    )  # fmt: skip


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    function = F.avg_pool1d if x.dim() == 3 else F.avg_pool2d
    ceil = bool(a.get("ceil_mode", 0))
    ones = [1] * (x.dim() - 2)
    padded, any_pads = _window(a, x, 0.0)
    sums = function(padded, a["kernel_shape"], a.get("strides", ones), 0, ceil)
    if not any_pads or a.get("count_include_pad", 0):
        return sums
    inside, _ = _window(a, torch.ones_like(x[:1]), 0.0)
    return sums / function(inside, a["kernel_shape"], a.get("strides", ones), 0, ceil)


def _axes(a: Attributes, x: Tensor, axes: Tensor | None) -> list[int]:
    found = a.get("axes", None) if axes is None else _ints(axes)
    return list(range(x.dim())) if found is None else list(found)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def apply(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        return function(x, dim=_axes(a, x, axes), keepdim=bool(a.get("keepdims", 1)))

    return apply


def _slice(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor,
    axes: Tensor | None = None, steps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    which = _ints(axes) if axes is not None else list(range(starts.numel()))
    stride = _ints(steps) if steps is not None else [1] * len(which)
    for start, end, axis, step in zip(_ints(starts), _ints(ends), which, stride, strict=True):
        indices = range(x.shape[axis])[start:end:step]  # clamps as ONNX does
        x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
    return x


def _pad(
    a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    which = [i % x.dim() for i in (_ints(axes) if axes is not None else range(x.dim()))]
    amounts = _ints(pads)
    by_axis = {w: (amounts[i], amounts[i + len(which)]) for i, w in enumerate(which)}
    order = [p for i in reversed(range(x.dim())) for p in by_axis.get(i, (0, 0))]
    mode = a.get("mode", b"constant").decode()
    if mode == "constant":
        return F.pad(x, order, value=0.0 if value is None else float(value))
    while len(order) > 4 and order[-2:] == [0, 0]:
        order = order[:-2]
    modes = {"edge": "replicate", "reflect": "reflect", "wrap": "circular"}
    return F.pad(x, order, mode=modes[mode])


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = _ints(shape)
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    rows = int(np.prod(x.shape[:axis]))
    return x.reshape(rows, -1)


def _clip(
    a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None
) -> Tensor:
    x = x if low is None else torch.maximum(x, low.to(x.dtype))
    return x if high is None else torch.minimum(x, high.to(x.dtype))


def _cast(a: Attributes, x: Tensor) -> Tensor:
    kind = _TYPES.get(a["to"])
    if kind is None:
        raise RunError(f"export: Cast: no type {a['to']} in export/operators.py")
    keeps = kind is torch.float32 and x.dtype is torch.float64  # float64 stays what it is
    return x if keeps else x.to(kind)


def _constant(a: Attributes) -> Tensor:
    if "value" in a:
        return tensor(a["value"])
    (value,) = a.values()
    kind = torch.float64 if isinstance(np.asarray(value).flat[0], np.floating) else torch.int64
    return torch.tensor(value, dtype=kind)


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = tensor(a["value"]).reshape(()) if "value" in a else torch.zeros((), dtype=torch.float64)
    return value.expand(_ints(shape)).clone()


def _gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.dim()
    indices = torch.where(indices < 0, indices + x.shape[axis], indices)
    picked = x.index_select(axis, indices.reshape(-1))
    return picked.reshape([*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]])


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    which = _axes(a, x, axes)
    for axis in sorted(i % (x.dim() + len(which)) for i in which):
        x = x.unsqueeze(axis)
    return x


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    given = axes is not None or "axes" in a
    which = _axes(a, x, axes) if given else [i for i, size in enumerate(x.shape) if size == 1]
    for axis in sorted((i % x.dim() for i in which), reverse=True):
        x = x.squeeze(axis)
    return x


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    if sizes is None:
        return torch.chunk(x, a["num_outputs"], a.get("axis", 0))
    return torch.split(x, _ints(sizes), a.get("axis", 0))


def _div(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


def _resize(
    a: Attributes, x: Tensor, roi: Tensor | None = None,
    scales: Tensor | None = None, sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    mode = a.get("mode", b"nearest").decode()
    where = a.get("coordinate_transformation_mode", b"half_pixel").decode()
    if sizes is not None and sizes.numel():
        size = _ints(sizes)[2:]
    else:
        assert scales is not None
        size = [int(n * s) for n, s in zip(x.shape[2:], scales.tolist()[2:], strict=True)]
    if mode == "nearest" and where == "asymmetric":
        return F.interpolate(x, size, mode="nearest")
    linear = {1: "linear", 2: "bilinear"}[x.dim() - 2]
    known = {"align_corners": True, "half_pixel": False, "pytorch_half_pixel": False}
    if mode == "linear" and where in known:
        return F.interpolate(x, size, mode=linear, align_corners=known[where])
    if mode == "cubic" and where in known and a.get("cubic_coeff_a", -0.75) == -0.75:
        return F.interpolate(x, size, mode="bicubic", align_corners=known[where])
    raise RunError(f"export: Resize: {mode} with {where} is not known in export/operators.py")


def _product(x: Tensor, dim: list[int], keepdim: bool) -> Tensor:
    for axis in sorted((d % x.dim() for d in dim), reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _cumulative(a: Attributes, x: Tensor, axis: Tensor) -> Tensor:
    if a.get("exclusive", 0) or a.get("reverse", 0):
        raise RunError("export: CumSum: must be neither exclusive nor reverse")
    return x.cumsum(int(axis))


def _top(a: Attributes, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    found = torch.topk(x, int(count), a.get("axis", -1), bool(a.get("largest", 1)))
    return found.values, found.indices


def _triangle(a: Attributes, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    k = 0 if diagonal is None else int(diagonal)
    return x.triu(k) if a.get("upper", 1) else x.tril(k)


def _grid_sample(a: Attributes, x: Tensor, grid: Tensor) -> Tensor:
    mode, padding = a.get("mode", b"bilinear"), a.get("padding_mode", b"zeros")
    return F.grid_sample(x, grid, mode.decode(), padding.decode(), bool(a.get("align_corners", 0)))


def _recurrent(cell: Callable[..., tuple[Tensor, ...]], states: int) -> Operator:
    """Return an operator that runs a cell along the first dimension, in one or two directions."""

    def apply(
        a: Attributes, x: Tensor, weight: Tensor, recurrence: Tensor, bias: Tensor | None = None,
        lengths: Tensor | None = None, *first: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        size, directions = a["hidden_size"], len(weight)
        backwards = {b"forward": [False], b"reverse": [True], b"bidirectional": [False, True]}
        zeros = x.new_zeros(directions, x.shape[1], size)
        given = [zeros if s is None else s for s in (*first, *[None] * states)[:states]]
        outputs, last = [], []
        for d, back in enumerate(backwards[a.get("direction", b"forward")]):
            state = tuple(s[d] for s in given)
            biases = bias[d] if bias is not None else x.new_zeros(2 * weight.shape[1])
            steps = []
            for one in x.flip(0) if back else x:
                sums = F.linear(one, weight[d], biases[: weight.shape[1]])
                inner = F.linear(state[0], recurrence[d], biases[weight.shape[1] :])
                state = cell(a, sums, inner, *state)
                steps.append(state[0])
            outputs.append(torch.stack(steps).flip(0) if back else torch.stack(steps))
            last.append(state)
        return torch.stack(outputs, 1), *(torch.stack(s) for s in zip(*last, strict=True))

    return apply


def _lstm_cell(a: Attributes, sums: Tensor, inner: Tensor, h: Tensor, c: Tensor) -> Any:
    i, o, f, g = (sums + inner).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(a: Attributes, sums: Tensor, inner: Tensor, h: Tensor) -> Any:
    if not a.get("linear_before_reset", 0):
        raise RunError("export: GRU: linear_before_reset must be 1, as PyTorch has it")
    (z, r, n), (iz, ir, im) = sums.chunk(3, 1), inner.chunk(3, 1)
    z, n = (z + iz).sigmoid(), (n + (r + ir).sigmoid() * im).tanh()
    return ((1 - z) * n + z * h,)


def _rnn_cell(a: Attributes, sums: Tensor, inner: Tensor, h: Tensor) -> Any:
    relu = a.get("activations", [b"Tanh"])[0] == b"Relu"
    return ((sums + inner).relu() if relu else (sums + inner).tanh(),)


OPERATORS: dict[str, Operator] = {
    "Abs": lambda a, x: x.abs(),
    "Add": lambda a, x, y: x + y,
    "And": lambda a, x, y: x & y,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "BipolarQuant": lambda a, x, scale: torch.where(x >= 0, 1.0, -1.0).double() * scale,
    "Cast": _cast,
    "Ceil": lambda a, x: x.ceil(),
    "Celu": lambda a, x: F.celu(x, a.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": lambda a, x: x.cos(),
    "CumSum": _cumulative,
    "DepthToSpace": _depth_to_space,
    "DequantizeLinear": _dequantize_linear,
    "Div": _div,
    "Einsum": lambda a, *x: torch.einsum(a["equation"].decode(), *x),
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Equal": lambda a, x, y: x == y,
    "Erf": lambda a, x: torch.erf(x),
    "Exp": lambda a, x: x.exp(),
    "Expand": lambda a, x, shape: x * torch.ones(_ints(shape), dtype=x.dtype),
    "Flatten": _flatten,
    "Floor": lambda a, x: x.floor(),
    "GRU": _recurrent(_gru_cell, 1),
    "Gather": _gather,
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda a, x: x.amax(list(range(2, x.dim())), keepdim=True),
    "Greater": lambda a, x, y: x > y,
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": lambda a, x: x * (x / 6 + 0.5).clamp(0, 1),
    "Identity": lambda a, x: x,
    "InstanceNormalization": _instance_norm,
    "LSTM": _recurrent(_lstm_cell, 2),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Less": lambda a, x, y: x < y,
    "LessOrEqual": lambda a, x, y: x <= y,
    "Log": lambda a, x: x.log(),
    "LogSoftmax": lambda a, x: torch.log_softmax(x, a.get("axis", -1)),
    "MatMul": lambda a, x, y: x @ y,
    "Max": _extreme(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _extreme(torch.minimum),
    "Mish": lambda a, x: F.mish(x),
    "Mod": _modulo,
    "Mul": lambda a, x, y: x * y,
    "Neg": lambda a, x: -x,
    "Not": lambda a, x: ~x,
    "Or": lambda a, x, y: x | y,
    "PRelu": lambda a, x, slope: torch.where(x >= 0, x, slope * x),
    "Pad": _pad,
    "Pow": lambda a, x, y: x**y,
    "Quant": _quant,
    "QuantizeLinear": _quantize_linear,
    "RNN": _recurrent(_rnn_cell, 1),
    "Range": lambda a, start, end, step: torch.arange(int(start), int(end), int(step)),
    "Reciprocal": lambda a, x: 1 / x,
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "Relu": lambda a, x: x.clamp_min(0),
    "Reshape": _reshape,
    "Resize": _resize,
    "Selu": lambda a, x: F.selu(x),
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end", None)]),
    "Sigmoid": lambda a, x: torch.sigmoid(x),
    "Sign": lambda a, x: x.sign(),
    "Sin": lambda a, x: x.sin(),
    "Size": lambda a, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "Softplus": lambda a, x: torch.log1p(torch.exp(-x.abs())) + x.clamp_min(0),
    "Softsign": lambda a, x: F.softsign(x),
    "Split": _split,
    "Sqrt": lambda a, x: torch.sqrt(x),
    "Squeeze": _squeeze,
    "Sub": lambda a, x, y: x - y,
    "Tanh": lambda a, x: torch.tanh(x),
    "Tile": lambda a, x, repeats: x.repeat(_ints(repeats)),
    "TopK": _top,
    "Transpose": lambda a, x: x.permute(a.get("perm", list(reversed(range(x.dim()))))),
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}
