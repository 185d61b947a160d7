"""Which convolutions and linear layers FINN has."""

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from export.findings import Finding
from export.network_graph import NetworkGraph
from sdq.layers import LayerSpec
from sdq.policy import FLOAT_BITS


def findings(graph: NetworkGraph, node: fx.Node, layer: LayerSpec) -> list[Finding]:
    """Return what FINN cannot take in a layer, apart from what it reads."""
    return [Finding(layer.name, *found) for found in _broken(graph, node, layer)]


def _broken(graph: NetworkGraph, node: fx.Node, layer: LayerSpec) -> Iterator[tuple[str, str, str]]:
    """Yield each rule that is broken, what is there instead, and the repair."""
    module: Any = graph.module(node)
    if graph.qmodel.policy[layer.name].weight_bits == FLOAT_BITS:
        whole = layer.kind == "float"
        yield (
            "must have quantized weights",
            f"a {type(module).__name__} left in float",
            "drop --skip for it, or build it of convolutions, linear layers and nn.ReLU" if whole
            else "leave out --skip, --pin ...=32 or --first-last-bits 32 that keeps it so",
        )  # fmt: skip
        return
    if sum(n.op == "call_module" and n.target == node.target for n in graph.nodes) > 1:
        yield (
            "must be called once, for a layer has hardware of its own",
            "a layer that is called several times",
            "give each call a layer of its own",
        )
    if layer.kind.startswith("conv_transpose"):
        yield (
            "must be a convolution",
            f"a {_name(module)}",
            "use nn.Upsample(scale_factor=2, mode='nearest') and nn.Conv2d",
        )
    elif layer.kind == "conv1d":
        yield "must be nn.Conv2d or nn.Linear", "a Conv1d", "use nn.Conv2d on a height of 1"
    elif layer.kind == "conv2d":
        yield from _convolution(module)


def _convolution(module: Any) -> Iterator[tuple[str, str, str]]:
    channels, groups = module.in_channels, module.groups
    if groups != 1 and not groups == channels == module.out_channels:
        yield (
            "must have one group, or as many as channels in and out",
            f"{groups} groups of {channels} channels to {module.out_channels}",
            f"use groups=1, or {channels} channels out with groups={channels}",
        )
    if module.padding_mode != "zeros":
        yield (
            "must pad with zeros",
            f"padding_mode={module.padding_mode!r}",
            "use padding_mode='zeros'",
        )


def _name(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Quant")
