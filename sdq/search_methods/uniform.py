"""The same bitwidth everywhere: the most the budget allows."""

from sdq.errors import RequestError
from sdq.search_problem import SearchProblem

CHOOSES_ACTS, CHOOSES_CHANNELS = True, True


def choose(problem: SearchProblem) -> list[int]:
    """Return for every unit its highest candidate that is at most the one common bitwidth.

    Activations, if they are to be chosen too, take the fixed bitwidth of the configuration or the
    next lower candidate.

    Raises:
        RequestError: not even the lowest candidates are within the budget.
    """
    units = problem.space.units
    act_bits = problem.qmodel.config.act_bits
    widths = sorted({b for unit in units if not unit.is_act for b in unit.choices})
    acts = sorted({b for unit in units if unit.is_act for b in unit.choices if b <= act_bits})

    def at(bits: int, act: int) -> list[int]:
        return [_at_most(unit.choices, act if unit.is_act else bits) for unit in units]

    for act in reversed(acts or [act_bits]):
        for bits in reversed(widths or [0]):
            picks = at(bits, act)
            if all(c.cost(picks) <= c.limit for c in problem.constraints):
                return picks
    raise RequestError(
        "search: no uniform bitwidth meets the budget; raise it, or use --search-method sdq"
    )


def _at_most(choices: tuple[int, ...], bits: int) -> int:
    return max((i for i, b in enumerate(choices) if b <= bits), default=0)
