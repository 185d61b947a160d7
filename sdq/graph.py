"""The traced network before anything is quantized: its layers, and insertion into it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sdq.between import between, fork
from sdq.errors import RequestError
from sdq.layers import Between, LayerSpec
from sdq.modes import evaluating
from sdq.refusals import KINDS, has_layers


def measure(net: fx.GraphModule, sample: Tensor) -> tuple[LayerSpec, ...]:
    """Run a sample ``(N, C, H, W)`` through; return the layers in execution order.

    A module that was kept whole and has layers in it is one layer of kind ``float``; its MACs are
    those that torch counts.

    Raises:
        RequestError: there is nothing to quantize.
    """
    watch = _Calls(net)
    with evaluating(net), torch.no_grad():
        watch.run(sample)
    calls = watch.calls
    if not any(type(net.get_submodule(path)) in KINDS for path in calls):
        raise RequestError(
            "model: must have a convolution or linear layer to quantize, got "
            + (", ".join(sorted({type(m).__name__ for m in net.children()})) or "no layers")
        )
    return tuple(
        replace(_spec(path, net.get_submodule(path), calls[path]), before=watch.before[path])
        for path in calls
    )


class _Calls(fx.Interpreter):
    """Notes what layers are called with, what they give, and what stands before each."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net)
        self.calls: dict[str, list[tuple[Any, Any, Any]]] = {}
        self.before: dict[str, tuple[Between, ...]] = {}
        self._since: list[Between] = []

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and note what it is."""
        output = super().run_node(n)
        if n.op == "call_module" and has_layers(self.fetch_attr(str(n.target))):
            self.before.setdefault(str(n.target), tuple(self._since))
            self._since = []
        else:
            module = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            self._since += between(n, module, args, kwargs, output)
        self._since += fork(n, output)
        return output

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        output = super().call_module(target, args, kwargs)
        if has_layers(self.fetch_attr(target)):
            self.calls.setdefault(str(target), []).append((args, kwargs, output))
        return output


def _spec(path: str, module: nn.Module, calls: list[Any]) -> LayerSpec:
    (args, kwargs, output), *_ = calls
    inputs = _tensors(args, kwargs)
    outputs = output if isinstance(output, tuple | list) else (output,)
    in_shape = tuple(inputs[0].shape[1:]) if inputs else ()
    out_shape = next((tuple(x.shape[1:]) for x in outputs if isinstance(x, Tensor)), ())
    kind = KINDS.get(type(module), "float")
    if kind == "float":
        count = sum(p.numel() for p in module.parameters())
        macs = sum(_macs(module, args, kwargs) for args, kwargs, _ in calls)
        return LayerSpec(path, kind, (count, 1), in_shape, out_shape, macs, False)
    weight = module.weight
    assert isinstance(weight, Tensor)
    if kind.startswith("conv_transpose"):
        channels, groups = module.out_channels, module.groups
        assert isinstance(channels, int)
        assert isinstance(groups, int)
        shape = (channels, weight.shape[0] // groups, *weight.shape[2:])
        # every input element takes one multiply for each weight of its channel
        given = [_tensors(args, kwargs)[0] for args, kwargs, _ in calls]
        macs = sum(x[0].numel() * weight[0].numel() for x in given)
    else:
        shape = tuple(weight.shape)
        # every output element takes one multiply for each weight of its channel
        macs = sum(y[0].numel() * weight[0].numel() for _, _, y in calls)
    found = LayerSpec(path, kind, shape, in_shape, out_shape, macs, module.bias is not None)
    return replace(found, **_geometry(module)) if kind != "linear" else found


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that a module is called with."""
    return [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]


def _geometry(module: Any) -> dict[str, Any]:
    """Return stride, padding (both sides together) and dilation of a convolution."""
    if isinstance(module.padding, str):  # "same" needs what the window takes away
        windows = zip(module.kernel_size, module.dilation, strict=True)
        taken = tuple(dilation * (side - 1) for side, dilation in windows)
        padding = taken if module.padding == "same" else (0,) * len(taken)
    else:
        padding = tuple(2 * side for side in module.padding)
    return {"stride": module.stride, "padding": padding, "dilation": module.dilation}


def _macs(module: nn.Module, args: Any, kwargs: Any) -> int:
    """Return the multiply-accumulates of a module for one sample, as far as torch counts them."""
    samples = next((len(x) for x in _tensors(args, kwargs)), 1)
    # the fused kernels of recurrent layers and attention hide what they multiply
    with (
        warnings.catch_warnings(action="ignore", category=UserWarning),  # of kernels not there
        torch.no_grad(), unfused_attention(), sdpa_kernel(SDPBackend.MATH),
        torch.backends.mkldnn.flags(enabled=False), FlopCounterMode(display=False) as counter,
    ):  # fmt: skip
        module(*args, **kwargs)
    flops: int = counter.get_total_flops()
    return flops // (2 * max(samples, 1))


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` compute by operations that others know, for a while."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


def insert_after(net: fx.GraphModule, source: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Let everything that reads ``source`` read ``module(source)`` instead."""
    while _has_submodule(net, name):  # a layer called twice has two inputs
        name += "_again"
    net.add_submodule(name, module)
    with net.graph.inserting_after(source):
        new = net.graph.call_module(name, (source,))
    for user in list(source.users):
        if user is not new:
            user.replace_input_with(source, new)
    return new


def _has_submodule(net: fx.GraphModule, name: str) -> bool:
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True
