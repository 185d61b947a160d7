"""Stochastic quantization between adjacent bitwidths: probabilities, gradient, moves, QER."""

import math

import pytest
import torch
from torch import Tensor

from sdq import quantizers
from sdq.learned_scale import WeightQuantizer
from sdq.stochastic import (
    LARGEST_LOG_ODDS,
    StochasticWeightQuantizer,
    gumbel_bernoulli,
    logit,
    quantization_error_regularizer,
)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (6, 4, 3, 3)), generator=torch.Generator().manual_seed(seed))


def layer(
    w: Tensor, choices: tuple[int, ...] = (2, 4, 8), seed: int = 0, **options: object
) -> StochasticWeightQuantizer:
    found = StochasticWeightQuantizer([WeightQuantizer(w, b, True) for b in choices], **options)
    found.generator = torch.Generator().manual_seed(seed)
    return found


def set_beta_(found: StochasticWeightQuantizer, beta: float) -> None:
    found.theta.data[int(found.level) - 1] = logit(beta)


# --------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("beta", [0.03, 0.3, 0.5, 0.9])
def test_the_draw_is_one_with_probability_beta(beta: float, temperature: float) -> None:
    n = 40_000
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(1))
    draws = gumbel_bernoulli(torch.full((n,), logit(beta)), temperature, uniform)
    assert set(draws.unique().tolist()) == {0.0, 1.0}
    # five standard deviations of a binomial share
    assert abs(float(draws.mean()) - beta) < 5 * math.sqrt(beta * (1 - beta) / n)


def test_the_draw_equals_the_argmax_of_two_gumbel_variables_in_distribution() -> None:
    n, beta, tau = 40_000, 0.7, 0.6
    rng = torch.Generator().manual_seed(2)
    g = -torch.log(-torch.log(torch.rand(n, 2, generator=rng)))
    soft = torch.softmax((torch.log(torch.tensor([beta, 1 - beta])) + g) / tau, dim=1)[:, 0]
    u = torch.rand(n, generator=rng)
    relaxed = torch.sigmoid((logit(beta) + torch.log(u) - torch.log1p(-u)) / tau)
    gap = (soft.sort().values - relaxed.sort().values).abs().max()
    at = torch.linspace(0.01, 0.99, 99)
    ours = torch.searchsorted(relaxed.sort().values, at) / n
    theirs = torch.searchsorted(soft.sort().values, at) / n
    # Kolmogorov-Smirnov, two samples of n: 1.95 sqrt(2 / n) has a chance of one in a thousand
    assert (ours - theirs).abs().max() < 1.95 * math.sqrt(2 / n), gap


@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_gradient_of_the_sample_is_that_of_the_relaxed_one(tau: float) -> None:
    theta = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    u = torch.linspace(0.05, 0.95, 13, dtype=torch.float64)
    gumbel_bernoulli(theta, tau, u).sum().backward()
    y = torch.sigmoid((theta.detach() + torch.log(u / (1 - u))) / tau)
    torch.testing.assert_close(theta.grad, y * (1 - y) / tau, rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_gradient_through_a_layer_is_the_derived_formula(seed: int, tau: float) -> None:
    # specification 1.3: dL/dbeta = <dL/dwq, Q_hi - Q_lo> y (1 - y) / (tau beta (1 - beta))
    w = weight()
    found = layer(w, seed=seed, temperature=tau)
    set_beta_(found, 0.6)
    g = weight(seed=seed + 10)
    (found(w)[0] * g).sum().backward()
    u = torch.rand((), generator=torch.Generator().manual_seed(seed))
    y = torch.sigmoid((logit(0.6) + torch.log(u / (1 - u))) / tau)
    high, low = found.candidates[2](w)[0], found.candidates[1](w)[0]
    by_beta = (g * (high - low)).sum() * y * (1 - y) / (tau * 0.6 * 0.4)
    by_theta = by_beta * 0.6 * 0.4  # beta = sigmoid(theta)
    # float32, and sums of 216 terms
    torch.testing.assert_close(found.theta.grad[1], by_theta.detach(), rtol=1e-4, atol=1e-6)
    assert float(found.theta.grad[0]) == 0.0  # the pair below is not active


def test_weight_gradient_is_straight_through_of_the_drawn_bitwidth() -> None:
    g = weight(seed=3)
    seen = set()
    for seed in range(8):
        w = weight().requires_grad_()
        found = layer(w.detach(), seed=seed)
        set_beta_(found, 0.5)
        values, scale, _, width = found(w)
        values.backward(g)
        bits = int(width)
        inside = (w / scale > -(2 ** (bits - 1))) & (w / scale < 2 ** (bits - 1) - 1)
        assert torch.equal(w.grad, g * inside)
        seen.add(bits)
    assert seen == {4, 8}


def test_a_training_draw_is_exactly_one_of_the_two_quantized_weights() -> None:
    w = weight()
    found = layer(w)
    set_beta_(found, 0.5)
    pair = {8: found.candidates[2](w), 4: found.candidates[1](w)}
    seen = []
    for _ in range(40):
        values, scale, zero_point, width = found(w)
        expected = pair[int(width)]
        assert torch.equal(values, expected[0])
        assert torch.equal(scale, expected[1])
        assert float(zero_point) == 0
        seen.append(int(width))
    assert set(seen) == {4, 8}


def test_one_draw_serves_the_whole_layer_and_the_generator_repeats_it() -> None:
    w = weight()
    runs = []
    for _ in range(2):
        found = layer(w, seed=5)
        set_beta_(found, 0.5)
        runs.append([int(found(w)[3]) for _ in range(30)])
    assert runs[0] == runs[1]


def test_the_global_generator_is_left_alone() -> None:
    found = layer(weight())
    before = torch.get_rng_state()
    found(weight())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("beta", "bits"), [(0.51, 8), (0.5, 8), (0.49, 4), (0.01, 4)])
def test_evaluation_takes_the_more_probable_bitwidth(beta: float, bits: int) -> None:
    w = weight()
    found = layer(w).eval()
    set_beta_(found, beta)
    for _ in range(5):
        values, _, _, width = found(w)
        assert int(width) == bits
        assert torch.equal(values, WeightQuantizer(w, bits, True)(w)[0])


def test_a_single_candidate_draws_nothing() -> None:
    w = weight()
    found = layer(w, choices=(3,))
    found.generator = None
    assert found.theta.numel() == 0
    assert torch.equal(found(w)[0], WeightQuantizer(w, 3, True)(w)[0])
    assert (found.expected_bits(), float(found.beta().detach())) == (3.0, 1.0)
    found.move_(0.1, 0.9)
    assert int(found.level) == 0
    assert float(quantization_error_regularizer([found], [1.0])) == 0.0


# --------------------------------------------------------------------------------------- moves


def test_layers_start_at_the_highest_candidate() -> None:
    found = layer(weight(), choices=(1, 2, 3, 4), entry_beta=0.8)
    assert int(found.level) == 3
    assert float(found.beta().detach()) == pytest.approx(0.8, rel=1e-6)  # float32
    assert found.expected_bits() == pytest.approx(0.8 * 4 + 0.2 * 3, rel=1e-6)


@pytest.mark.parametrize(("start", "level"), [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3), (None, 3)])
def test_start_is_kept_among_the_pairs(start: int | None, level: int) -> None:
    assert int(layer(weight(), choices=(1, 2, 3, 4), start=start).level) == level


def test_untried_steps_are_ranked_by_their_distance() -> None:
    found = layer(weight(), choices=(1, 2, 3, 4, 6), start=2, entry_beta=0.8)
    e = math.log(4)  # logit(.8)
    assert found.log_odds() == pytest.approx([2 * e, e, -e, -2 * e], rel=1e-6)  # float32


def test_decay_drops_a_bitwidth_and_the_next_pair_enters() -> None:
    found = layer(weight(), choices=(1, 2, 3), entry_beta=0.8)
    set_beta_(found, 0.11)
    found.move_(0.1, None)
    assert int(found.level) == 2  # not below the threshold
    set_beta_(found, 0.09)
    found.move_(0.1, None)
    assert int(found.level) == 1
    assert float(found.beta().detach()) == pytest.approx(0.8, rel=1e-6)
    assert found.log_odds()[1] == pytest.approx(logit(0.09), rel=1e-5)  # what was learned stays
    set_beta_(found, 0.03)
    found.move_(0.1, None)
    assert int(found.level) == 1  # the lowest pair stays open
    assert found.expected_bits() == pytest.approx(0.03 * 2 + 0.97 * 1, rel=1e-5)


def test_rise_opens_the_next_pair_unless_it_is_forbidden_or_the_top() -> None:
    found = layer(weight(), choices=(1, 2, 3), start=1, entry_beta=0.8)
    set_beta_(found, 0.975)
    found.move_(0.1, None)
    assert int(found.level) == 1
    found.move_(0.1, 0.97)
    assert int(found.level) == 2
    assert float(found.beta().detach()) == pytest.approx(0.2, rel=1e-6)
    set_beta_(found, 0.975)
    found.move_(0.1, 0.97)
    assert int(found.level) == 2


def test_the_active_pair_can_always_turn_back() -> None:
    found = layer(weight(), choices=(1, 2))
    for sign in (-1, 1):
        found.theta.data[0] = sign * 50.0
        found.move_(0.1, 0.97)
        assert float(found.theta.detach()[0]) == sign * LARGEST_LOG_ODDS


def test_level_and_theta_are_saved_with_the_network() -> None:
    w = weight()
    found, other = layer(w, choices=(1, 2, 3)), layer(weight(seed=1), choices=(1, 2, 3))
    set_beta_(found, 0.05)
    found.move_(0.1, None)
    other.load_state_dict(found.state_dict())
    assert int(other.level) == 1
    assert other.log_odds() == found.log_odds()
    assert torch.equal(other.eval()(w)[0], found.eval()(w)[0])


# ----------------------------------------------------------------------------------------- QER


def test_qer_against_hand_numbers() -> None:
    # one scale of 1/2, weights at residuals -.5 (a tie), .2, 0 and clipped by 2 codes
    w = torch.tensor([[0.25, 0.4, 1.0, 2.5]])
    candidates = [WeightQuantizer(w, b, per_channel=False) for b in (2, 3)]
    for candidate in candidates:
        candidate.base.fill_(0.5)
    found = StochasticWeightQuantizer(candidates)
    set_beta_(found, 0.75)
    found(w)
    # v = .5 .8 2 5; codes 0 1 2 3 (3 bits end at 3): residuals -.5 .2 0 -2
    mean_square = (0.25 + 0.04 + 0 + 4) / 4
    # float32
    assert float(found.residual) == pytest.approx(mean_square, rel=1e-6)
    value = quantization_error_regularizer([found], [1.0])
    assert float(value.detach()) == pytest.approx(0.75 * 12 * mean_square, rel=1e-6)
    value.backward()
    assert float(found.theta.grad[0]) == pytest.approx(
        0.75 * 0.25 * 12 * mean_square, rel=1e-6
    )  # dbeta/dtheta = beta (1 - beta), and never negative: bits fall unless the task resists
    assert all(p.grad is None for p in found.candidates.parameters())


def test_qer_weighs_layers_by_their_share() -> None:
    found = []
    for seed, beta in ((0, 0.6), (1, 0.9)):
        w = weight(seed=seed)
        one = layer(w)
        set_beta_(one, beta)
        one(w)
        found.append(one)
    single = [b * 12 * float(x.residual) for b, x in zip((0.6, 0.9), found, strict=True)]
    total = float(quantization_error_regularizer(found, [0.3, 0.7]).detach())
    assert total == pytest.approx(0.3 * single[0] + 0.7 * single[1], rel=1e-5)  # float32


def test_qer_is_near_one_for_fine_quantizers_with_beta_one() -> None:
    # rounding noise is uniform: its mean square is 1/12 of a step squared. The scale is such
    # that nothing is clipped
    w = torch.rand(4, 5000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = layer(w, choices=(4, 8), entry_beta=0.5)
    found.theta.data[0] = LARGEST_LOG_ODDS
    for candidate in found.candidates:
        candidate.base.fill_(1 / quantizers.code_range(candidate.bits, True)[1])
    found(w)
    value = float(quantization_error_regularizer([found], [1.0]).detach())
    # 20,000 draws of a variable with relative deviation .9: five standard errors
    assert value == pytest.approx(float(found.beta().detach()), rel=5 * 0.9 / math.sqrt(20_000))
