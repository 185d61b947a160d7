"""A target: a device, and what a network costs on it under a policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sdq import plugins
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy


@dataclass(frozen=True)
class TargetCost:
    """Cost of one sample: cycles of each layer in order, and the whole in seconds."""

    layer_cycles: tuple[int, ...]
    latency_s: float

    @property
    def bottleneck(self) -> int:
        """Index of the layer that takes most cycles."""
        return max(range(len(self.layer_cycles)), key=self.layer_cycles.__getitem__)


class Target(Protocol):
    """What a file in ``hw/targets`` defines as ``TARGET``.

    Attributes:
        weight_bits: bitwidths of weights that the device computes with.
        act_bits: likewise of activations.
    """

    weight_bits: tuple[int, ...]
    act_bits: tuple[int, ...]

    def latency_s(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        """Return the time one layer takes for one sample; a network takes the sum."""
        ...

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return what the network costs under the policy.

        A layer whose channels differ in bits may cost more than its channels' share of
        :meth:`latency_s`, so that a search by channels cannot hold a latency.
        """
        ...


def target(name: str) -> Target:
    """Return the target of this name; RequestError offers the nearest one.

    >>> target("bit_fusion").cost((), BitwidthPolicy(())).latency_s
    0.0
    """
    found: Target = plugins.load("hw.targets", name).TARGET
    return found
