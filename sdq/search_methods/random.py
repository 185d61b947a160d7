"""A random policy of the budget's size: what any search must beat."""

import torch

from sdq.batches import generator
from sdq.search_problem import SearchProblem

CHOOSES_ACTS, CHOOSES_CHANNELS = True, True


def choose(problem: SearchProblem) -> list[int]:
    """Return the candidates within the budget whose random utilities sum to most."""
    rng = generator(problem.config.seed, "random policy")
    utilities = [torch.randn(len(u.choices), generator=rng).tolist() for u in problem.space.units]
    return problem.project(utilities)
