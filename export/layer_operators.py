"""ONNX operators that are layers: convolutions, products, norms, pools, resizing, recurrent cells.

Each takes the node's attributes and its inputs; see :mod:`export.operators`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from export.operands import Attributes, Operator, along, ints, number
from sdq.errors import RunError


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
    weight, bias, mean, variance = (along(1, x, p) for p in parameters)
    return (x - mean) / torch.sqrt(variance + a.get("epsilon", 1e-5)) * weight + bias


def _instance_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, list(range(2, x.dim())), correction=0, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + a.get("epsilon", 1e-5))
    return normal * along(1, x, weight) + along(1, x, bias)


def _layer_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    axes = list(range(a.get("axis", -1) % x.dim(), x.dim()))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    normal = (x - mean) / torch.sqrt(variance + a.get("epsilon", 1e-5)) * weight
    return normal if bias is None else normal + bias


def _group_norm(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, a["num_groups"], weight, bias, a.get("epsilon", 1e-5))


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


def _resize(
    a: Attributes, x: Tensor, roi: Tensor | None = None,
    scales: Tensor | None = None, sizes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    mode = a.get("mode", b"nearest").decode()
    where = a.get("coordinate_transformation_mode", b"half_pixel").decode()
    to: dict[str, Any]
    if sizes is not None and sizes.numel():
        to = {"size": ints(sizes)[2:]}
    else:
        assert scales is not None
        # not the sizes that come of them: 1.7 of 9 is 15, but steps of 1 / 1.7, not of 9 / 15
        factors = [number(s) for s in scales.tolist()[2:]]
        to = {"scale_factor": factors, "recompute_scale_factor": False}
    if mode == "nearest" and where == "asymmetric":
        return F.interpolate(x, **to, mode="nearest")
    linear = {1: "linear", 2: "bilinear"}[x.dim() - 2]
    known = {"align_corners": True, "half_pixel": False, "pytorch_half_pixel": False}
    if mode == "linear" and where in known:
        return F.interpolate(x, **to, mode=linear, align_corners=known[where])
    if mode == "cubic" and where in known and a.get("cubic_coeff_a", -0.75) == -0.75:
        return F.interpolate(x, **to, mode="bicubic", align_corners=known[where])
    raise RunError(f"export: Resize: {mode} with {where} is not known in export/layer_operators.py")


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


LAYER_OPERATORS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "GRU": _recurrent(_gru_cell, 1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean(list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda a, x: x.amax(list(range(2, x.dim())), keepdim=True),
    "GridSample": _grid_sample,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LSTM": _recurrent(_lstm_cell, 2),
    "LayerNormalization": _layer_norm,
    "MaxPool": _max_pool,
    "RNN": _recurrent(_rnn_cell, 1),
    "Resize": _resize,
}
