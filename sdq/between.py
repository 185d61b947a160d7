"""What a traced network does between its layers, as far as hardware is built for it."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sdq.layers import Between
from sdq.stand_ins import of_shapes

_KINDS: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.sub, operator.iadd, torch.add, torch.sub), "add"),
    **dict.fromkeys(("add", "add_", "sub"), "add"),
    **dict.fromkeys((operator.mul, torch.mul, torch.matmul, "mul", "matmul"), "multiply"),
    **dict.fromkeys((torch.cat, torch.concat, torch.stack), "concat"),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, F.max_pool1d, F.max_pool2d), "max_pool"),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, F.avg_pool1d, F.avg_pool2d), "avg_pool"),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d), "avg_pool"),
    **dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d), "avg_pool"),
    **dict.fromkeys((torch.mean, "mean"), "avg_pool"),
    **dict.fromkeys((nn.Flatten, torch.flatten, "flatten", "view", "reshape"), "flatten"),
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, F.interpolate), "upsample"),
}


def between(
    node: fx.Node, module: nn.Module | None, args: Sequence[Any], kwargs: Mapping[str, Any],
    output: Any,
) -> list[Between]:  # fmt: skip
    """Return what a node is for hardware: one operation, or none.

    Args:
        node: of the traced network.
        module: that it calls, if it calls one.
        args: that it was called with, with the sample.
        kwargs: likewise.
        output: that it gave.
    """
    kind = _KINDS.get(type(module) if module is not None else node.target)
    tensors = [x for x in _flat((*args, *kwargs.values())) if isinstance(x, Tensor)]
    if kind is None or not tensors or not isinstance(output, Tensor):
        return []
    if kind in ("add", "multiply") and len(tensors) < 2:  # with a constant: no second stream
        return []
    in_shape, out_shape = tuple(tensors[0].shape[1:]), tuple(output.shape[1:])
    if kind == "flatten" and len(out_shape) >= len(in_shape):
        return []
    if not kind.endswith("pool"):
        return [Between(kind, in_shape, out_shape)]
    sides = in_shape[1:]
    if len(out_shape) < len(in_shape) or set(out_shape[1:]) == {1}:
        kind = "global_pool" if kind == "avg_pool" else kind
    named = {**dict(zip(("input", "kernel_size", "stride", "padding"), args, strict=False))}
    named = {**named, **kwargs, **(vars(module) if module is not None else {})}
    adaptive = node.target in (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, "mean", torch.mean)
    if "kernel_size" not in named or adaptive:  # as it falls; arguments have other meanings
        outs = out_shape[1:] if len(out_shape) == len(in_shape) else (1,) * len(sides)
        stride = tuple(side // max(out, 1) for side, out in zip(sides, outs, strict=True))
        return [Between(kind, in_shape, out_shape, stride, stride, (0,) * len(sides))]
    kernel = _each(named["kernel_size"], len(sides))
    stride = _each(named.get("stride") or kernel, len(sides))
    padding = tuple(2 * p for p in _each(named.get("padding", 0), len(sides)))
    return [Between(kind, in_shape, out_shape, kernel, stride, padding)]


def fork(node: fx.Node, output: Any) -> list[Between]:
    """Return a fork if several nodes read the tensor that a node gave."""
    readers = [user for user in node.users if not of_shapes(user)]
    if len(readers) < 2 or not isinstance(output, Tensor):
        return []
    shape = tuple(output.shape[1:])
    return [Between("fork", shape, shape)]


def _each(value: Any, count: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * count


def _flat(values: Sequence[Any]) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, tuple | list) else [value]
    return found
