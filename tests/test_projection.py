"""The projection onto a budget against every policy there is, for problems small enough."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdq.cost import LinearConstraint
from sdq.errors import RequestError
from sdq.projection import SLACK, project


def average(counts: tuple[int, ...], limit: float) -> LinearConstraint:
    return LinearConstraint("average weight bits", counts, 0, sum(counts), limit)


def total(utilities: list[list[float]], choices: tuple[int, ...], bits: list[int]) -> float:
    return sum(row[choices.index(b)] for row, b in zip(utilities, bits, strict=True))


def best_by_hand(
    utilities: list[list[float]], choices: tuple[int, ...], constraints: list[LinearConstraint]
) -> float:
    """The greatest utility that ``project`` promises, from the list of all policies."""
    every = list(itertools.product(choices, repeat=len(utilities)))
    fitting = [p for p in every if all(c.cost(p) <= c.limit for c in constraints)]
    found = []
    for c in constraints:  # one of them is used to within 2 %, or as far as any policy can
        closest = max(c.cost(p) for p in fitting)
        floor = min(closest, c.limit * (1 - SLACK))
        found += [total(utilities, choices, list(p)) for p in fitting if c.cost(p) >= floor]
    return max(found)


@st.composite
def problems(
    draw: st.DrawFn,
) -> tuple[list[list[float]], tuple[int, ...], list[LinearConstraint]]:
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
        bare = LinearConstraint(f"limit {index}", per_bit, fixed, divisor, 1.0)
        low = bare.cost([choices[0]] * layers)
        high = bare.cost([choices[-1]] * layers)
        limit = low + draw(st.floats(0, 1.1)) * (high - low)
        if draw(st.booleans()):  # a limit that some policy meets exactly
            limit = bare.cost(draw(st.lists(st.sampled_from(choices), min_size=layers,
                                            max_size=layers)))  # fmt: skip
        constraints.append(LinearConstraint(bare.name, per_bit, fixed, divisor, limit))
    # a grid of utilities: the solver's own tolerance (1e-6) must not decide between policies
    number = st.integers(-400, 400).map(lambda n: n / 100)
    utilities = [
        draw(st.lists(number, min_size=len(choices), max_size=len(choices))) for _ in range(layers)
    ]
    return utilities, choices, constraints


@settings(deadline=None, max_examples=120)
@given(problems())
def test_projection_is_the_best_of_all_policies(
    problem: tuple[list[list[float]], tuple[int, ...], list[LinearConstraint]],
) -> None:
    utilities, choices, constraints = problem
    bits = project(utilities, choices, constraints)
    assert all(type(b) is int and b in choices for b in bits)
    assert all(c.cost(bits) <= c.limit for c in constraints)
    # 1e-6: the solver's tolerance on the objective
    expected = best_by_hand(utilities, choices, constraints)
    assert total(utilities, choices, bits) == pytest.approx(expected, abs=1e-6)


def test_projection_spends_the_budget_even_if_fewer_bits_are_likelier() -> None:
    utilities = [[0.0, -5.0, -9.0]] * 4
    bits = project(utilities, (1, 2, 4), [average((10, 10, 10, 10), 2.0)])
    assert sum(bits) / 4 == 2.0


def test_projection_prefers_the_likelier_layers() -> None:
    utilities = [[0.0, 1.0], [0.0, 3.0], [0.0, 2.0], [0.0, -1.0]]
    # two of the four may have 4 bits
    assert project(utilities, (2, 4), [average((5, 5, 5, 5), 3.0)]) == [2, 4, 4, 2]


def test_equality_is_within_the_budget() -> None:
    counts = (2304, 4608, 9216, 36864)
    bits = project([[0.0, 1.0, 2.0, 3.0]] * 4, (1, 2, 3, 4), [average(counts, 3.0)])
    assert np.dot(bits, counts) / sum(counts) <= 3.0
    assert np.dot(bits, counts) / sum(counts) >= 3.0 * (1 - SLACK)
    lowest = project([[0.0, 9.0]] * 4, (1, 2), [average(counts, 1.0)])
    assert lowest == [1, 1, 1, 1]
    highest = project([[0.0, 9.0]] * 4, (1, 2), [average(counts, 2.0)])
    assert highest == [2, 2, 2, 2]


def test_a_hair_below_a_policy_s_cost_excludes_it() -> None:
    counts = (1_000_000, 1_000_000)
    limit = np.nextafter(3.0, 0)
    bits = project([[0.0, 9.0]] * 2, (2, 4), [average(counts, limit)])
    assert bits == [2, 2]


def test_a_generous_budget_gives_every_layer_the_most_bits() -> None:
    assert project([[0.0, -3.0]] * 3, (2, 8), [average((1, 2, 3), 100.0)]) == [8, 8, 8]


def test_no_layers_give_no_bits() -> None:
    assert project([], (2, 4), [LinearConstraint("weight bytes", (), 80, 8, 100.0)]) == []


def test_too_small_a_budget_is_refused_with_the_reachable_range() -> None:
    message = "average weight bits must be at least 2 with bit choices 2,4 (reachable 2 to 4)"
    with pytest.raises(RequestError, match=re.escape(message)):
        project([[0.0, 1.0]] * 2, (2, 4), [average((3, 4), 1.9)])


def test_a_large_network_of_equal_layers_is_solved() -> None:
    rng = np.random.default_rng(0)
    counts = tuple(int(x) for x in rng.choice([2304, 9216, 36864], 60))
    utilities = rng.normal(0, 3, (60, 6)).tolist()
    constraint = average(counts, 2.5)
    bits = project(utilities, (1, 2, 3, 4, 6, 8), [constraint])
    assert 2.5 * (1 - SLACK) <= constraint.cost(bits) <= 2.5
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
            if gain > 0 and constraint.cost([(1, 2, 3, 4, 6, 8)[k] for k in trial]) <= 2.5:
                greedy = trial
                break
        else:
            break
    by_greedy = sum(u[k] for u, k in zip(utilities, greedy, strict=True))
    assert total(utilities, (1, 2, 3, 4, 6, 8), bits) >= by_greedy - 1e-6
