"""The most probable policy that fits the budget.

After the search every layer has log-odds for each step between adjacent candidates. Taking the
steps as independent, the log-probability of a policy is, up to a constant, the sum of the log-odds
of the steps taken. Maximising it under linear constraints is a small multiple-choice integer
program; scipy's HiGHS solves it exactly.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, milp
from scipy.optimize import LinearConstraint as Rows

from sdq.cost import LinearConstraint, check_reachable
from sdq.errors import RunError

SLACK = 0.02
"""How far below its budget a policy may end where the layers' sizes allow better."""


def project(
    utilities: Sequence[Sequence[float]],
    choices: Sequence[int],
    constraints: Sequence[LinearConstraint],
) -> list[int]:
    """Return one bitwidth a layer: of greatest total utility, never above a constraint.

    At least one constraint is used to within 2 % of its limit, unless no combination of bitwidths
    comes that close (then the closest), or every layer already has the highest bitwidth.

    Args:
        utilities: one row a layer, one entry a candidate.
        choices: ascending candidate bitwidths.
        constraints: on the layers, in the same order.

    Raises:
        RequestError: the constraints cannot be met; the message gives the reachable range.
    """
    check_reachable(constraints, choices)
    layers, candidates = len(utilities), len(choices)
    if not layers:
        return []
    # x[l * candidates + k] = 1 if layer l takes candidate k
    pick_one = np.kron(np.eye(layers), np.ones(candidates))
    costs = np.stack([np.kron(c.per_bit, choices).astype(np.float64) for c in constraints])
    room = np.array([c.limit * c.divisor - c.fixed for c in constraints])
    gain = np.asarray(utilities, dtype=np.float64).reshape(-1)

    def solve(objective: np.ndarray, at_least: np.ndarray) -> np.ndarray | None:
        scale = np.maximum(room, 1e-30)[:, None]
        tightened = 1.0
        for _ in range(8):  # the solver's own tolerance may overstep by a millionth: tighten
            result = milp(
                -objective,
                integrality=np.ones(len(objective)),
                bounds=Bounds(0, 1),
                constraints=[
                    Rows(pick_one, 1, 1),
                    Rows(costs / scale, at_least / scale[:, 0], tightened),
                ],
                options={"mip_rel_gap": 0.0},
            )
            if result.x is None:
                return None
            picks = result.x.reshape(layers, candidates).argmax(axis=1)
            if all(_fits(c, [choices[k] for k in picks]) for c in constraints):
                return picks
            tightened -= 1e-6
        return None

    free = np.full(len(constraints), -np.inf)
    best = None
    for index, constraint in enumerate(constraints):
        spent = solve(costs[index], free)
        if spent is None:
            break
        # the closest that any policy comes to this limit, or the permitted slack below it
        reachable = constraint.cost([choices[k] for k in spent])
        floor = min(reachable, constraint.limit * (1 - SLACK)) * constraint.divisor
        floor -= constraint.fixed
        at_least = free.copy()
        at_least[index] = floor - 1e-9 * abs(floor)
        picks = solve(gain, at_least)
        if picks is not None and (best is None or _total(gain, picks) > _total(gain, best)):
            best = picks
    if best is None:
        raise RunError(
            "budget: the constraints must be met together, but no policy meets all of them: "
            + ", ".join(f"{c.name} <= {c.limit:.6g}" for c in constraints)
        )
    return [int(choices[k]) for k in best]


def _fits(constraint: LinearConstraint, bits: Sequence[int]) -> bool:
    return constraint.cost(bits) <= constraint.limit


def _total(gain: np.ndarray, picks: np.ndarray) -> float:
    return float(np.take_along_axis(gain.reshape(len(picks), -1), picks[:, None], axis=1).sum())
