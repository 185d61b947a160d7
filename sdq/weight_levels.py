"""Weights among the levels of their quantizers: relative errors, and histograms in steps."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdq.channel_bits import ChannelWeightQuantizer, SettledQuantizer
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits
from sdq.quant_model import new_weight_quantizer, weight_config

FINE, COARSE = 12, 6
"""Bins of a step in a narrow and a wide histogram; even, so that levels at whole and at half steps
lie in the middle of a bin."""

NARROW, WIDEST = 5, 8
"""Steps on each side of zero: of a narrow histogram at most, and of any. Levels beyond are not
shown, for more of them could not be told apart."""


@dataclass(frozen=True)
class Quantized:
    """A layer's master weight and its quantizer."""

    weight: Tensor
    quantizer: SettledQuantizer

    def relative_error(self) -> float:
        """Return ``||Q(w) - w|| / ||w||``; 0 for a weight that is all zero."""
        with torch.no_grad():
            error = (self.quantizer(self.weight)[0] - self.weight).norm()
        return float(error / self.weight.norm()) if bool(self.weight.any()) else 0.0

    def in_steps(self) -> tuple[Tensor, Tensor]:
        """Return all positions among the levels, and the level of each, flat, in steps."""
        with torch.no_grad():
            found = [q.in_steps(w) for q, w in self.quantizer.parts(self.weight)]
        position, level = zip(*((p.reshape(-1), x.reshape(-1)) for p, x in found), strict=True)
        return torch.cat(position), torch.cat(level)


@dataclass(frozen=True)
class Histogram:
    """How the weights of a layer lie among the levels.

    Args:
        layer: name and bits.
        edges: of the bins, in steps, one more than there are bins.
        levels: within the edges to which weights are rounded, in steps.
        before: percent of the float weights per step, in each bin.
        after: percent of the fine-tuned weights per step; None where there are none.
    """

    layer: LayerBits
    edges: tuple[float, ...]
    levels: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...] | None


def before(
    tensors: Mapping[str, Tensor],
    policy: BitwidthPolicy,
    config: QuantConfig,
    layers: Sequence[LayerSpec],
) -> dict[str, Quantized]:
    """Return the float weights with the quantizers that fine-tuning starts from, by layer.

    Args:
        tensors: of the float network; with folded batch normalisation, the folded weights.
        policy: what bits the layers have; layers in float are left out.
        config: the configuration of quantization.
        layers: of the network, in the policy's order.
    """
    weights = {b.name: tensors.get(f"{b.name}.weight") for b in policy}
    return {
        b.name: Quantized(weight, _new(weight, b, weight_config(config, spec, b.searched)))
        for b, spec in zip(policy, layers, strict=True)
        if b.weight_bits != FLOAT_BITS and (weight := weights[b.name]) is not None
    }


def after(
    tensors: Mapping[str, Tensor],
    policy: BitwidthPolicy,
    config: QuantConfig,
    layers: Sequence[LayerSpec],
) -> dict[str, Quantized]:
    """Return the fine-tuned weights with their learned quantizers, by layer; as :func:`before`.

    Args:
        tensors: of the quantized network.
        policy: what bits the layers have.
        config: the configuration of quantization.
        layers: of the network, in the policy's order.

    Raises:
        RequestError: a quantizer's tensors are of another one.
    """
    plain = {name.removeprefix("net."): tensor for name, tensor in tensors.items()}
    found = before(plain, policy, config, layers)
    for name, layer in found.items():
        prefix = f"{name}.weight_quant.tensor_quant."
        own = {k.removeprefix(prefix): v for k, v in plain.items() if k.startswith(prefix)}
        try:
            layer.quantizer.load_state_dict(own)
        except RuntimeError as error:  # torch says which tensors, over several lines
            raise RequestError(
                f"{name}: its tensors must be of a weight and the quantizer that the policy says, "
                f"got others: {' '.join(str(error).split()):.200}; copy the run anew"
            ) from error
    return found


def _new(weight: Tensor, layer: LayerBits, config: QuantConfig) -> SettledQuantizer:
    """Return the quantizer that a layer gets under a policy, as sdq.apply_policy_ has it."""
    if layer.channel_bits is None:
        return new_weight_quantizer(weight, layer.weight_bits, config)
    return ChannelWeightQuantizer(
        weight, layer.channel_bits, lambda w, b: new_weight_quantizer(w, b, config)
    )


def histogram(layer: LayerBits, first: Quantized, last: Quantized | None) -> Histogram:
    """Return the histogram of a layer's weights before and after fine-tuning.

    Raises:
        RequestError: a weight is NaN or infinite.
    """
    both = [x.in_steps() for x in (first, last) if x is not None]
    greatest = [float(torch.cat(pair).abs().max()) for pair in both]
    if not all(map(math.isfinite, greatest)):
        raise RequestError(
            f"{layer.name}: weights must be finite, in steps of their quantizer too, got "
            f"{max(greatest)}; copy the run anew"
        )
    reach = int(max(greatest)) + 1
    per_step, reach = FINE if reach <= NARROW else COARSE, min(reach, WIDEST)
    half = reach * per_step
    # bins are centred at multiples of their width: no level falls on an edge
    edges = (torch.arange(-half, half + 2) - 0.5) / per_step
    levels = torch.cat([level for _, level in both]).unique()
    shares = [_percent(position, edges, per_step) for position, _ in both]
    return Histogram(
        layer,
        tuple(edges.tolist()),
        tuple(x for x in levels.tolist() if abs(x) <= reach),
        shares[0],
        shares[1] if last is not None else None,
    )


def _percent(positions: Tensor, edges: Tensor, per_step: int) -> tuple[float, ...]:
    """Return the percentage of all positions per step in each bin; some may lie in none."""
    count = torch.bincount(torch.bucketize(positions, edges), minlength=len(edges) + 1)
    return tuple((100 * per_step * count[1 : len(edges)] / len(positions)).tolist())
