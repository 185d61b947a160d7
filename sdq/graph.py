"""The traced network before anything is quantized: tracing, shapes, signs, insertion.

Plain torch.fx; what is put into the graph is :mod:`sdq.quant_model`'s business.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from sdq.errors import RequestError
from sdq.layers import LayerSpec

_KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
}

_REFUSED = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LazyLinear,
)

_REFUSED_CALLS: dict[Any, str] = {
    getattr(nn.functional, name): f"functional.{name}"
    for name in (
        "linear", "bilinear", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    )
}  # fmt: skip

_NEVER_NEGATIVE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax)
_KEEPS_SIGN: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.Upsample,
)  # fmt: skip
_NEVER_NEGATIVE_CALLS = {"relu", "relu_", "relu6", "sigmoid", "softmax"}
_KEEPS_SIGN_CALLS = {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "boolean_dispatch", "flatten",
    "mean", "view", "reshape", "contiguous", "getitem", "cat", "add", "iadd", "mul", "dropout",
    "squeeze", "unsqueeze", "permute", "transpose", "pad", "amax",
}  # fmt: skip
_KEEPS_SIGN_UNLESS_NEGATIVE_NUMBER = {"add", "iadd", "mul", "pad"}

_DROPOUTS: dict[Any, type[nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
    nn.functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace a network; functional dropout becomes a module.

    Raises:
        RequestError: a layer that cannot be quantized yet, or control flow that depends on data.
    """
    for name, module in model.named_modules():
        if isinstance(module, _REFUSED):
            raise RequestError(
                f"model: layer {name!r} is a {type(module).__name__}, which cannot be quantized "
                f"yet; quantizable are {', '.join(k.__name__ for k in _KINDS)}"
            )
        if isinstance(module, tuple(_KINDS)) and type(module) not in _KINDS:
            raise RequestError(
                f"model: layer {name!r} is a {type(module).__name__}, whose forward may differ "
                f"from torch's; use one of {', '.join(k.__name__ for k in _KINDS)} itself"
            )
    try:
        net = fx.symbolic_trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise RequestError(
            f"model: {type(model).__name__} must be traceable by torch.fx, but its forward "
            f"depends on the data: {error}; move that out of forward"
        ) from error
    for node in net.graph.nodes:
        if node.op == "call_function" and node.target in _REFUSED_CALLS:
            raise RequestError(
                f"model: {_REFUSED_CALLS[node.target]} is called in forward ({node.name}) and "
                "would stay in float; use the module that does the same"
            )
    _module_dropout(net)
    return net


def _module_dropout(net: fx.GraphModule) -> None:
    """Turn ``F.dropout`` and its kin into modules: tracing would freeze their ``training``."""
    for node in list(net.graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            name = f"{node.name}_module"
            net.add_submodule(name, _DROPOUTS[node.target](p))
            with net.graph.inserting_after(node):
                new = net.graph.call_module(name, tuple(node.all_input_nodes))
            node.replace_all_uses_with(new)
            net.graph.erase_node(node)
    net.recompile()


def measure(net: fx.GraphModule, sample: Tensor) -> tuple[LayerSpec, ...]:
    """Run a sample ``(N, C, H, W)`` through; return the layers in execution order.

    Raises:
        RequestError: the sample does not fit, or there is nothing to quantize.
    """
    specs: dict[str, LayerSpec] = {}
    order = [str(n.target) for n in net.graph.nodes if n.op == "call_module"]
    handles = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # every output element takes one multiply for each weight of its channel
        macs = output[0].numel() * weight[0].numel()
        if name in specs:
            macs += specs[name].macs
        specs[name] = LayerSpec(
            name, _KINDS[type(module)], tuple(weight.shape), tuple(inputs[0].shape[1:]),
            tuple(output.shape[1:]), macs, module.bias is not None,
        )  # fmt: skip

    for name in dict.fromkeys(order):
        module = net.get_submodule(name)
        if type(module) in _KINDS:
            handles.append(
                module.register_forward_hook(
                    lambda m, inputs, output, name=name: note(name, m, inputs, output)
                )
            )
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            net(sample)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"model: must accept a sample of shape {tuple(sample.shape)} (N, C, H, W), "
            f"but: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    if not specs:
        raise RequestError(
            "model: must have a convolution or linear layer to quantize, got "
            + (", ".join(sorted({type(m).__name__ for m in net.children()})) or "no layers")
        )
    return tuple(specs.values())


def insert_after(net: fx.GraphModule, source: fx.Node, name: str, module: nn.Module) -> None:
    """Let everything that reads ``source`` read ``module(source)`` instead."""
    while _has_submodule(net, name):  # a layer called twice has two inputs
        name += "_again"
    net.add_submodule(name, module)
    with net.graph.inserting_after(source):
        new = net.graph.call_module(name, (source,))
    for user in list(source.users):
        if user is not new:
            user.replace_input_with(source, new)


def _has_submodule(net: fx.GraphModule, name: str) -> bool:
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True


def never_negative(net: fx.GraphModule, node: fx.Node) -> bool:
    """Tell from the graph alone whether a tensor can have no negative value."""
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        kind = type(module)
        known, keeps = kind in _NEVER_NEGATIVE, kind in _KEEPS_SIGN
        if isinstance(module, nn.Upsample) and module.mode == "bicubic":
            keeps = False  # a cubic overshoots
    elif node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else node.target.__name__
        known, keeps = name in _NEVER_NEGATIVE_CALLS, name in _KEEPS_SIGN_CALLS
        if name in _KEEPS_SIGN_UNLESS_NEGATIVE_NUMBER:  # as in relu(x) - 1, written x + (-1)
            numbers = (*node.args, *node.kwargs.values())
            keeps = not any(isinstance(n, int | float) and n < 0 for n in numbers)
    else:
        return False
    if known:
        return True
    return keeps and all(never_negative(net, source) for source in node.all_input_nodes)
