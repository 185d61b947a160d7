"""Batch normalisation that training leaves alone: folded into the layer before, or frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights

from sdq.tracing import KINDS


class FrozenBatchNorm(nn.Module):
    """A batch normalisation with fixed statistics and factors; its state has the same names.

    Args:
        norm: in evaluation mode it computes the same.
    """

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            tensor = getattr(norm, name)
            self.register_buffer(name, None if tensor is None else tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)``."""
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )


def settle_(net: fx.GraphModule, *, fold: bool) -> None:
    """Take batch normalisation out of training.

    One whose statistics are those of the batch, in evaluation too, is left as it is.

    Args:
        net: traced, with nothing quantized yet; changed in place.
        fold: into the weights of the layer before, where nothing else reads or shares what that
            layer computes with; the others are frozen.
    """
    for node in list(net.graph.nodes):
        norm = _module(net, node)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        source = node.args[0] if node.args else node.kwargs["input"]
        if fold and _foldable(net, source, node):
            _fold_(net.get_submodule(str(source.target)), norm)
            node.replace_all_uses_with(source)
            net.graph.erase_node(node)
        else:
            net.set_submodule(str(node.target), FrozenBatchNorm(norm))
    net.delete_all_unused_submodules()
    net.recompile()


def _module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(net: fx.GraphModule, source: fx.Node, norm: fx.Node) -> bool:
    layer = _module(net, source)
    if layer is None or type(layer) not in KINDS or list(source.users) != [norm]:
        return False
    calls = [n.target for n in net.graph.nodes if n.op == "call_module"]
    weight = layer.weight
    shared = sum(weight is p for m in net.modules() for p in m.parameters(recurse=False)) > 1
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
    return (
        not shared
        and calls.count(source.target) == calls.count(norm.target) == 1
        and not (transposed and layer.groups != 1)  # no factor there belongs to one output channel
    )


@torch.no_grad()
def _fold_(layer: nn.Module, norm: _BatchNorm) -> None:
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, nn.Parameter)
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        new = fuse_linear_bn_weights(weight, bias, *statistics)  # type: ignore[arg-type]
    else:
        transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
        new = fuse_conv_bn_weights(weight, bias, *statistics, transpose=transposed)  # type: ignore[arg-type]
    layer.weight, layer.bias = new
