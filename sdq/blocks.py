"""A quantized network as a chain of blocks, each with one tensor in and one tensor out.

A plain network falls into single layers with the normalisation and activation behind them, a
residual one into its residual blocks. Where there is no such cut (a U-Net's skips reach from end to
end) more layers share a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from sdq.errors import RequestError
from sdq.quant_model import QuantModel


@dataclass(frozen=True)
class Block:
    """A part of a network.

    Args:
        module: maps the block's input to its output; its submodules are the network's own.
        layers: quantizable layers in it, in execution order.
        acts: paths of the activation quantizers in it.
    """

    module: fx.GraphModule
    layers: tuple[str, ...]
    acts: tuple[str, ...]


def split(qmodel: QuantModel) -> list[Block]:
    """Return the blocks of a network, in execution order; they share its parameters.

    A block begins before the quantizer of its input, so that the quantizer belongs to it, and has
    at least one layer. A layer that is called several times has all calls in one block.

    Raises:
        RequestError: the network has more than one input or output tensor.
    """
    graph = qmodel.net.graph
    nodes = list(graph.nodes)
    inputs = [n for n in nodes if n.op == "placeholder"]
    (result,) = nodes[-1].args
    if len(inputs) != 1 or not isinstance(result, fx.Node):
        raise RequestError(
            f"model: must map one tensor to one tensor, got {len(inputs)} inputs and an output of "
            f"type {type(result).__name__}; wrap the network"
        )
    names = {bits.name for bits in qmodel.policy}
    quantizers = set(qmodel.act_quantizers())
    blocks: list[Block] = []
    source, part = inputs[0], list[fx.Node]()
    cuts = set(_cuts(nodes, names, quantizers))
    for node in nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        part.append(node)
        if node in cuts or node is result:
            targets = [str(n.target) for n in part if n.op == "call_module"]
            blocks.append(
                Block(
                    _module(qmodel.net, source, part, node),
                    tuple(dict.fromkeys(t for t in targets if t in names)),
                    tuple(dict.fromkeys(t for t in targets if t in quantizers)),
                )
            )
            source, part = node, []
    return blocks


def _cuts(nodes: list[fx.Node], layers: set[str], quantizers: set[str]) -> Iterator[fx.Node]:
    """Yield the nodes that end a block: all that comes later needs their value alone."""
    order = {node: i for i, node in enumerate(nodes)}
    values = [n for n in nodes if n.op not in ("get_attr", "output")]
    last_use = {n: max((order[u] for u in n.users), default=-1) for n in values}
    last_call: dict[str, int] = {}
    for node in values:
        if node.op == "call_module" and node.target in layers:
            last_call[str(node.target)] = order[node]
    live: set[fx.Node] = set()
    open_layers: set[str] = set()
    for node in values:
        live = {n for n in live if last_use[n] > order[node]}
        if last_use[node] > order[node]:
            live.add(node)
        if node.op == "call_module" and node.target in layers:
            open_layers.add(str(node.target))
        begins = any(u.op == "call_module" and u.target in layers | quantizers for u in node.users)
        done = all(last_call[name] <= order[node] for name in open_layers)
        if live == {node} and begins and open_layers and done:
            yield node
            open_layers = set()


def _module(
    net: fx.GraphModule, source: fx.Node, part: list[fx.Node], result: fx.Node
) -> fx.GraphModule:
    graph = fx.Graph()
    copies = {source: graph.placeholder("x")}

    def copy(node: fx.Node) -> fx.Node:
        if node not in copies:  # a constant: each block that reads it has it
            copies[node] = graph.node_copy(node)
        return copies[node]

    for node in part:
        copies[node] = graph.node_copy(node, copy)
    graph.output(copies[result])
    module = fx.GraphModule(net, graph)
    module.eval()
    return module
