"""Devices that compute one layer after another: a network takes the sum of its layers."""

from collections.abc import Mapping, Sequence
from math import fsum

from hw.target import LayerUse, TargetCost


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
