"""Where activations are quantized: at what enters a layer, and if asked wherever hardware stores.

Integer hardware adds and concatenates codes, so the operands must mean the same by a code: they
have one scale. A product's scale is the product of its operands', which may differ. An average or
an interpolation takes codes, leaves their grid and is brought back to one. A maximum pooling, a
flattening, a repetition of pixels passes codes on: what they read is quantized, and not what they
give, which would be the same numbers.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sdq.modes import evaluating

_TOGETHER = {
    operator.add, operator.sub, torch.add, torch.sub, torch.cat, torch.concat, torch.stack,
    torch.maximum, torch.minimum, "add", "sub", "maximum", "minimum",
}  # fmt: skip
_EACH = {operator.mul, torch.mul, torch.matmul, operator.matmul, "mul", "matmul"}
_LEAVES_THE_GRID = {
    F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.interpolate,
    torch.mean, "mean",
}  # fmt: skip
_MODULES_THAT_LEAVE = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.Upsample,
)  # fmt: skip
_PASSES_ON = {
    F.max_pool1d, F.max_pool2d, torch.flatten, torch.squeeze, torch.unsqueeze, "flatten", "view",
    "reshape", "squeeze", "unsqueeze", "contiguous",
}  # fmt: skip
_MODULES_THAT_PASS_ON = (
    nn.MaxPool1d, nn.MaxPool2d, nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d,
    nn.Dropout2d,
)  # fmt: skip


@dataclass(frozen=True)
class ActGroup:
    """Tensors that are quantized with one scale.

    Args:
        sources: the nodes that make them, in execution order.
        readers: the quantizable layers that read each.
    """

    sources: tuple[fx.Node, ...]
    readers: dict[fx.Node, tuple[str, ...]]

    @property
    def layers(self) -> tuple[str, ...]:
        """All layers that read one of the tensors."""
        return tuple(dict.fromkeys(name for names in self.readers.values() for name in names))


def act_groups(
    net: fx.GraphModule, layers: set[str], integer_datapath: bool, sample: Tensor
) -> list[ActGroup]:
    """Return what is quantized, in execution order.

    Args:
        net: traced, with nothing quantized yet.
        layers: paths of the quantizable layers.
        integer_datapath: see :class:`~sdq.config.QuantConfig`.
        sample: an input ``(N, ...)``.
    """
    readers: dict[fx.Node, list[str]] = {}
    for node in net.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            source = node.args[0] if node.args else node.kwargs["input"]
            source = _maker(net, source) if integer_datapath else source
            readers.setdefault(source, []).append(str(node.target))
    together: dict[fx.Node, fx.Node] = {source: source for source in readers}
    if integer_datapath:
        for stored in _stored(net, _float_tensors(net, sample)):
            nodes = [_maker(net, node) for node in stored]
            for node in nodes:
                together.setdefault(node, node)
                together[_root(together, node)] = _root(together, nodes[0])
    members: dict[fx.Node, list[fx.Node]] = {}
    for node in net.graph.nodes:
        if node in together:
            members.setdefault(_root(together, node), []).append(node)
    return [
        ActGroup(tuple(nodes), {n: tuple(dict.fromkeys(readers.get(n, ()))) for n in nodes})
        for nodes in members.values()
    ]


def _root(together: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    while together[node] is not node:
        node = together[node]
    return node


def _maker(net: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node that made the values a node has; the node itself if that is the input.

    What is done to the network's input before it is quantized stays outside the integer part.
    """
    source = origin(net, node)
    return node if source.op == "placeholder" else source


def origin(net: nn.Module, node: fx.Node) -> fx.Node:
    """Return the node that made a tensor's values, behind all that only passes them on."""
    while passes_on(net, node):
        node = node.all_input_nodes[0]
    return node


def passes_on(net: nn.Module, node: fx.Node) -> bool:
    """Tell whether a node's values are its input's, or some of them, once training is over."""
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        return isinstance(module, _MODULES_THAT_PASS_ON) or _repeats_pixels(module)
    if node.target is F.interpolate:
        return (node.args[3] if len(node.args) > 3 else node.kwargs.get("mode")) in (
            None, "nearest"
        )  # fmt: skip
    return node.op in ("call_function", "call_method") and node.target in _PASSES_ON


def _repeats_pixels(module: nn.Module) -> bool:
    return isinstance(module, nn.Upsample) and module.mode == "nearest"


def _stored(net: fx.GraphModule, tensors: set[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield tensors that need a scale, each time those that need the same."""
    for node in net.graph.nodes:
        if node not in tensors:
            continue
        if passes_on(net, node):
            continue
        operands = [source for source in node.all_input_nodes if source in tensors]
        if node.op == "call_module":
            if isinstance(net.get_submodule(str(node.target)), _MODULES_THAT_LEAVE):
                yield from ([stored] for stored in (*operands, node))
        elif node.target in _LEAVES_THE_GRID:
            yield from ([stored] for stored in (*operands, node))
        elif node.target in _TOGETHER and operands:
            cat = node.target in (torch.cat, torch.concat, torch.stack)
            yield [*operands, node] if cat else operands
        elif node.target in _EACH:
            yield from ([source] for source in operands)


class _Watch(fx.Interpreter):
    """Notes which nodes make a floating-point tensor out of the input."""

    def __init__(self, net: fx.GraphModule) -> None:
        super().__init__(net, garbage_collect_values=True)
        self.found: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        made = n.op in ("placeholder", "call_function", "call_method", "call_module")
        if made and isinstance(result, Tensor) and result.is_floating_point():
            self.found.add(n)
        return result


@torch.no_grad()
def _float_tensors(net: fx.GraphModule, sample: Tensor) -> set[fx.Node]:
    watch = _Watch(net)
    with evaluating(net):
        watch.run(sample)
    return watch.found
