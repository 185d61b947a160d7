"""Budgets as linear constraints, against costs summed by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdq.cost import Budget, Constraint, bit_operations
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.projection import check_reachable
from sdq.search_space import SearchSpace, Unit

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


WIDTHS = tuple(range(1, 9))


def space(
    choices: tuple[int, ...] = WIDTHS, acts: tuple[int, ...] = (), channels: bool = False
) -> SearchSpace:
    units = [Unit("a", choices, (1,)), Unit("b", choices, (2,))]
    if channels:
        units = [Unit(f"a[{k}]", choices, (1,), k) for k in range(8)] + units[1:]
    if acts:
        units += [
            Unit("a_input", acts, (1,), is_act=True),
            Unit("b_input", acts, (2,), is_act=True),
        ]
    return SearchSpace(LAYERS, policy(8, 8), tuple(units))


def only(budget: Budget, **options: object) -> Constraint:
    (found,) = budget.constraints(space(**options))
    return found


def test_specs_count_weights_and_biases() -> None:
    assert [spec.num_weights for spec in LAYERS] == [108, 288, 64, 80]
    assert [spec.num_params for spec in LAYERS] == [108, 288, 72, 90]


@given(a=st.integers(1, 8), b=st.integers(1, 8))
def test_costs_equal_the_policy_s_own_figures(a: int, b: int) -> None:
    given_policy = policy(a, b)
    average = (288 * a + 64 * b) / 352
    assert given_policy.avg_weight_bits == average
    picks = [a - 1, b - 1]
    assert only(Budget(avg_weight_bits=2.0)).cost(picks) == average
    in_bytes = (108 * 8 + 288 * a + 64 * b + 80 * 8) / 8
    assert given_policy.weight_bytes == in_bytes
    assert only(Budget(weight_bytes=400)).cost(picks) == in_bytes
    bops = 6912 * 64 + 18432 * a * 4 + 4096 * b * 3 + 80 * 64
    assert only(Budget(bops=1e6)).cost(picks) == bops


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([2, 4, 8]), st.sampled_from([2, 4, 8]))
def test_learned_activations_cost_what_the_policy_costs(a: int, b: int, x: int, y: int) -> None:
    acts = (2, 4, 8)
    picks = [a - 1, b - 1, acts.index(x), acts.index(y)]
    bops = 6912 * 64 + 18432 * a * x + 4096 * b * y + 80 * 64
    assert only(Budget(bops=1e6), acts=acts).cost(picks) == bops
    # 4 channels of 8 x 8 enter a, 8 enter b
    average = (256 * x + 512 * y) / 768
    assert only(Budget(avg_act_bits=4.0), acts=acts).cost(picks) == average
    chosen = space(acts=acts).policy_of(picks)
    assert [(u.weight_bits, u.act_bits) for u in chosen] == [(8, 8), (a, x), (b, y), (8, 8)]


def test_channels_share_their_layer_s_cost() -> None:
    bits = (1, 1, 2, 2, 3, 4, 4, 8)
    picks = [b - 1 for b in bits] + [1]
    constraint = only(Budget(weight_bytes=400), channels=True)
    assert constraint.cost(picks) == (108 * 8 + 36 * sum(bits) + 64 * 2 + 80 * 8) / 8
    chosen = space(channels=True).policy_of(picks)
    assert (chosen["a"].weight_bits, chosen["a"].channel_bits) == (8, bits)
    assert chosen.weight_bytes == constraint.cost(picks)


def test_any_cost_function_of_a_layer_makes_a_budget() -> None:
    def cycles(spec: LayerSpec, weight_bits: int, act_bits: int) -> float:
        return spec.macs * (1.5 if weight_bits > 4 else 0.5) * act_bits

    constraint = only(Budget(costs=((cycles, 1e6),)))
    assert constraint.name == "cycles"
    fixed = 6912 * 1.5 * 8 + 80 * 1.5 * 8
    assert constraint.cost([3, 4]) == fixed + 18432 * 0.5 * 4 + 4096 * 1.5 * 3


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_cost_function_gives_non_negative_numbers(value: float) -> None:
    with pytest.raises(RequestError, match="of layer first must be a non-negative number, got"):
        only(Budget(costs=((lambda spec, w, a: value, 1.0),)))


def test_costs_of_one_name_are_told_apart() -> None:
    costs = ((lambda s, w, a: w, 90.0), (lambda s, w, a: a, 95.0), (bit_operations, 1e9))
    budget = Budget(costs=costs)
    found = [c.name for c in budget.constraints(space())]
    assert found == ["<lambda>", "<lambda> (2)", "bit_operations"]


def test_several_limits_give_several_constraints() -> None:
    budget = Budget(avg_weight_bits=2.0, weight_bytes=400, bops=1e6)
    found = budget.constraints(space())
    assert [c.name for c in found] == ["average weight bits", "weight bytes", "bit operations"]
    assert [c.limit for c in found] == [2.0, 400, 1e6]


def test_average_bits_are_of_all_layers_where_nothing_is_searched() -> None:
    """As the policy's own average is: a budget that pins make impossible is not passed over."""
    pinned = BitwidthPolicy((LayerBits("last", 8, 8, False, 80),))
    assert pinned.avg_weight_bits == 8.0
    both = Budget(avg_weight_bits=2.0, avg_act_bits=2.0)
    for constraint in both.constraints(SearchSpace(LAYERS[3:], pinned, ())):
        assert constraint.fixed / constraint.divisor == 8.0
        with pytest.raises(RequestError, match=r"must be at least 8, as no layer's bits are"):
            check_reachable([constraint])
    enough = Budget(avg_weight_bits=8.0).constraints(SearchSpace(LAYERS[3:], pinned, ()))
    check_reachable(enough)


def test_a_budget_limits_something() -> None:
    with pytest.raises(RequestError, match=r"must limit avg_weight_bits, .* got nothing"):
        Budget()


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["avg_weight_bits", "weight_bytes", "bops", "avg_act_bits"])
def test_a_budget_is_a_positive_number(name: str, value: float) -> None:
    with pytest.raises(RequestError, match="must be a positive number"):
        Budget(**{name: value})


def test_an_unreachable_budget_names_the_reachable_range() -> None:
    constraint = only(Budget(weight_bytes=200), choices=(2, 4, 8))
    # 188 bytes pinned, and 352 weights of 2 to 8 bits
    message = (
        "budget: weight bytes must be at least 276 with bit choices 2,4,8 "
        "(reachable 276 to 540), got 200; raise the budget or offer fewer bits"
    )
    with pytest.raises(RequestError, match=re.escape(message)):
        check_reachable([constraint])


def test_the_least_cost_itself_is_reachable() -> None:
    check_reachable([only(Budget(avg_weight_bits=2.0), choices=(2, 4, 8))])
    check_reachable([only(Budget(weight_bytes=276), choices=(2, 4, 8))])
    with pytest.raises(RequestError):
        check_reachable([only(Budget(avg_weight_bits=1.999999), choices=(2, 4, 8))])
