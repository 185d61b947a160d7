"""Which tensors can have no negative value: those are quantized with all levels on one side."""

from typing import Any

from torch import fx, nn

from sdq.tracer import inside
from sdq.tracing import INPUT_SHAPE

_NEVER_NEGATIVE: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus,
)  # fmt: skip
_KEEPS_SIGN: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Unflatten,
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Upsample, nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.ZeroPad2d,
    nn.ReflectionPad2d, nn.ReplicationPad2d,
)  # fmt: skip
_NEVER_NEGATIVE_CALLS = {
    "relu", "relu_", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square",
    "exp",
}  # fmt: skip
_KEEPS_SIGN_OF_ALL = {"cat", "concat", "stack", "add", "iadd", "mul", "imul"}
_KEEPS_SIGN_OF_THE_FIRST = {
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "boolean_dispatch", "flatten", "mean", "sum",
    "view", "reshape", "contiguous", "getitem", "dropout", "squeeze", "unsqueeze", "permute",
    "transpose", "movedim", "pad", "amax", "clone", "interpolate", "pixel_shuffle",
    "channel_shuffle", "chunk", "split", "unbind", "roll", "expand", "repeat",
}  # fmt: skip
"""Their other arguments are sizes, as in ``x.view(x.size(0), -1)``."""
_UNLESS_NEGATIVE_NUMBER = {"add", "iadd", "mul", "imul", "pad"}


def never_negative(net: nn.Module, node: fx.Node) -> bool:
    """Tell from the graph alone whether a tensor can have no negative value.

    Args:
        net: the traced network.
        node: of its graph.
    """
    return _never_negative(net, node, {})


def _never_negative(net: nn.Module, node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    if node not in known:
        known[node] = False  # while it is being asked
        always, keeps = _of_operation(net, node)
        sources = node.all_input_nodes
        if _name(node) in _KEEPS_SIGN_OF_THE_FIRST:
            sources = sources[:1]
        known[node] = always or (
            keeps and bool(sources) and all(_never_negative(net, s, known) for s in sources)
        )
    return known[node]


def _of_operation(net: nn.Module, node: fx.Node) -> tuple[bool, bool]:
    """Return whether the result is never negative, and whether it is not if no input is."""
    if node.op == "call_module":
        return _of_module(net.get_submodule(str(node.target)), node.meta.get(INPUT_SHAPE))
    if node.op not in ("call_function", "call_method"):
        return False, False
    name = _name(node)
    always = name in _NEVER_NEGATIVE_CALLS
    keeps = name in _KEEPS_SIGN_OF_ALL or name in _KEEPS_SIGN_OF_THE_FIRST
    if name in _UNLESS_NEGATIVE_NUMBER:  # as in relu(x) - 1, written x + (-1)
        numbers: tuple[Any, ...] = (*node.args, *node.kwargs.values())
        keeps = not any(isinstance(n, int | float) and n < 0 for n in numbers)
    if name in ("clamp", "clip", "clamp_min", "hardtanh"):
        low = node.kwargs.get("min", node.kwargs.get("min_val", (*node.args[1:2], None)[0]))
        always = isinstance(low, int | float) and low >= 0
    if name == "interpolate":  # a cubic overshoots
        keeps = "bicubic" not in (*node.args, *node.kwargs.values())
    return always, keeps


def _name(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", ""))


def _of_module(module: nn.Module, shape: tuple[int, ...] | None) -> tuple[bool, bool]:
    kind = type(module)
    if module._forward_hooks or module._forward_pre_hooks:  # may do anything
        return False, False
    if kind in _NEVER_NEGATIVE:
        return True, False
    if isinstance(module, nn.Hardtanh):
        return module.min_val >= 0, False
    if isinstance(module, nn.Upsample):
        return False, module.mode != "bicubic"
    if kind in _KEEPS_SIGN:
        return False, True
    if kind.__module__.startswith("torch.nn"):
        return False, False
    return _of_whole(module, shape)


def _of_whole(module: nn.Module, shape: tuple[int, ...] | None) -> tuple[bool, bool]:
    """Look into a module of the user's that is kept whole, if torch.fx can follow it."""
    net = inside(module, shape)
    if net is None:
        return False, False
    (result,) = next(n for n in net.graph.nodes if n.op == "output").args
    if not isinstance(result, fx.Node):
        return False, False
    inputs = {n: True for n in net.graph.nodes if n.op == "placeholder"}
    negative = dict.fromkeys(inputs, False)
    always = _never_negative(net, result, negative)
    return always, _never_negative(net, result, inputs)
