"""The sensitivity of each layer, measured, and an integer program.

A unit's loss increase at a candidate is the divergence from the float network's outputs with this
unit at it and all others at their highest. The policy of least total increase within the budget
follows exactly. Unlike ``greedy``, which measures as it goes, one unit's figure does not depend on
what others gave up before it, so that layers whose errors happen to cancel are not taken for
robust ones.

Source: Cai et al., "ZeroQ", CVPR 2020, https://arxiv.org/abs/2001.00281 (its measure of
sensitivity); the integer program: Yao et al., "HAWQ-V3", ICML 2021,
https://arxiv.org/abs/2011.10680.
"""

from sdq.divergence import Divergence
from sdq.search_problem import SearchProblem

CHOOSES_ACTS, CHOOSES_CHANNELS = False, False

IMAGES = 128
"""On which the divergence is measured."""


def choose(problem: SearchProblem) -> list[int]:
    """Return the candidates of least total divergence within the budget."""
    measure = Divergence(problem, problem.images(IMAGES))
    units = problem.space.units
    highest = [len(unit.choices) - 1 for unit in units]
    utilities = []
    for u, unit in enumerate(units):
        row = [-measure([*highest[:u], k, *highest[u + 1 :]]) for k in range(len(unit.choices))]
        utilities.append(row)
        problem.tell(0, 1, u + 1, len(units), -row[0])
    return problem.project(utilities)
