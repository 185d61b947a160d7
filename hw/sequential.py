"""Devices that compute one layer after another: a network takes the sum of its layers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import fsum
from typing import Self

from hw.target import Choices, Demand, LayerUse, TargetCost
from sdq.layers import LayerSpec


@dataclass(frozen=True, kw_only=True)
class Sequential:
    """What such devices have in common.

    Args:
        within_s: the time one sample may take, if that was demanded.
    """

    within_s: float | None = None

    @property
    def limits(self) -> Mapping[str, float]:
        """What was demanded."""
        return {} if self.within_s is None else {"latency_s": self.within_s}

    def under(self, layers: Sequence[LayerSpec], demand: Demand, choices: Choices) -> Self:
        """Return the target with what is demanded of one sample."""
        return replace(self, within_s=demand.seconds)


def summed(
    layers: Sequence[LayerUse],
    costs: Sequence[str],
    *,
    capacity: Mapping[str, float] | None = None,
    limits: Mapping[str, float] | None = None,
) -> TargetCost:
    """Return the cost of a network from that of its layers.

    Args:
        layers: in order.
        costs: names of what is added up; counts stay whole.
        capacity: what the device has.
        limits: what must be kept.
    """
    totals: dict[str, float] = {}
    for name in costs:
        values = [layer.costs[name] for layer in layers]
        whole = all(isinstance(value, int) for value in values)
        totals[name] = sum(values) if whole else fsum(values)
    return TargetCost(tuple(layers), totals, dict(capacity or {}), dict(limits or {}))
