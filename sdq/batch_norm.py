"""Batch normalisation that training leaves alone: folded into the layer before, or frozen."""

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights, fuse_linear_bn_weights

from sdq.modes import evaluating
from sdq.refusals import KINDS


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


class FrozenWhole(nn.Module):
    """A subclass of batch normalisation that does more, kept as it is in evaluation.

    Args:
        norm: its parameters become buffers.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        # in a tuple, so that nobody finds a batch normalisation to train or to estimate anew
        self._inside = (norm.eval(),)
        for module in norm.modules():
            for name, parameter in list(module._parameters.items()):
                del module._parameters[name]
                module.register_buffer(name, None if parameter is None else parameter.detach())
        for path, tensor in norm.named_buffers():
            self.register_buffer(path.replace(".", "_"), tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``(N, C, ...)``."""
        (norm,) = self._inside
        for path, _ in list(norm.named_buffers()):  # those here may have been moved or cast
            owner, _, name = path.rpartition(".")
            norm.get_submodule(owner)._buffers[name] = getattr(self, path.replace(".", "_"))
        result: Tensor = norm(x)
        return result


def settle_(net: fx.GraphModule, sample: Tensor, *, fold: bool) -> None:
    """Take batch normalisation out of training, in modules that are kept whole too.

    One whose statistics are those of the batch, in evaluation too, is left as it is.

    Args:
        net: traced, with nothing quantized yet; changed in place.
        sample: an input ``(N, C, H, W)``, for shapes only.
        fold: into the weights of the layer before, where nothing else reads or shares what that
            layer computes with; the others are frozen.
    """
    if fold:
        with evaluating(net), torch.no_grad():
            ShapeProp(net).propagate(sample)
    for node in list(net.graph.nodes):
        norm = _module(net, node)
        source = node.args[0] if node.args else node.kwargs.get("input")
        if fold and _is_plain(norm) and _foldable(net, source, node):
            assert isinstance(norm, _BatchNorm)
            _fold_(net.get_submodule(str(source.target)), norm)
            node.replace_all_uses_with(source)
            net.graph.erase_node(node)
    net.delete_all_unused_submodules()
    for path, norm in list(net.named_modules()):
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None:
            kind = FrozenBatchNorm if _is_plain(norm) else FrozenWhole
            net.set_submodule(path, kind(norm))
    net.recompile()


def _is_plain(norm: nn.Module | None) -> bool:
    """Tell whether it is a batch normalisation of torch's that keeps statistics."""
    return (
        isinstance(norm, _BatchNorm)
        and norm.running_mean is not None
        and type(norm).__module__.startswith("torch.nn")
    )


def _module(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    return net.get_submodule(str(node.target)) if node.op == "call_module" else None


def _foldable(net: fx.GraphModule, source: fx.Node, norm: fx.Node) -> bool:
    layer = _module(net, source)
    if layer is None or type(layer) not in KINDS or list(source.users) != [norm]:
        return False
    if isinstance(layer, nn.Linear) and len(source.meta["tensor_meta"].shape) != 2:
        return False  # what is normalised is the second dimension, and not the layer's features
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
    assert norm.running_mean is not None
    one, zero = torch.ones_like(norm.running_mean), torch.zeros_like(norm.running_mean)
    factors = (one, zero) if norm.weight is None else (norm.weight, norm.bias)
    statistics = (norm.running_mean, norm.running_var, norm.eps, *factors)
    if isinstance(layer, nn.Linear):
        new = fuse_linear_bn_weights(weight, bias, *statistics)  # type: ignore[arg-type]
    else:
        transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
        new = fuse_conv_bn_weights(weight, bias, *statistics, transpose=transposed)  # type: ignore[arg-type]
    layer.weight, layer.bias = new
    new[1].requires_grad_(weight.requires_grad)  # torch's does not learn where there was none
