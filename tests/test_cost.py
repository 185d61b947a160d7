"""Budgets as linear constraints, against costs summed by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdq.cost import Budget, LinearConstraint, check_reachable
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy, LayerBits

LAYERS = (
    LayerSpec("first", "conv2d", (4, 3, 3, 3), (3, 8, 8), (4, 8, 8), 108 * 64, False),
    LayerSpec("a", "conv2d", (8, 4, 3, 3), (4, 8, 8), (8, 8, 8), 288 * 64, False),
    LayerSpec("b", "conv2d", (8, 8, 1, 1), (8, 8, 8), (8, 8, 8), 64 * 64, True),
    LayerSpec("last", "linear", (10, 8), (8,), (10,), 80, True),
)


def policy(a: int, b: int) -> BitwidthPolicy:
    return BitwidthPolicy(
        (
            LayerBits("first", 8, 8, False, 108),
            LayerBits("a", a, 4, True, 288),
            LayerBits("b", b, 3, True, 64),
            LayerBits("last", 8, 8, False, 80),
        )
    )


def only(budget: Budget) -> LinearConstraint:
    (found,) = budget.constraints(LAYERS, policy(8, 8))
    return found


def test_specs_count_weights_and_biases() -> None:
    assert [spec.num_weights for spec in LAYERS] == [108, 288, 64, 80]
    assert [spec.num_params for spec in LAYERS] == [108, 288, 72, 90]


@given(a=st.integers(1, 8), b=st.integers(1, 8))
def test_costs_equal_the_policy_s_own_figures(a: int, b: int) -> None:
    given_policy = policy(a, b)
    average = (288 * a + 64 * b) / 352
    assert given_policy.avg_weight_bits == average
    assert only(Budget(avg_weight_bits=2.0)).cost([a, b]) == average
    in_bytes = (108 * 8 + 288 * a + 64 * b + 80 * 8) / 8
    assert given_policy.weight_bytes == in_bytes
    assert only(Budget(weight_bytes=400)).cost([a, b]) == in_bytes
    bops = 6912 * 64 + 18432 * a * 4 + 4096 * b * 3 + 80 * 64
    assert only(Budget(bops=1e6)).cost([a, b]) == bops


def test_several_limits_give_several_constraints() -> None:
    budget = Budget(avg_weight_bits=2.0, weight_bytes=400, bops=1e6)
    found = budget.constraints(LAYERS, policy(8, 8))
    assert [c.name for c in found] == ["average weight bits", "weight bytes", "bit operations"]
    assert [c.limit for c in found] == [2.0, 400, 1e6]


def test_average_bits_do_not_bind_where_nothing_is_searched() -> None:
    pinned = BitwidthPolicy((LayerBits("last", 8, 8, False, 80),))
    assert Budget(avg_weight_bits=2.0).constraints(LAYERS[3:], pinned) == []


def test_a_budget_limits_something() -> None:
    with pytest.raises(RequestError, match="avg_weight_bits, weight_bytes or bops, got nothing"):
        Budget()


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["avg_weight_bits", "weight_bytes", "bops"])
def test_a_budget_is_a_positive_number(name: str, value: float) -> None:
    with pytest.raises(RequestError, match="must be a positive number"):
        Budget(**{name: value})


def test_an_unreachable_budget_names_the_reachable_range() -> None:
    constraint = only(Budget(weight_bytes=200))
    # 188 bytes pinned, and 352 weights of 2 to 8 bits
    message = (
        "budget: weight bytes must be at least 276 with bit choices 2,4,8 "
        "(reachable 276 to 540), got 200; raise the budget or offer fewer bits"
    )
    with pytest.raises(RequestError, match=re.escape(message)):
        check_reachable([constraint], (2, 4, 8))


def test_the_least_cost_itself_is_reachable() -> None:
    check_reachable([only(Budget(avg_weight_bits=2.0))], (2, 4, 8))
    check_reachable([only(Budget(weight_bytes=276))], (2, 4, 8))
    with pytest.raises(RequestError):
        check_reachable([only(Budget(avg_weight_bits=1.999999))], (2, 4, 8))
