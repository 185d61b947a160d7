"""Budgets: what a policy may cost, as constraints on what a search decides.

Every cost here is a sum over layers, and within a layer any function of its weight and activation
bits: average bits, weight bytes, bit operations, or what a device model says. Its values at the
candidate bitwidths are all a search needs, so that one projection (:mod:`sdq.projection`) and one
expected cost (:mod:`sdq.expected_cost`) serve them all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.search_space import SearchSpace

CostFn = Callable[[LayerSpec, int, int], float]
"""What one layer costs with these weight and activation bits; a network costs the sum."""


@dataclass(frozen=True)
class Pair:
    """The cost of layers whose weights and input are both decided.

    Args:
        first: index of the unit of the weights.
        second: index of the unit of the input.
        table: cost for each candidate of the first (rows) and of the second (columns).
    """

    first: int
    second: int
    table: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Constraint:
    """``(fixed + sum of the units' costs) / divisor <= limit``.

    Counts are integers, so that a cost is exact and "never above" can be taken literally.

    Args:
        name: what is limited, with its unit, for messages.
        limit: the budget.
        divisor: turns the sums into the limit's unit.
        fixed: cost of everything that no unit decides.
        single: for each unit, the cost of each of its candidates (0 where ``pairs`` have it).
        pairs: costs that depend on two units.
        choices: candidate bitwidths of each unit, for messages.
    """

    name: str
    limit: float
    divisor: int
    fixed: float
    single: tuple[tuple[float, ...], ...]
    pairs: tuple[Pair, ...] = ()
    choices: tuple[tuple[int, ...], ...] = ()

    def cost(self, picks: Sequence[int]) -> float:
        """Return the cost, in the limit's unit, where unit ``u`` has candidate ``picks[u]``."""
        terms = [row[pick] for row, pick in zip(self.single, picks, strict=True)]
        terms += [pair.table[picks[pair.first]][picks[pair.second]] for pair in self.pairs]
        # whole numbers sum exactly as they are; fsum rounds once
        whole = all(isinstance(term, int) for term in (*terms, self.fixed))
        count = sum(terms) + self.fixed if whole else math.fsum((*terms, self.fixed))
        return count / self.divisor

    @classmethod
    def of(
        cls,
        space: SearchSpace,
        name: str,
        layer_cost: CostFn,
        limit: float,
        *,
        divisor: int = 1,
        searched_only: bool = False,
    ) -> "Constraint":
        """Tabulate a cost for a search space.

        Args:
            space: units and fixed layers.
            name: for messages.
            layer_cost: of one layer, for each of its candidate bitwidths.
            limit: the budget.
            divisor: turns sums into the limit's unit.
            searched_only: do not count layers whose weight is not searched.

        Raises:
            RequestError: a cost is negative, infinite or NaN.
        """
        single: list[list[float]] = [[0] * len(unit.choices) for unit in space.units]
        pairs = []
        fixed: float = 0
        for i, (spec, bits) in enumerate(zip(space.layers, space.policy, strict=True)):
            weights = [u for u, x in enumerate(space.units) if i in x.layers and not x.is_act]
            acts = [u for u, x in enumerate(space.units) if i in x.layers and x.is_act]
            if searched_only and not bits.searched:
                continue
            widths = space.units[weights[0]].choices if weights else (bits.weight_bits,)
            act_widths = space.units[acts[0]].choices if acts else (bits.act_bits,)
            table = [
                [_checked(name, spec, w, a, layer_cost(spec, w, a)) for a in act_widths]
                for w in widths
            ]
            parts = max(len(weights), 1)  # channels share their layer's cost
            shares = [[_share(value, parts) for value in row] for row in table]
            if weights and acts:
                rows = tuple(tuple(row) for row in shares)
                pairs += [Pair(unit, acts[0], rows) for unit in weights]
            elif weights:
                for unit in weights:
                    single[unit] = [a + b[0] for a, b in zip(single[unit], shares, strict=True)]
            elif acts:
                single[acts[0]] = [a + b for a, b in zip(single[acts[0]], shares[0], strict=True)]
            else:
                fixed += shares[0][0]
        return cls(
            name, limit, divisor, fixed, tuple(tuple(row) for row in single), tuple(pairs),
            tuple(unit.choices for unit in space.units),
        )  # fmt: skip


def _share(value: float, parts: int) -> float:
    return value // parts if isinstance(value, int) and value % parts == 0 else value / parts


def _checked(name: str, spec: LayerSpec, weight_bits: int, act_bits: int, value: float) -> float:
    if not 0 <= value < math.inf:
        raise RequestError(
            f"budget: {name} of layer {spec.name} must be a non-negative number, got {value!r} "
            f"at {weight_bits}-bit weights and {act_bits}-bit activations; mend the cost function"
        )
    return value


@dataclass(frozen=True)
class Budget:
    """What a policy may cost; give one or several.

    Args:
        avg_weight_bits: mean bits of a weight over the searched layers.
        weight_bytes: bytes of all quantizable layers' weights, the pinned ones included.
        bops: bit operations of one sample, ``sum(MACs * weight bits * activation bits)``, all
            quantizable layers.
        avg_act_bits: mean bits of an input element over the searched layers, for learned
            activation bitwidths.
        costs: any other cost as ``(function, limit)``: the function gives what one layer costs
            with these bits, ``f(spec, weight_bits, act_bits)``; all quantizable layers are summed.

    >>> Budget(avg_weight_bits=2.0).avg_weight_bits
    2.0
    """

    avg_weight_bits: float | None = None
    weight_bytes: float | None = None
    bops: float | None = None
    avg_act_bits: float | None = None
    costs: tuple[tuple[CostFn, float], ...] = ()

    def __post_init__(self) -> None:
        named = (self.avg_weight_bits, self.weight_bytes, self.bops, self.avg_act_bits)
        given = [v for v in named if v is not None] + [limit for _, limit in self.costs]
        if not given:
            raise RequestError(
                "budget: must limit avg_weight_bits, weight_bytes, bops, avg_act_bits or costs, "
                "got nothing"
            )
        for value in given:
            if not 0 < value < float("inf"):
                raise RequestError(f"budget: must be a positive number, got {value!r}")

    def constraints(self, space: SearchSpace) -> list[Constraint]:
        """Return the constraints on a search space.

        Averages are over the searched layers, or over all where none is searched, as
        :attr:`BitwidthPolicy.avg_weight_bits` is.
        """
        searched = [s for s, b in zip(space.layers, space.policy, strict=True) if b.searched]
        averaged, some = searched or space.layers, bool(searched)
        found = []
        if self.avg_weight_bits is not None:
            found.append(
                Constraint.of(
                    space, "average weight bits", weight_bits_of, self.avg_weight_bits,
                    divisor=sum(spec.num_weights for spec in averaged), searched_only=some,
                )
            )  # fmt: skip
        if self.weight_bytes is not None:
            found.append(
                Constraint.of(
                    space, "weight bytes", weight_bits_of, self.weight_bytes, divisor=8
                )
            )  # fmt: skip
        if self.bops is not None:
            found.append(Constraint.of(space, "bit operations", bit_operations, self.bops))
        if self.avg_act_bits is not None:
            found.append(
                Constraint.of(
                    space, "average activation bits", _act_bits_of, self.avg_act_bits,
                    divisor=sum(math.prod(spec.in_shape) for spec in averaged), searched_only=some,
                )
            )  # fmt: skip
        for number, (cost, limit) in enumerate(self.costs, 1):
            name = getattr(cost, "__name__", type(cost).__name__)
            if any(name == other.name for other in found):  # logs are by name
                name = f"{name} ({number})"
            found.append(Constraint.of(space, name, cost, limit))
        return found


def weight_bits_of(spec: LayerSpec, weight_bits: int, act_bits: int) -> int:
    """Return the bits of a layer's weights."""
    return spec.num_weights * weight_bits


def bit_operations(spec: LayerSpec, weight_bits: int, act_bits: int) -> int:
    """Return the bit operations of a layer for one sample."""
    return spec.macs * weight_bits * act_bits


def _act_bits_of(spec: LayerSpec, weight_bits: int, act_bits: int) -> int:
    return math.prod(spec.in_shape) * act_bits
