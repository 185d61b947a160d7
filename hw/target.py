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
    """What a file in ``hw/targets`` defines as ``TARGET``."""

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return what the network costs under the policy."""
        ...


def target(name: str) -> Target:
    """Return the target of this name; RequestError offers the nearest one.

    >>> target("bit_fusion").cost((), BitwidthPolicy(())).latency_s
    0.0
    """
    found: Target = plugins.load("hw.targets", name).TARGET
    return found
