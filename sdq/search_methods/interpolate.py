"""Linear interpolation between adjacent bitwidths, in all else like SDQ.

A forward pass uses ``beta Q_b(w) + (1 - beta) Q_b'(w)``: a mixture that no device computes, and
that hardens only at the end. What SDQ argues against.

Source: the idea of Yang and Jin, "FracBits", AAAI 2021, https://arxiv.org/abs/2007.02017.
"""

from sdq.gradient_search import learn
from sdq.search_problem import SearchProblem

CHOOSES_ACTS, CHOOSES_CHANNELS = True, True


def choose(problem: SearchProblem) -> list[int]:
    """Return the candidates of greatest weight in the mixture, within the budget."""
    return learn(problem, "interpolate")
