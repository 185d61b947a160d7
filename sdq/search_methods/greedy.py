"""Greedy sensitivity search: give away the bits that hurt least, one step at a time.

All units start at their highest candidate. In each step the unit goes one candidate down whose
loss increase, for what it saves, is least, until the budget is met. The loss is the divergence
from the float network's outputs on a few batches. Increases are measured again only when they
come up for the least (the lazy form of the greedy algorithm): they rarely fall as others give way.
"""

import heapq

from sdq.divergence import Divergence
from sdq.search_problem import SearchProblem

CHOOSES_ACTS, CHOOSES_CHANNELS = False, False

BATCHES = 2
"""Batches on which the divergence is measured."""


def choose(problem: SearchProblem) -> list[int]:
    """Return what is left when the budget is met."""
    measure = Divergence(problem, [images for images, _ in problem.batches(BATCHES)])
    units, constraints = problem.space.units, problem.constraints
    picks = [len(unit.choices) - 1 for unit in units]
    now = measure(picks)

    def over(candidate: list[int]) -> float:
        return sum(max(c.cost(candidate) / c.limit - 1, 0.0) for c in constraints)

    def price(unit: int) -> float:
        lower = picks.copy()
        lower[unit] -= 1
        saved = over(picks) - over(lower)
        return (measure(lower) - now) / saved if saved > 0 else float("inf")

    step, most = 0, over(picks)
    queue = []
    for u in range(len(units)):
        if picks[u]:
            queue.append((price(u), u, step))
        problem.tell(0, 2, u + 1, len(units), now)
    heapq.heapify(queue)
    while over(picks) > 0 and queue:
        _, unit, measured = heapq.heappop(queue)
        if measured < step:
            heapq.heappush(queue, (price(unit), unit, step))
            continue
        picks[unit] -= 1
        step += 1
        now = measure(picks)
        problem.tell(1, 2, int(len(units) * (1 - over(picks) / most)), len(units), now)
        if picks[unit]:
            heapq.heappush(queue, (price(unit), unit, step))
    # the last step may have saved more than was needed: spend what is left where it was reached
    return problem.project(
        [
            [-abs(k - pick) for k in range(len(u.choices))]
            for u, pick in zip(units, picks, strict=True)
        ]
    )
