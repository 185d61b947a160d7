"""A quantized network as federated methods see it: its quantizers, scales and bits.

A client quantizes with the scales that came; those of tensors that never come (a head of its own,
a personal model) it takes from its own weights and images.
"""

from collections.abc import Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from fl.network import Network
from fl.record import Tensors
from fl.state import Route
from sdq.batches import Loader
from sdq.calibration import calibrate_, calibrate_acts
from sdq.channel_bits import ChannelWeightQuantizer
from sdq.learned_scale import SMALLEST_GAIN, ActQuantizer, WeightQuantizer
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel
from sdq.stochastic import StochasticActQuantizer

SCALES = ("*tensor_quant*.gain", "*tensor_quant*.base")
"""Patterns of the names of quantizers' scales: what is averaged as logarithms."""

QUANTIZER = ".tensor_quant."
"""What is in the name of every tensor of a quantizer."""


def quant_models(network: nn.Module) -> dict[str, QuantModel]:
    """Return the quantized networks in a federation's network, by path."""
    return {p: m for p, m in network.named_modules() if isinstance(m, QuantModel)}


def float_name(name: str, network: nn.Module) -> str:
    """Return the name that a quantized network's tensor has where the network is in float."""
    for path in quant_models(network):
        if name.startswith(f"{path}.net."):
            return f"{path}.{name.removeprefix(f'{path}.net.')}"
    return name


def distinct_acts(qmodel: QuantModel) -> dict[str, nn.Module]:
    """Return the activation quantizers; of paths that share one, the first."""
    first: dict[int, str] = {}
    quantizers: Mapping[str, nn.Module] = qmodel.act_quantizers()
    for path, quantizer in quantizers.items():
        first.setdefault(id(quantizer), path)
    return {path: quantizers[path] for path in first.values()}


def by_bits(qmodel: QuantModel) -> dict[str, dict[int, ActQuantizer]]:
    """Return the quantizers of each activation by their bits: one, or all it may yet get."""
    found = {}
    for path, quantizer in distinct_acts(qmodel).items():
        drawn = isinstance(quantizer, StochasticActQuantizer)
        each = quantizer.candidates if drawn else [quantizer]
        acts = [cast(ActQuantizer, q) for q in cast(nn.ModuleList, each)]
        found[path] = {q.bits: q for q in acts}
    return found


def measured_scales(
    qmodel: QuantModel, batches: Loader, widths: Mapping[str, tuple[int, ...]]
) -> Tensors:
    """Return activation scales of least squared error on some images.

    Args:
        qmodel: with plain quantizers; left as it is.
        batches: of ``(images, labels)``.
        widths: the bits that each activation may have, by path.

    Returns:
        Scalars by ``PATH@BITS``; of activations that no image reached, none.
    """
    if not widths:
        return {}
    return {
        f"{path}@{quantizer.bits}": quantizer.base.detach().cpu().clone()
        for path, quantizers in calibrate_acts(qmodel, batches, widths).items()
        for quantizer in quantizers
        if bool(quantizer.calibrated)
    }


@torch.no_grad()
def set_act_scales_(qmodel: QuantModel, scales: Mapping[str, Tensor]) -> None:
    """Give activation quantizers the scales that :func:`measured_scales` names; others have 1."""
    for path, quantizers in by_bits(qmodel).items():
        for bits, quantizer in quantizers.items():
            quantizer.base.copy_(scales.get(f"{path}@{bits}", torch.ones(())))
            quantizer.gain.fill_(1.0)
            quantizer.calibrated.fill_(True)


def set_bits_(qmodel: QuantModel, policy: BitwidthPolicy) -> None:
    """Give a network the bits of a policy and leave the scales as they are.

    Unlike :func:`sdq.apply_policy_`, which takes new scales, and so new modules: here one network
    serves clients of different bits one after the other. Bits of single channels stay.
    """
    for bits in policy:
        if bits.searched and bits.channel_bits is None:
            quantizer = qmodel.settled_quantizer(bits.name)
            assert isinstance(quantizer, WeightQuantizer)
            quantizer.set_bits_(bits.weight_bits)
    quantizers = qmodel.act_quantizers()
    for path, readers in qmodel.searched_acts().items():
        quantizers[path].set_bits_(policy[readers[0]].act_bits)
    qmodel.policy = policy


def set_head_bits_(network: Network, policy: BitwidthPolicy) -> None:
    """Give the heads that a method keeps beside the model's own the bits of a policy's head."""
    heads = [head for head in network.extras.values() if hasattr(head, "weight_quant")]
    if not heads:
        return
    bits = policy[network.head_name.removeprefix("net.")]
    for head in heads if bits.searched else []:
        for quantizer, _ in _weight_quantizers(head):
            quantizer.set_bits_(bits.weight_bits)


@torch.no_grad()
def refit_(layer: nn.Module) -> None:
    """Take the scales of a layer from its weight as it is now, if it is quantized."""
    if hasattr(layer, "weight_quant"):
        for quantizer, weight in _weight_quantizers(layer):
            quantizer.fit_(weight)


def _weight_quantizers(layer: nn.Module) -> Iterator[tuple[WeightQuantizer, Tensor]]:
    """Yield the quantizers of a layer's weight, each with the weights that are its own."""
    weight = cast(Tensor, layer.weight)
    quantizer = cast(nn.Module, layer.get_submodule("weight_quant").tensor_quant)
    if isinstance(quantizer, ChannelWeightQuantizer):
        yield from quantizer.parts(weight)
    elif isinstance(quantizer, WeightQuantizer):
        yield quantizer, weight
    else:  # a search's: one for each candidate
        for candidate in cast(nn.ModuleList, quantizer.candidates):
            yield cast(WeightQuantizer, candidate), weight


@torch.no_grad()
def fit_own_scales_(network: Network, routes: Mapping[str, Route], batches: Loader) -> None:
    """Take the scales of what does not come down from the client's own weights and images.

    Args:
        network: as it is on the client when it first trains.
        routes: of its tensors.
        batches: of the client's images, not augmented.
    """
    for path, layer in network.named_modules():
        if hasattr(layer, "weight_quant") and not routes[f"{path}.weight"].comes_down:
            refit_(layer)
    for path, qmodel in quant_models(network).items():
        for name, layer in _quantized_layers(qmodel):
            if not routes[f"{path}.net.{name}.weight"].comes_down:
                qmodel.fit_bias_(name, layer)
        if path != "model":
            calibrate_(qmodel, batches)


def _quantized_layers(qmodel: QuantModel) -> Iterator[tuple[str, WeightQuantizer]]:
    for bits in qmodel.policy:
        quantizer = getattr(qmodel.layer(bits.name), "weight_quant", None)
        if quantizer is not None and isinstance(quantizer.tensor_quant, WeightQuantizer):
            yield bits.name, quantizer.tensor_quant


@torch.no_grad()
def clamp_gains_(network: nn.Module) -> None:
    """Raise gains to the least that counts in a scale: below it there may be no logarithm."""
    for name, parameter in network.named_parameters():
        if QUANTIZER in name and name.endswith(".gain"):
            parameter.clamp_(min=SMALLEST_GAIN)
