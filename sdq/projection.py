"""The most probable policy that fits the budget.

After a search every candidate of every unit has a utility; for SDQ it is the log-odds of the steps
between adjacent candidates, summed, and taking the steps as independent the log-probability of a
policy is, up to a constant, the sum over units. Maximising it under the constraints is a
multiple-choice knapsack; scipy's HiGHS solves it as an integer program. Costs that depend on the
bits of a weight and of its input at once enter through the product's usual exact linearisation.
"""

from collections.abc import Sequence

import numpy as np

from sdq.cost import Constraint
from sdq.errors import RequestError, RunError

SLACK = 0.02
"""How far below its budget a policy may end where the layers' sizes allow better."""

EXACT_UP_TO = 400
"""Units above which the integer program is solved to a gap of 1e-4 instead of 0: with single
channels as units it has thousands of variables, most of them alike."""


def project(utilities: Sequence[Sequence[float]], constraints: Sequence[Constraint]) -> list[int]:
    """Return one candidate a unit: of greatest total utility, never above a constraint.

    Every constraint is used to within 2 % of its limit (or as far as any policy within the budget
    uses it) where one policy can do that for all; else at least one of them is.

    Args:
        utilities: one row a unit, one entry a candidate.
        constraints: on the same units.

    Returns:
        The index of each unit's candidate.

    Raises:
        RequestError: the constraints cannot be met; the message gives the reachable range.
    """
    program = _Program([len(row) for row in utilities], constraints)
    program.check_reachable()
    if not utilities:
        return []
    gain = np.concatenate([np.asarray(row, dtype=np.float64) for row in utilities])
    floors = {}
    for index, constraint in enumerate(constraints):
        spent = program.solve(program.costs[index], {})
        if spent is None:
            raise RunError(
                "budget: the constraints must be met together, but no policy meets all of them: "
                + ", ".join(f"{c.name} <= {c.limit:.6g}" for c in constraints)
            )
        # the closest that any policy comes to this limit, or the permitted slack below it
        floors[index] = min(constraint.cost(spent), constraint.limit * (1 - SLACK))
    together = program.solve(program.padded(gain), floors)
    if together is not None:
        return together
    found = [program.solve(program.padded(gain), {i: floor}) for i, floor in floors.items()]
    return max(
        (picks for picks in found if picks is not None), key=lambda p: program.total(gain, p)
    )


def check_reachable(constraints: Sequence[Constraint]) -> None:
    """Raise RequestError, with the reachable range, if a constraint cannot be met by itself."""
    if constraints:
        _Program([len(row) for row in constraints[0].single], constraints).check_reachable()


class _Program:
    """The integer program: one variable for each candidate, then one for each pair of them."""

    def __init__(self, sizes: list[int], constraints: Sequence[Constraint]) -> None:
        from scipy import sparse  # half a second to import, and only a search needs it

        self.sizes, self.constraints = sizes, constraints
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.own = int(self.starts[-1])
        couples = sorted({(p.first, p.second) for c in constraints for p in c.pairs})
        offset, self.pair_starts = self.own, {}
        for couple in couples:
            self.pair_starts[couple] = offset
            offset += sizes[couple[0]] * sizes[couple[1]]
        self.count = offset
        self.costs = [self._cost_row(constraint) for constraint in constraints]
        rows = sparse.lil_matrix((len(sizes), self.count))
        for unit, size in enumerate(sizes):
            rows[unit, self.starts[unit] : self.starts[unit] + size] = 1
        self.pick_one = rows.tocsr()
        self.couplings = self._couplings()
        self.gap = 0.0 if len(sizes) <= EXACT_UP_TO else 1e-4

    def _cost_row(self, constraint: Constraint) -> np.ndarray:
        row = np.zeros(self.count)
        row[: self.own] = [cost for costs in constraint.single for cost in costs]
        for pair in constraint.pairs:
            start = self.pair_starts[(pair.first, pair.second)]
            table = np.asarray(pair.table, dtype=float).reshape(-1)
            row[start : start + len(table)] += table
        return row

    def _couplings(self) -> "np.ndarray | None":
        """Return rows that make a pair's variables the product of its units' variables.

        The sum over one index must be the other's variable; with one of each unit at 1, that
        leaves exactly the product.
        """
        from scipy import sparse

        if not self.pair_starts:
            return None
        height = sum(self.sizes[a] + self.sizes[b] for a, b in self.pair_starts)
        rows = sparse.lil_matrix((height, self.count))
        at = 0
        for (a, b), start in self.pair_starts.items():
            cells = start + np.arange(self.sizes[a] * self.sizes[b]).reshape(self.sizes[a], -1)
            for unit, lines in ((a, cells), (b, cells.T)):
                for k, line in enumerate(lines):
                    rows[at, line] = 1
                    rows[at, self.starts[unit] + k] = -1
                    at += 1
        return rows.tocsr()

    def padded(self, gain: np.ndarray) -> np.ndarray:
        """Return the objective over all variables."""
        return np.concatenate([gain, np.zeros(self.count - self.own)])

    def total(self, gain: np.ndarray, picks: Sequence[int]) -> float:
        """Return the utility of a choice."""
        return float(gain[self.starts[:-1] + np.asarray(picks)].sum())

    def solve(
        self, objective: np.ndarray, at_least: dict[int, float], *, bounded: bool = True
    ) -> list[int] | None:
        """Return the candidates of greatest objective within the constraints, or None.

        Args:
            objective: for each variable.
            at_least: for a constraint's index, the least it must cost.
            bounded: whether the limits hold.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp

        fixed = [LinearConstraint(self.pick_one, 1, 1)]
        if self.couplings is not None:
            fixed.append(LinearConstraint(self.couplings, 0, 0))
        room = np.array([c.limit * c.divisor - c.fixed for c in self.constraints])
        scale = np.maximum(np.abs(room), 1e-30)
        low = np.full(len(room), -np.inf)
        for index, least in at_least.items():
            constraint = self.constraints[index]
            floor = least * constraint.divisor - constraint.fixed
            low[index] = (floor - 1e-9 * abs(floor)) / scale[index]
        limits = np.stack(self.costs) / scale[:, None]
        largest = np.abs(objective).max(initial=0.0)
        if 0 < largest < 1:  # the solver's gap is absolute too, and seconds would all be within it
            objective = objective / largest
        # products of whole numbers are whole; said so, the solver rounds none of them away
        whole = np.ones(self.count)
        high = room / scale
        for attempt in range(8):  # the solver's tolerance may overstep by a millionth: tighten
            rows = [LinearConstraint(limits, low, high - attempt * 1e-6)] if bounded else []
            result = milp(
                -objective,
                integrality=whole,
                bounds=Bounds(0, 1),
                constraints=[*fixed, *rows],
                options={"mip_rel_gap": self.gap},
            )
            if result.x is None:
                return None
            picks = [
                int(result.x[start : start + size].argmax())
                for start, size in zip(self.starts, self.sizes, strict=False)
            ]
            if not bounded or all(c.cost(picks) <= c.limit for c in self.constraints):
                return picks
        return None

    def check_reachable(self) -> None:
        """Raise RequestError, with the reachable range, if a constraint cannot be met alone."""
        for constraint, costs in zip(self.constraints, self.costs, strict=True):
            least = constraint.cost(self._extreme(constraint, -costs))
            if least <= constraint.limit:
                continue
            most = constraint.cost(self._extreme(constraint, costs))
            bits = sorted({b for choices in constraint.choices for b in choices})
            if not bits:
                raise RequestError(
                    f"budget: {constraint.name} must be at least {least:.10g}, as no layer's bits "
                    f"are searched, got {constraint.limit:.10g}; raise the budget, or pin fewer "
                    "layers (first and last have --first-last-bits)"
                )
            raise RequestError(
                f"budget: {constraint.name} must be at least {least:.10g} with bit choices "
                f"{','.join(map(str, bits))} (reachable {least:.10g} to {most:.10g}), got "
                f"{constraint.limit:.10g}; raise the budget or offer fewer bits"
            )

    def _extreme(self, constraint: Constraint, objective: np.ndarray) -> list[int]:
        """Return the candidates of greatest objective, whatever they cost."""
        if not constraint.pairs:  # every unit by itself
            return [
                int(objective[start : start + size].argmax())
                for start, size in zip(self.starts, self.sizes, strict=False)
            ]
        picks = self.solve(objective, {}, bounded=False)
        assert picks is not None  # nothing limits it
        return picks
