"""A target: a device, what it holds, and what a network costs on it under a policy.

Costs have names with their unit: ``cycles``, ``latency_s``, ``energy_j``, ``lut``, ``bram_18k``,
``dsp``, ``flash_bytes``. Those a target lists in ``costs`` are sums over layers, each a function of
the layer's bits alone, so that a search can hold them as tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Protocol, cast

from hw.bops import check_policy
from sdq import plugins
from sdq.cost import CostFn
from sdq.errors import RequestError, nearest
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy


@dataclass(frozen=True)
class Demand:
    """What is asked of a device.

    Args:
        fps: samples a second, at least.
        latency_s: from a sample's first value to its result, at most.
    """

    fps: float | None = None
    latency_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("fps", self.fps), ("latency_s", self.latency_s)):
            if value is not None and not 0 < value < inf:
                raise RequestError(f"demand: {name} must be a positive number, got {value}")

    @property
    def seconds(self) -> float | None:
        """The time one sample may take where samples are computed one after another."""
        limits = [1 / self.fps] if self.fps is not None else []
        limits += [self.latency_s] if self.latency_s is not None else []
        return min(limits, default=None)


@dataclass(frozen=True)
class LayerUse:
    """What one layer takes.

    Args:
        name: of the layer.
        costs: by name, with unit.
        pace_s: how long the layer is busy with one sample: the largest is the bottleneck.
        layout: how the device computes it (a dataflow unit's ``pe`` and ``simd``).
    """

    name: str
    costs: Mapping[str, float]
    pace_s: float
    layout: Mapping[str, int | str]


@dataclass(frozen=True)
class TargetCost:
    """Cost of one sample.

    Args:
        layers: in the network's order.
        totals: by name; ``latency_s`` is always there.
        capacity: what the device has, by name.
        limits: how much of it a network may take, and what was asked for.
    """

    layers: tuple[LayerUse, ...]
    totals: Mapping[str, float]
    capacity: Mapping[str, float]
    limits: Mapping[str, float]

    @property
    def latency_s(self) -> float:
        """Time of one sample."""
        return self.totals["latency_s"]

    @property
    def layer_cycles(self) -> tuple[int, ...]:
        """Cycles of each layer, on targets that count them."""
        return tuple(int(layer.costs["cycles"]) for layer in self.layers)

    @property
    def bottleneck(self) -> int:
        """Index of the layer that is busy longest."""
        return max(range(len(self.layers)), key=lambda i: self.layers[i].pace_s)

    @property
    def over(self) -> tuple[str, ...]:
        """Names of what is above its limit."""
        return tuple(name for name, limit in self.limits.items() if self.totals[name] > limit)

    @property
    def fits(self) -> bool:
        """Whether nothing is above its limit."""
        return not self.over

    @property
    def shares(self) -> dict[str, float]:
        """What share of the device each resource takes."""
        return {name: self.totals[name] / whole for name, whole in self.capacity.items()}


PARTS = (
    "weight_bits", "act_bits", "costs", "limits", "legal_weight_bits", "under", "use", "latency_s",
    "cost",
)  # fmt: skip
"""Of a target; see :class:`Target`."""

Choices = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
"""Of each layer, the candidate bitwidths of its weights and of its input."""


class Target(Protocol):
    """What a file in ``hw/targets`` defines as ``TARGET``."""

    @property
    def weight_bits(self) -> tuple[int, ...]:
        """Bitwidths of weights that the device computes with, in some kind of layer."""
        ...

    @property
    def act_bits(self) -> tuple[int, ...]:
        """Bitwidths of activations that the device computes with."""
        ...

    @property
    def costs(self) -> tuple[str, ...]:
        """Names of the costs that are sums over layers, which can be budgeted."""
        ...

    @property
    def limits(self) -> Mapping[str, float]:
        """What a network has to keep to: the device's resources, and what was demanded."""
        ...

    def legal_weight_bits(self, spec: LayerSpec) -> tuple[int, ...]:
        """Return the bitwidths that the device computes this layer's weights with."""
        ...

    def under(self, layers: Sequence[LayerSpec], demand: Demand, choices: Choices) -> "Target":
        """Return the target as it is laid out for a network and a demand.

        Args:
            layers: of the network.
            demand: what is asked; where nothing is, the target decides.
            choices: the bits that it must serve: a search's candidates, or a policy's.

        Raises:
            RequestError: the demand cannot be met; the message gives the reachable range.
        """
        ...

    def use(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> LayerUse:
        """Return what one layer takes; it has all of :attr:`costs`."""
        ...

    def latency_s(self, spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        """Return the time one layer takes for one sample; a network takes the sum."""
        ...

    def cost(self, layers: Sequence[LayerSpec], policy: BitwidthPolicy) -> TargetCost:
        """Return what the network costs under the policy.

        A layer whose channels differ in bits may cost more than its channels' share of
        :meth:`latency_s`, so that a search by channels cannot hold a latency.
        """
        ...


def cost_fn(target: Target, name: str) -> CostFn:
    """Return one of a target's costs as a search takes it.

    Raises:
        RequestError: the target names no such cost.
    """
    if name not in target.costs:
        raise RequestError(f"budget: {name!r} must be a cost of the target; "
                           f"{nearest(name, target.costs)}")  # fmt: skip

    def cost(spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        return target.use(spec, weight_bits, act_bits).costs[name]

    cost.__name__ = name
    return cost


def choices_of(policy: BitwidthPolicy) -> Choices:
    """Return a policy's bits, as the only candidates."""
    return tuple(((bits.weight_bits,), (bits.act_bits,)) for bits in policy)


def report(
    layers: Sequence[LayerSpec],
    policy: BitwidthPolicy,
    device: "Target | str",
    demand: Demand | None = None,
) -> TargetCost:
    """Return what a network costs on a device that is laid out for it.

    Args:
        layers: of the network.
        policy: one entry a layer.
        device: a target or its name.
        demand: what is asked of it.

    Raises:
        RequestError: the policy is not of these layers, the demand cannot be met, or the device
            cannot compute a layer.
    """
    check_policy(layers, policy)
    found = target(device) if isinstance(device, str) else device
    return found.under(layers, demand or Demand(), choices_of(policy)).cost(layers, policy)


def target(name: str) -> Target:
    """Return the target of this name, or of a user's file.

    Raises:
        RequestError: no such target; the message offers the nearest one. Or the file has none.

    >>> target("bit_fusion").cost((), BitwidthPolicy(())).latency_s
    0.0
    """
    found = getattr(plugins.load("hw.targets", name), "TARGET", None)
    if missing := [part for part in PARTS if not hasattr(found, part)]:
        raise RequestError(
            f"{name}: TARGET must be a target with {', '.join(PARTS)}, got {type(found).__name__} "
            f"without {missing[0]}; see docs/how-to/own-device.md"
        )
    return cast(Target, found)
