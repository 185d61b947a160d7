"""Biases as integer hardware adds them: whole multiples of the input's scale times the weight's.

A sum of products of codes is a whole number of such units, and an integer kernel starts it from the
bias's code, in 32 bits. onnxruntime rounds float biases so when it fuses a layer into an integer
kernel; a network that has rounded them itself computes the same before and after. During training
gradients pass the rounding as if it were not there.
"""

import torch
from torch import Tensor, fx, nn

from sdq.act_points import origin
from sdq.channel_bits import SettledQuantizer
from sdq.learned_scale import ActQuantizer, WeightQuantizer

LARGEST_CODE = 2**31 - 128
"""The largest float32 that 32 bits hold."""

SMALLEST_SHARE = 2.0**-16
"""A weight's scale is at least this share of its channel's bias: with an input's scale of 2^-14 or
more the bias then has a code in 32 bits. Only channels with hardly any weight come near."""


class IntegerBias(nn.Module):
    """Rounds a layer's bias. Stands where Brevitas's layers have the quantizer of their bias.

    While a scale is not settled (calibration, search, the network in float) the bias passes as it
    is.

    Args:
        layer: a Brevitas layer with a quantized weight.
        source: the module that quantizes its input.
    """

    is_quant_enabled = False  # Brevitas asks; its exporters then write the bias as a constant

    def __init__(self, layer: nn.Module, source: nn.Module) -> None:
        super().__init__()
        # in a tuple: they are the network's, and stand once in its state
        self._around = (layer, source)
        self.frozen = False

    def scale(self) -> Tensor | None:
        """Return the unit, ``(K,)`` or one value, as float32 holds it; None if not settled."""
        layer, source = self._around
        weight = layer.get_submodule("weight_quant").tensor_quant
        act = source.get_submodule("act_quant.fused_activation_quant_proxy").tensor_quant
        if not (isinstance(weight, SettledQuantizer) and isinstance(act, ActQuantizer)):
            return None
        if not act.settled:
            return None
        with torch.no_grad():
            unit = act.scale.float() * weight.scale.float().reshape(-1)
            return unit.to(act.scale.dtype)

    def codes(self, bias: Tensor) -> Tensor | None:
        """Return the bias in units, whole numbers in ``bias``'s dtype; None if not settled."""
        scale = self.scale()
        if scale is None:
            return None
        with torch.no_grad():
            return (bias / scale).round_().clamp_(-LARGEST_CODE, LARGEST_CODE)

    def forward(self, bias: Tensor, *_: Tensor) -> Tensor:
        """Round ``bias`` ``(K,)``."""
        scale = None if self.frozen else self.scale()
        if scale is None:
            return bias
        codes = self.codes(bias)
        assert codes is not None
        return bias + (codes * scale - bias).detach() if bias.requires_grad else codes * scale


def install_(net: fx.GraphModule, layers: set[str]) -> None:
    """Let the biases of layers be rounded.

    A layer that is called with inputs of different scales has no one unit, and one whose input is
    in float has none: their biases stay as they are.

    Args:
        net: with Brevitas layers; changed in place.
        layers: paths of the layers with quantized weights.
    """
    sources: dict[str, list[nn.Module | None]] = {}
    for node in net.graph.nodes:
        if node.op == "call_module" and node.target in layers:
            sources.setdefault(node.target, []).append(_quantizing(net, node))
    for path, found in sources.items():
        layer, first = net.get_submodule(path), found[0]
        if getattr(layer, "bias", None) is None or first is None:
            continue
        if len({id(_act_quantizer(source)) for source in found}) == 1:
            layer.bias_quant = IntegerBias(layer, first)


def biases(net: nn.Module) -> dict[str, IntegerBias]:
    """Return what rounds the biases, by the path of their layer."""
    return {
        path.removesuffix(".bias_quant"): module
        for path, module in net.named_modules()
        if isinstance(module, IntegerBias)
    }


def freeze_(net: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Put the rounded biases in place of the float ones, to stay in any precision.

    Args:
        net: changed in place.

    Returns:
        Codes (int32) ``(K,)`` and units, by layer; of layers that are settled.
    """
    found = {}
    for path, rounding in biases(net).items():
        bias = net.get_submodule(path).bias
        assert isinstance(bias, Tensor)
        codes, scale = rounding.codes(bias), rounding.scale()
        if codes is not None and scale is not None:
            with torch.no_grad():
                bias.copy_(codes * scale)
            found[path] = codes.int(), scale
        rounding.frozen = True
    return found


@torch.no_grad()
def fit_scales_(quantizer: SettledQuantizer, weight: Tensor, bias: Tensor | None) -> None:
    """Let the scale of a weight suit its bias, where the weight does not ask for another.

    No scale is so small that its channel's bias has no code; and where all codes of a channel are
    zero, which any scale does, it is small enough to round the bias finely.

    Args:
        quantizer: fresh; changed in place.
        weight: ``(K, ...)``.
        bias: ``(K,)``.
    """
    if bias is None:
        return
    least = bias.detach().abs().float() * SMALLEST_SHARE
    if isinstance(quantizer, WeightQuantizer):
        _fit_(quantizer, weight, least)
        return
    for bits, channels in quantizer.channels.items():
        chosen = channels.to(least.device)
        _fit_(quantizer.part(bits), weight[chosen], least[chosen])


def _fit_(quantizer: WeightQuantizer, weight: Tensor, least: Tensor) -> None:
    base = quantizer.base
    if base.numel() != least.numel():  # one scale for all channels
        base.copy_(torch.maximum(base, least.max().to(base.dtype)))
        return
    least = least.reshape(base.shape).to(base.dtype)
    empty = (quantizer.codes(weight).reshape(len(weight), -1) == 0).all(1).reshape(base.shape)
    base.copy_(torch.where(empty & (least > 0), least, torch.maximum(base, least)))


def _quantizing(net: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module whose codes a layer is called with, if one quantizes them."""
    source = origin(net, node.all_input_nodes[0])
    if source.op != "call_module":
        return None
    module = net.get_submodule(str(source.target))
    quantizes = hasattr(module, "act_quant") and not hasattr(module, "weight_quant")
    return module if quantizes else None


def _act_quantizer(source: nn.Module | None) -> object:
    if source is None:
        return None
    return source.get_submodule("act_quant.fused_activation_quant_proxy").tensor_quant
