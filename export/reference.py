"""PyTorch's side of a comparison: outputs and integer codes, in float32 and in float64."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.format import Trace
from sdq import integer_bias
from sdq.learned_scale import ActQuantizer
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel


@dataclass(frozen=True, eq=False)
class Replay:
    """A run in float64 in which quantizers gave codes of another run.

    Args:
        output: of the network.
        before: what each activation quantizer was about to round: its input over its scale.
        codes: what each would have given.
    """

    output: Tensor
    before: dict[str, Tensor]
    codes: dict[str, Tensor]


class Reference:
    """A quantized network in evaluation mode on the CPU, whose codes can be read.

    The float64 copy has the float32 network's weight codes and scales: whether a float32 division
    fell on one side of a boundary is settled, and everything after it is exact.

    Args:
        qmodel: left as it is.
    """

    def __init__(self, qmodel: QuantModel) -> None:
        self.single = copy.deepcopy(qmodel).cpu().eval()
        untie_(self.single)
        self.double = _in_float64(self.single)
        self.bits = {name: q.bits for name, q in self.single.act_quantizers().items()}
        self.names = list(self.bits)

    @torch.no_grad()
    def float32(self, images: Tensor) -> Trace:
        """Run float images ``(N, C, H, W)`` as PyTorch does."""
        return _traced(self.single, images)

    @torch.no_grad()
    def float64(self, images: Tensor) -> Trace:
        """Run float images ``(N, C, H, W)`` in float64."""
        return _traced(self.double, images.double())

    @torch.no_grad()
    def replay(
        self, images: Tensor, codes: Mapping[str, Tensor], *, single: bool = False
    ) -> Replay:
        """Run in float64, but let activation quantizers give these codes.

        Args:
            images: float images ``(N, C, H, W)``.
            codes: by quantizer; one that is not named gives its own.
            single: in float32 instead.
        """
        network, dtype = (self.single, torch.float32) if single else (self.double, torch.float64)
        before: dict[str, Tensor] = {}
        rounded: dict[str, Tensor] = {}

        def force(name: str, quantizer: ActQuantizer) -> Callable[..., Tensor]:
            def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
                before[name] = inputs[0] / quantizer.scale
                rounded[name] = quantizer.codes(inputs[0]).int()
                return codes[name].to(dtype) * quantizer.scale if name in codes else output

            return hook

        return Replay(_hooked(network, images.to(dtype), force), before, rounded)

    def weight(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Return a layer's weight codes ``(K, ...)`` and scales, or None if it is float."""
        if self.single.policy[name].weight_bits == FLOAT_BITS:
            return None
        quantizer = self.single.settled_quantizer(name)
        codes = quantizer.codes(self.single.weight(name))
        return codes.int(), quantizer.scale.detach().reshape(-1)

    def output_step(self) -> float | None:
        """Return input scale times the smallest weight scale of the last layer, if it has both."""
        name = self.single.policy.layers[-1].name
        weight = self.weight(name)
        path = self.single.input_quantizer(name)
        if weight is None or path is None:
            return None
        source = self.single.act_quantizers()[path]
        return float(source.scale.detach()) * float(weight[1].min())


def untie_(qmodel: QuantModel) -> None:
    """Give layers that share a weight one each: they may have other bits, and then other values."""
    seen: set[int] = set()
    for bits in qmodel.policy:
        layer = qmodel.layer(bits.name)
        weight = getattr(layer, "weight", None)
        if isinstance(weight, nn.Parameter):
            if id(weight) in seen:
                layer.weight = nn.Parameter(weight.detach().clone())
            seen.add(id(weight))


def _in_float64(qmodel: QuantModel) -> QuantModel:
    double = copy.deepcopy(qmodel)
    integer_bias.freeze_(double.net)  # the float32 values, with which a file's biases are rounded
    double = double.double()  # its scales keep their float32 values
    for bits in qmodel.policy:
        if bits.weight_bits == FLOAT_BITS:
            continue
        single, quantizer = qmodel.settled_quantizer(bits.name), double.settled_quantizer(bits.name)
        codes = single.codes(qmodel.weight(bits.name))
        with torch.no_grad():
            double.weight(bits.name).copy_(codes.double() * quantizer.scale)
        quantizer.freeze_()
    return double


def _traced(qmodel: QuantModel, images: Tensor) -> Trace:
    codes: dict[str, Tensor] = {}

    def record(name: str, quantizer: ActQuantizer) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            codes[name] = quantizer.codes(inputs[0]).int()

        return hook

    return Trace(_hooked(qmodel, images, record), codes)


def _hooked(
    qmodel: QuantModel, images: Tensor, hook: Callable[[str, ActQuantizer], Callable[..., Any]]
) -> Tensor:
    """Run a network with a hook at each activation quantizer."""
    modules = qmodel.act_modules()
    handles = [
        modules[name].register_forward_hook(hook(name, quantizer))
        for name, quantizer in qmodel.act_quantizers().items()
    ]
    try:
        output: Tensor = qmodel(images)
        return output
    finally:
        for handle in handles:
            handle.remove()
