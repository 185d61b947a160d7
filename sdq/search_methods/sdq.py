"""SDQ: differentiable bitwidth parameters, one bitwidth of a pair drawn in each step.

Source: Huang et al., "SDQ: Stochastic Differentiable Quantization with Mixed Precision", ICML
2022, section 3.2, https://arxiv.org/abs/2206.04459; steering and projection are ours.
"""

from sdq.gradient_search import learn
from sdq.search_problem import SearchProblem

CHOOSES_ACTS, CHOOSES_CHANNELS = True, True


def choose(problem: SearchProblem) -> list[int]:
    """Return the most probable candidates within the budget."""
    return learn(problem, "draw")
