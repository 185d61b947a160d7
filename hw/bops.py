"""MACs, parameters, weight bytes and bit operations of a network under a policy.

BitOPs are counted as ``MACs * weight bits * activation bits``, summed over layers: the convention
of HAWQ-V3, Bayesian Bits and FracBits. With the first and last layer at 8/8 it gives ResNet-18 at
224x224 22.85 G at W3A3 and 116.1 G at W8A8, as those papers print. Float counts as 32 bits.

Source: Yao et al., "HAWQ-V3", ICML 2021, https://arxiv.org/abs/2011.10680; van Baalen et al.,
"Bayesian Bits", NeurIPS 2020, appendix B.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy, LayerBits


@dataclass(frozen=True)
class LayerCost:
    """One layer's cost. Biases and scales count as parameters but not as weight bytes.

    Where its channels differ in bits, ``weight_bits`` is their mean.
    """

    name: str
    weight_bits: float
    act_bits: int
    macs: int
    params: int
    weight_bytes: float
    bops: int


def check_policy(layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> None:
    """Raise RequestError unless a policy is of these layers, in their order."""
    named, wanted = [bits.name for bits in policy], [spec.name for spec in layers]
    if named != wanted:
        at = next((i for i, (a, b) in enumerate(zip(named, wanted, strict=False)) if a != b), None)
        got = f"{len(named)} of {len(wanted)}" if at is None else f"{named[at]} for {wanted[at]}"
        raise RequestError(
            f"policy: must name the network's layers in their order, got {got}; take the policy "
            "of this network"
        )


def layer_costs(layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> list[LayerCost]:
    """Return the cost of each layer.

    Args:
        layers: of the network, in the policy's order.
        policy: one entry a layer.

    Raises:
        RequestError: the policy is not of these layers.
    """
    check_policy(layers, policy)
    return [
        LayerCost(
            spec.name, _mean(bits), bits.act_bits, spec.macs, spec.num_params,
            bits.total_weight_bits / 8,
            spec.macs * bits.total_weight_bits * bits.act_bits // spec.num_weights,
        )
        for spec, bits in zip(layers, policy, strict=True)
    ]  # fmt: skip


def _mean(bits: LayerBits) -> float:
    return bits.weight_bits if bits.channel_bits is None else mean(bits.channel_bits)


def total_bops(layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> int:
    """Return the bit operations of one sample."""
    return sum(cost.bops for cost in layer_costs(layers, policy))
