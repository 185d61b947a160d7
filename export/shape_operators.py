"""ONNX operators that move, pick or gather values: shapes, parts, reductions, sorting.

Each takes the node's attributes and its inputs; see :mod:`export.operators`.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.operands import Attributes, Operator, ints, tensor
from sdq.errors import RunError


def _axes(a: Attributes, x: Tensor, axes: Tensor | None) -> list[int]:
    found = a.get("axes", None) if axes is None else ints(axes)
    return list(range(x.dim())) if found is None else list(found)


def _reduce(function: Callable[..., Tensor]) -> Operator:
    def apply(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        return function(x, dim=_axes(a, x, axes), keepdim=bool(a.get("keepdims", 1)))

    return apply


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


def _slice(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor,
    axes: Tensor | None = None, steps: Tensor | None = None,
) -> Tensor:  # fmt: skip
    which = ints(axes) if axes is not None else list(range(starts.numel()))
    stride = ints(steps) if steps is not None else [1] * len(which)
    for start, end, axis, step in zip(ints(starts), ints(ends), which, stride, strict=True):
        indices = range(x.shape[axis])[start:end:step]  # clamps as ONNX does
        x = x.index_select(axis, torch.tensor(list(indices), dtype=torch.int64))
    return x


def _pad(
    a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    which = [i % x.dim() for i in (ints(axes) if axes is not None else range(x.dim()))]
    amounts = ints(pads)
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
    sizes = ints(shape)
    if not a.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    rows = int(np.prod(x.shape[:axis]))
    return x.reshape(rows, -1)


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
    return torch.split(x, ints(sizes), a.get("axis", 0))


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    if a.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, a["blocksize"])
    n, c, h, w = x.shape
    size = a["blocksize"]
    x = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // size**2, h * size, w * size)


def _triangle(a: Attributes, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    k = 0 if diagonal is None else int(diagonal)
    return x.triu(k) if a.get("upper", 1) else x.tril(k)


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = tensor(a["value"]).reshape(()) if "value" in a else torch.zeros((), dtype=torch.float64)
    return value.expand(ints(shape)).clone()


SHAPE_OPERATORS: dict[str, Operator] = {
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative,
    "DepthToSpace": _depth_to_space,
    "Expand": lambda a, x, shape: x * torch.ones(ints(shape), dtype=x.dtype),
    "Flatten": _flatten,
    "Gather": _gather,
    "Pad": _pad,
    "Range": lambda a, start, end, step: torch.arange(int(start), int(end), int(step)),
    "ReduceL2": _reduce(torch.linalg.vector_norm),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "Reshape": _reshape,
    "Shape": lambda a, x: torch.tensor(x.shape[a.get("start", 0) : a.get("end", None)]),
    "Size": lambda a, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": lambda a, x, repeats: x.repeat(ints(repeats)),
    "TopK": _top,
    "Transpose": lambda a, x: x.permute(a.get("perm", list(reversed(range(x.dim()))))),
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
}
