"""Budgets: what a policy may cost, as linear constraints on the searched layers' bits.

Average bits, weight bytes and BitOPs (at fixed activation bits) are all linear in the weight
bits, so one projection (:mod:`sdq.projection`) serves them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy


@dataclass(frozen=True)
class LinearConstraint:
    """``(fixed + sum(per_bit * bits)) / divisor <= limit`` over the searched layers.

    The counts are integers, so that a cost is exact and "never above" can be taken literally.

    Args:
        name: what is limited, with its unit, for messages.
        per_bit: count for each weight bit, one entry a searched layer.
        fixed: count of the pinned layers.
        divisor: turns counts into the limit's unit.
        limit: the budget.
    """

    name: str
    per_bit: tuple[int, ...]
    fixed: int
    divisor: int
    limit: float

    def cost(self, bits: Sequence[float]) -> float:
        """Return the cost, in the limit's unit, of one bitwidth for each searched layer."""
        count = self.fixed + sum(c * b for c, b in zip(self.per_bit, bits, strict=True))
        return count / self.divisor


@dataclass(frozen=True)
class Budget:
    """What a policy may cost; give one or several.

    Args:
        avg_weight_bits: mean bits of a weight over the searched layers.
        weight_bytes: bytes of all quantizable layers' weights, the pinned ones included.
        bops: bit operations of one sample, ``sum(MACs * weight bits * activation bits)``, all
            quantizable layers.

    >>> Budget(avg_weight_bits=2.0)
    Budget(avg_weight_bits=2.0, weight_bytes=None, bops=None)
    """

    avg_weight_bits: float | None = None
    weight_bytes: float | None = None
    bops: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.avg_weight_bits, self.weight_bytes, self.bops) if v is not None]
        if not given:
            raise RequestError(
                "budget: must limit avg_weight_bits, weight_bytes or bops, got nothing"
            )
        for value in given:
            if not 0 < value < float("inf"):
                raise RequestError(f"budget: must be a positive number, got {value!r}")

    def constraints(
        self, layers: Sequence[LayerSpec], policy: BitwidthPolicy
    ) -> list[LinearConstraint]:
        """Return the constraints on the policy's searched layers."""
        pairs = list(zip(layers, policy, strict=True))
        searched = [(spec, bits) for spec, bits in pairs if bits.searched]
        pinned = [(spec, bits) for spec, bits in pairs if not bits.searched]
        found = []
        counts = tuple(spec.num_weights for spec, _ in searched)
        if self.avg_weight_bits is not None and counts:
            found.append(
                LinearConstraint(
                    "average weight bits", counts, 0, sum(counts), self.avg_weight_bits
                )
            )
        if self.weight_bytes is not None:
            fixed = sum(spec.num_weights * bits.weight_bits for spec, bits in pinned)
            found.append(LinearConstraint("weight bytes", counts, fixed, 8, self.weight_bytes))
        if self.bops is not None:
            fixed = sum(s.macs * b.weight_bits * b.act_bits for s, b in pinned)
            per_bit = tuple(s.macs * b.act_bits for s, b in searched)
            found.append(LinearConstraint("bit operations", per_bit, fixed, 1, self.bops))
        return found


def check_reachable(constraints: Sequence[LinearConstraint], choices: Sequence[int]) -> None:
    """Raise RequestError, with the reachable range, if no policy fits the constraints."""
    for constraint in constraints:
        count = len(constraint.per_bit)
        least = constraint.cost([min(choices)] * count)
        most = constraint.cost([max(choices)] * count)
        if least > constraint.limit:
            raise RequestError(
                f"budget: {constraint.name} must be at least {least:.10g} with bit choices "
                f"{','.join(map(str, choices))} (reachable {least:.10g} to {most:.10g}), got "
                f"{constraint.limit:.10g}; raise the budget or offer fewer bits"
            )
