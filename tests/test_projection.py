"""The projection onto a budget against every policy there is, for problems small enough."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdq.cost import Constraint, Pair
from sdq.errors import RequestError, RunError
from sdq.projection import SLACK, project


def linear(
    name: str, counts: tuple[int, ...], fixed: int, divisor: int, limit: float,
    choices: tuple[int, ...],
) -> Constraint:  # fmt: skip
    """A cost of ``counts`` for each bit."""
    single = tuple(tuple(count * b for b in choices) for count in counts)
    return Constraint(name, limit, divisor, fixed, single, (), (choices,) * len(counts))


def average(counts: tuple[int, ...], limit: float, choices: tuple[int, ...]) -> Constraint:
    return linear("average weight bits", counts, 0, sum(counts), limit, choices)


def bits_of(
    utilities: list[list[float]], choices: tuple[int, ...], constraints: list[Constraint]
) -> list[int]:
    return [choices[k] for k in project(utilities, constraints)]


def total(utilities: list[list[float]], picks: "list[int] | tuple[int, ...]") -> float:
    return sum(row[k] for row, k in zip(utilities, picks, strict=True))


def best_by_hand(utilities: list[list[float]], constraints: list[Constraint]) -> float:
    """The greatest utility that ``project`` promises, from the list of all policies."""
    every = list(itertools.product(*(range(len(row)) for row in utilities)))
    fitting = [p for p in every if all(c.cost(p) <= c.limit for c in constraints)]
    # every constraint is used to within 2 %, or as far as any policy can
    floors = [min(max(c.cost(p) for p in fitting), c.limit * (1 - SLACK)) for c in constraints]
    near = [[c.cost(p) >= f for c, f in zip(constraints, floors, strict=True)] for p in fitting]
    wanted = all if any(map(all, near)) else any  # where one policy can for all; else one of them
    return max(total(utilities, p) for p, which in zip(fitting, near, strict=True) if wanted(which))


@st.composite
def problems(
    draw: st.DrawFn,
) -> tuple[list[list[float]], list[Constraint]]:
    choices = tuple(sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=4))))
    layers = draw(st.integers(1, 5))
    size = st.integers(1, 5000)
    counts = [
        tuple(draw(st.lists(size, min_size=layers, max_size=layers)))
        for _ in range(draw(st.integers(1, 3)))
    ]
    constraints = []
    for index, per_bit in enumerate(counts):
        fixed, divisor = draw(st.integers(0, 3000)), draw(st.sampled_from([1, 8, sum(per_bit)]))
        bare = linear(f"limit {index}", per_bit, fixed, divisor, 1.0, choices)
        low = bare.cost([0] * layers)
        high = bare.cost([len(choices) - 1] * layers)
        limit = low + draw(st.floats(0, 1.1)) * (high - low)
        if draw(st.booleans()):  # a limit that some policy meets exactly
            picks = st.integers(0, len(choices) - 1)
            limit = bare.cost(draw(st.lists(picks, min_size=layers, max_size=layers)))
        constraints.append(linear(bare.name, per_bit, fixed, divisor, limit, choices))
    # a grid of utilities: the solver's own tolerance (1e-6) must not decide between policies
    number = st.integers(-400, 400).map(lambda n: n / 100)
    utilities = [
        draw(st.lists(number, min_size=len(choices), max_size=len(choices))) for _ in range(layers)
    ]
    return utilities, constraints


@st.composite
def coupled(draw: st.DrawFn) -> tuple[list[list[float]], list[Constraint]]:
    """Layers whose cost is a product of weight and activation bits; some share an activation."""
    widths, acts = (1, 2, 4), (2, 4)
    layers = draw(st.integers(1, 3))
    inputs = draw(st.integers(1, layers))
    macs = draw(st.lists(st.integers(1, 500), min_size=layers, max_size=layers))
    pairs = tuple(
        Pair(i, layers + min(i, inputs - 1), tuple(tuple(m * w * a for a in acts) for w in widths))
        for i, m in enumerate(macs)
    )
    single = ((0,) * 3,) * layers + ((0,) * 2,) * inputs
    share = draw(st.floats(0.13, 1.1))
    limit = share * sum(macs) * 16
    if share < 0.14:
        limit = sum(macs) * 2
    constraint = Constraint("bit operations", limit, 1, 0, single, pairs)
    number = st.integers(-400, 400).map(lambda n: n / 100)
    rows = [draw(st.lists(number, min_size=len(r), max_size=len(r))) for r in single]
    return rows, [constraint]


@settings(deadline=None, max_examples=120)
@given(st.one_of(problems(), coupled()))
def test_projection_is_the_best_of_all_policies(
    problem: tuple[list[list[float]], list[Constraint]],
) -> None:
    utilities, constraints = problem
    try:
        picks = project(utilities, constraints)
    except RunError:  # each limit can be met, but not all of them by one policy
        every = itertools.product(*(range(len(row)) for row in utilities))
        assert not any(all(c.cost(p) <= c.limit for c in constraints) for p in every)
        return
    assert all(type(k) is int for k in picks)
    assert all(c.cost(picks) <= c.limit for c in constraints)
    # 1e-6: the solver's tolerance on the objective
    expected = best_by_hand(utilities, constraints)
    assert total(utilities, picks) == pytest.approx(expected, abs=1e-6)


def test_projection_spends_the_budget_even_if_fewer_bits_are_likelier() -> None:
    utilities = [[0.0, -5.0, -9.0]] * 4
    bits = bits_of(utilities, (1, 2, 4), [average((10, 10, 10, 10), 2.0, (1, 2, 4))])
    assert sum(bits) / 4 == 2.0


def test_projection_prefers_the_likelier_layers() -> None:
    utilities = [[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, -1.0]]
    # two of the four may have 4 bits
    assert bits_of(utilities, (2, 4), [average((5, 5, 5, 5), 3.0, (2, 4))]) == [2, 4, 4, 2]


def test_equality_is_within_the_budget() -> None:
    counts = (2304, 4608, 9216, 36864)
    four = (1, 2, 3, 4)
    bits = bits_of([[0.0, 1.0, 2.0, 3.0]] * 4, four, [average(counts, 3.0, four)])
    assert np.dot(bits, counts) / sum(counts) <= 3.0
    assert np.dot(bits, counts) / sum(counts) >= 3.0 * (1 - SLACK)
    lowest = bits_of([[0.0, 9.0]] * 4, (1, 2), [average(counts, 1.0, (1, 2))])
    assert lowest == [1, 1, 1, 1]
    highest = bits_of([[0.0, 9.0]] * 4, (1, 2), [average(counts, 2.0, (1, 2))])
    assert highest == [2, 2, 2, 2]


def test_a_hair_below_a_policy_s_cost_excludes_it() -> None:
    counts = (1_000_000, 1_000_000)
    limit = np.nextafter(3.0, 0)
    bits = bits_of([[0.0, 9.0]] * 2, (2, 4), [average(counts, limit, (2, 4))])
    assert bits == [2, 2]


def test_a_generous_budget_gives_every_layer_the_most_bits() -> None:
    generous = average((1, 2, 3), 100.0, (2, 8))
    assert bits_of([[0.0, -3.0]] * 3, (2, 8), [generous]) == [8, 8, 8]


def test_no_layers_give_no_bits() -> None:
    assert project([], [linear("weight bytes", (), 80, 8, 100.0, (2, 4))]) == []


def test_too_small_a_budget_is_refused_with_the_reachable_range() -> None:
    message = "average weight bits must be at least 2 with bit choices 2,4 (reachable 2 to 4)"
    with pytest.raises(RequestError, match=re.escape(message)):
        project([[0.0, 1.0]] * 2, [average((3, 4), 1.9, (2, 4))])


def test_several_limits_are_all_used_where_one_policy_can() -> None:
    # weights and activations are limited apart: nothing is gained by leaving either unused
    weights = Constraint("weights", 4.0, 2, 0, ((2, 4, 8), (2, 4, 8), (0, 0), (0, 0)))
    acts = Constraint("activations", 6.0, 2, 0, ((0, 0, 0), (0, 0, 0), (4, 8), (4, 8)))
    picks = project([[0.0, 1.0, 1.5], [0.0, 2.0, 2.1], [0.0, -1.0], [0.0, -2.0]], [weights, acts])
    assert (weights.cost(picks), acts.cost(picks)) == (4.0, 6.0)
    assert picks == [1, 1, 1, 0]


def test_limits_that_exclude_each_other_are_named() -> None:
    first = Constraint("first", 3.0, 1, 0, ((2, 4),))
    second = Constraint("second", 3.0, 1, 0, ((4, 2),))
    with pytest.raises(RunError, match="no policy meets all of them: first <= 3, second <= 3"):
        project([[0.0, 1.0]], [first, second])


def test_a_thousand_channels_are_solved_to_a_small_gap() -> None:
    rng = np.random.default_rng(0)
    counts = tuple(int(x) for x in np.repeat([144, 288, 576], 300))
    rows = rng.normal(0, 3, (900, 4)).cumsum(axis=1).tolist()
    constraint = average(counts, 2.0, (1, 2, 3, 4))
    picks = project(rows, [constraint])
    assert 2.0 * (1 - SLACK) <= constraint.cost(picks) <= 2.0


def test_a_large_network_of_equal_layers_is_solved() -> None:
    rng = np.random.default_rng(0)
    counts = tuple(int(x) for x in rng.choice([2304, 9216, 36864], 60))
    utilities = rng.normal(0, 3, (60, 6)).tolist()
    constraint = average(counts, 2.5, (1, 2, 3, 4, 6, 8))
    picks = project(utilities, [constraint])
    assert 2.5 * (1 - SLACK) <= constraint.cost(picks) <= 2.5
    # at least as good as the relaxation's greedy rounding: bits bought by utility a weight
    greedy = [0] * 60
    for _ in range(400):
        moves = [
            ((utilities[i][k + 1] - utilities[i][k]) / counts[i], i)
            for i, k in enumerate(greedy)
            if k < 5
        ]
        for gain, i in sorted(moves, reverse=True):
            trial = greedy.copy()
            trial[i] += 1
            if gain > 0 and constraint.cost(trial) <= 2.5:
                greedy = trial
                break
        else:
            break
    by_greedy = sum(u[k] for u, k in zip(utilities, greedy, strict=True))
    assert total(utilities, picks) >= by_greedy - 1e-6


def test_a_cost_in_seconds_is_as_good_as_one_in_cycles() -> None:
    """The solver's own gap is a millionth, which is a long time."""
    cycles = ((1, 2, 4), (2, 4, 8), (4, 8, 16))
    utilities = [[0.0, 1.0, 2.0]] * 4
    for unit in (1.0, 2e-9):
        table = tuple(tuple(c * unit for c in row) for row in cycles)
        pairs = (Pair(0, 2, table), Pair(1, 3, table))
        constraint = Constraint("latency", 10.5 * unit, 1, 0, ((0.0,) * 3,) * 4, pairs)
        picks = project(utilities, [constraint])
        assert constraint.cost(picks) == pytest.approx(10 * unit)  # 2 + 8
        assert total(utilities, picks) == 4
