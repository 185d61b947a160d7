"""Stochastic quantization between adjacent bitwidths: probabilities, gradient, moves, QER."""

import math

import pytest
import torch
from torch import Tensor

from sdq.learned_scale import ActQuantizer, WeightQuantizer
from sdq.stochastic import (
    LARGEST_LOG_ODDS,
    BitwidthParameters,
    StochasticActQuantizer,
    StochasticWeightQuantizer,
    gumbel_bernoulli,
    logit,
)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*(shape or (6, 4, 3, 3)), generator=torch.Generator().manual_seed(seed))


def parameters(*choices: tuple[int, ...], seed: int = 0, **options: object) -> BitwidthParameters:
    found = BitwidthParameters(choices, **options)
    found.generator = torch.Generator().manual_seed(seed)
    return found


def layer(
    w: Tensor, choices: tuple[int, ...] = (2, 4, 8), seed: int = 0, **options: object
) -> tuple[StochasticWeightQuantizer, BitwidthParameters]:
    bits = parameters(choices, seed=seed, **options)
    return StochasticWeightQuantizer(
        [WeightQuantizer(w, b, True) for b in choices], bits, [0]
    ), bits


def set_beta_(found: BitwidthParameters, beta: float, unit: int = 0) -> None:
    found.theta.data[unit, int(found.level[unit]) - 1] = logit(beta)


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
    found, bits = layer(w, seed=seed)
    bits.temperature = tau
    set_beta_(bits, 0.6)
    g = weight(seed=seed + 10)
    bits.draw_()
    (found(w)[0] * g).sum().backward()
    u = torch.rand(1, generator=torch.Generator().manual_seed(seed))[0]
    y = torch.sigmoid((logit(0.6) + torch.log(u / (1 - u))) / tau)
    high, low = found.candidates[2](w)[0], found.candidates[1](w)[0]
    by_beta = (g * (high - low)).sum() * y * (1 - y) / (tau * 0.6 * 0.4)
    by_theta = by_beta * 0.6 * 0.4  # beta = sigmoid(theta)
    # float32, and sums of 216 terms
    torch.testing.assert_close(bits.theta.grad[0, 1], by_theta.detach(), rtol=1e-4, atol=1e-6)
    assert float(bits.theta.grad[0, 0]) == 0.0  # the pair below is not active


def test_weight_gradient_is_straight_through_of_the_drawn_bitwidth() -> None:
    g = weight(seed=3)
    seen = set()
    for seed in range(8):
        w = weight().requires_grad_()
        found, bits = layer(w.detach(), seed=seed)
        set_beta_(bits, 0.5)
        bits.draw_()
        found(w)[0].backward(g)
        candidate = found.candidates[2 if float(bits.share().detach()) else 1]
        code = w / candidate.scale
        inside = (code > -(2 ** (candidate.bits - 1))) & (code < 2 ** (candidate.bits - 1) - 1)
        assert torch.equal(w.grad, g * inside)
        seen.add(candidate.bits)
    assert seen == {4, 8}


def test_a_training_draw_is_exactly_one_of_the_two_quantized_weights() -> None:
    w = weight()
    found, bits = layer(w)
    set_beta_(bits, 0.5)
    seen = []
    for _ in range(40):
        bits.draw_()
        higher = float(bits.share().detach())
        assert torch.equal(found(w)[0], found.candidates[2 if higher else 1](w)[0])
        seen.append(higher)
    assert set(seen) == {0.0, 1.0}


def test_a_pass_after_a_move_has_the_new_pair() -> None:
    """Also if nobody has drawn since: bitwidths and share are of the same pair."""
    w = weight()
    found, bits = layer(w)
    set_beta_(bits, 0.01)
    bits.draw_()
    bits.move_(decay_below=0.05, rise_above=None)
    assert int(bits.level) == 1
    values = found(w)[0]
    higher = float(bits.share().detach())
    assert torch.equal(values, found.candidates[1 if higher else 0](w)[0])


def test_interpolation_mixes_in_the_proportion_of_beta() -> None:
    w = weight()
    found, bits = layer(w, mixing="interpolate")
    set_beta_(bits, 0.3)
    bits.draw_()
    high, low = found.candidates[2](w)[0], found.candidates[1](w)[0]
    torch.testing.assert_close(found(w)[0], 0.3 * high + 0.7 * low)


def test_one_draw_serves_a_whole_forward_pass_and_the_generator_repeats_it() -> None:
    w = weight()
    runs = []
    for _ in range(2):
        found, bits = layer(w, seed=5)
        set_beta_(bits, 0.5)
        runs.append([])
        for _ in range(30):
            bits.draw_()
            first, again = found(w)[0], found(w)[0]
            assert torch.equal(first, again)
            runs[-1].append(float(bits.share().detach()))
    assert runs[0] == runs[1]
    assert set(runs[0]) == {0.0, 1.0}


def test_the_global_generator_is_left_alone() -> None:
    found, bits = layer(weight())
    before = torch.get_rng_state()
    bits.draw_()
    found(weight())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("beta", "bits"), [(0.51, 8), (0.5, 8), (0.49, 4), (0.01, 4)])
def test_evaluation_takes_the_more_probable_bitwidth(beta: float, bits: int) -> None:
    w = weight()
    found, drawn = layer(w)
    drawn.eval()
    set_beta_(drawn, beta)
    for _ in range(5):
        drawn.draw_()
        assert torch.equal(found(w)[0], WeightQuantizer(w, bits, True)(w)[0])


def test_a_single_candidate_draws_nothing() -> None:
    w = weight()
    found, bits = layer(w, choices=(3,))
    assert bits.theta.numel() == 0
    bits.draw_()
    assert torch.equal(found(w)[0], WeightQuantizer(w, 3, True)(w)[0])
    assert (float(bits.expected_bits().detach()), float(bits.beta().detach())) == (3.0, 1.0)
    bits.move_(0.1, 0.9)
    assert int(bits.level) == 0
    assert bits.utilities() == [[0.0]]


def test_units_with_fewer_candidates_stand_beside_others() -> None:
    bits = parameters((2, 4, 8), (3,), (1, 2))
    assert bits.level.tolist() == [2, 0, 1]
    assert bits.beta().tolist() == pytest.approx([0.8, 1.0, 0.8])
    p = bits.probabilities().detach()
    torch.testing.assert_close(p, torch.tensor([[0, 0.2, 0.8], [1.0, 0, 0], [0.2, 0.8, 0]]))
    assert [len(row) for row in bits.utilities()] == [3, 1, 2]
    bits.theta.data[:] = 30.0
    bits.move_(0.1, 0.97)
    assert bits.level.tolist() == [2, 0, 1]  # each at its own top


def test_channels_draw_by_themselves() -> None:
    w = weight()
    bits = parameters(*[(2, 4)] * 6)
    found = StochasticWeightQuantizer([WeightQuantizer(w, b, True) for b in (2, 4)], bits, range(6))
    for unit in range(6):
        set_beta_(bits, 0.5, unit)
    seen = set()
    for _ in range(20):
        bits.draw_()
        share = bits.share().detach()
        values, scale = found(w)[:2]
        for k in range(6):
            candidate = found.candidates[int(share[k])]
            assert torch.equal(values[k], candidate(w)[0][k])
        assert torch.equal(scale, found.candidates[1].scale)
        seen.add(tuple(share.tolist()))
    assert len(seen) > 5
    error = (found.candidates[1](w)[0] - w) / found.candidates[1].scale
    torch.testing.assert_close(found.residual(), error.square().reshape(6, -1).mean(1).detach())


def test_an_activation_draws_like_a_weight() -> None:
    x = weight(64, 8).relu()
    candidates = [ActQuantizer(b, signed=False) for b in (2, 4)]
    for candidate in candidates:
        candidate.observing = True
        candidate(x)
        candidate.settle_()
    bits = parameters((2, 4))
    set_beta_(bits, 0.5)
    found = StochasticActQuantizer(candidates, bits, 0)
    seen = set()
    for _ in range(20):
        bits.draw_()
        higher = int(bits.share().detach())
        assert torch.equal(found(x)[0], candidates[higher](x)[0])
        seen.add(higher)
    assert seen == {0, 1}
    found(x)[0].square().sum().backward()
    assert float(bits.theta.grad.abs().sum()) > 0


# --------------------------------------------------------------------------------------- moves


def test_units_start_at_the_highest_candidate() -> None:
    found = parameters((1, 2, 3, 4), entry_beta=0.8)
    assert int(found.level) == 3
    assert float(found.beta().detach()) == pytest.approx(0.8, rel=1e-6)  # float32
    assert float(found.expected_bits().detach()) == pytest.approx(0.8 * 4 + 0.2 * 3, rel=1e-6)


@pytest.mark.parametrize(("start", "level"), [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_start_is_kept_among_the_pairs(start: int, level: int) -> None:
    assert int(parameters((1, 2, 3, 4), start=[start]).level) == level


def test_untried_steps_are_ranked_by_their_distance() -> None:
    found = parameters((1, 2, 3, 4, 6), start=[2], entry_beta=0.8)
    e = math.log(4)  # logit(.8)
    assert found.theta[0].tolist() == pytest.approx([2 * e, e, -e, -2 * e], rel=1e-6)  # float32


def test_utility_is_the_sum_of_the_log_odds_below() -> None:
    found = parameters((1, 2, 4, 8))
    found.theta.data[0] = torch.tensor([1.5, 0.25, -2.0])
    assert found.utilities() == [[0.0, 1.5, 1.75, -0.25]]


def test_decay_drops_a_bitwidth_and_the_next_pair_enters() -> None:
    found = parameters((1, 2, 3), entry_beta=0.8)
    set_beta_(found, 0.11)
    found.move_(0.1, None)
    assert int(found.level) == 2  # not below the threshold
    set_beta_(found, 0.09)
    found.move_(0.1, None)
    assert int(found.level) == 1
    assert float(found.beta().detach()) == pytest.approx(0.8, rel=1e-6)
    # what was learned stays
    assert float(found.theta.detach()[0, 1]) == pytest.approx(logit(0.09), rel=1e-5)
    set_beta_(found, 0.03)
    found.move_(0.1, None)
    assert int(found.level) == 1  # the lowest pair stays open
    assert float(found.expected_bits().detach()) == pytest.approx(0.03 * 2 + 0.97 * 1, rel=1e-5)


def test_rise_opens_the_next_pair_unless_it_is_forbidden_or_the_top() -> None:
    found = parameters((1, 2, 3), start=[1], entry_beta=0.8)
    set_beta_(found, 0.975)
    found.move_(0.1, None)
    assert int(found.level) == 1
    found.move_(0.1, 0.97)
    assert int(found.level) == 2
    assert float(found.beta().detach()) == pytest.approx(0.2, rel=1e-6)
    set_beta_(found, 0.975)
    found.move_(0.1, 0.97)
    assert int(found.level) == 2


def test_one_unit_s_move_leaves_the_others() -> None:
    found = parameters((1, 2, 3), (1, 2, 3), (1, 2, 3), start=[2, 1, 2])
    set_beta_(found, 0.05, 0)
    set_beta_(found, 0.98, 1)
    before = found.theta[2].tolist()
    found.move_(0.1, 0.97)
    assert found.level.tolist() == [1, 2, 2]
    assert found.theta[2].tolist() == before


def test_the_active_pair_can_always_turn_back() -> None:
    found = parameters((1, 2))
    for sign in (-1, 1):
        found.theta.data[0] = sign * 50.0
        found.move_(0.1, 0.97)
        assert float(found.theta.detach()) == sign * LARGEST_LOG_ODDS


@pytest.mark.parametrize("decay", [0.1, 0.0179, 1e-4])
@pytest.mark.parametrize("rise", [0.97, 0.99, 1 - 1e-4])
def test_every_threshold_can_be_reached(decay: float, rise: float) -> None:
    found = parameters((1, 2, 4, 8))
    for expected in (2, 1, 1):  # the lowest pair is left downwards by its probability alone
        found.theta.data.fill_(-50.0)
        found.move_(decay, rise)
        assert found.level.tolist() == [expected]
    for expected in (2, 3, 3):
        found.theta.data.fill_(50.0)
        found.move_(decay, rise)
        assert found.level.tolist() == [expected]
    assert found.theta.abs().max() <= 50.0
    assert float(found.beta().detach()) > rise  # at the top, and still able to turn back
    assert float(found.theta.detach()[0, 2]) < 10


def test_level_and_theta_are_saved() -> None:
    w = weight()
    (found, bits), (_, other) = layer(w, choices=(1, 2, 3)), layer(w, choices=(1, 2, 3))
    set_beta_(bits, 0.05)
    bits.move_(0.1, None)
    assert not [key for key in found.state_dict() if "theta" in key]  # the network's, once
    other.load_state_dict(bits.state_dict())
    assert int(other.level) == 1
    assert other.utilities() == bits.utilities()


# ----------------------------------------------------------------------------------------- errors


def test_residual_and_relative_error_against_hand_numbers() -> None:
    # one scale of 1/2, weights at residuals -.5 (a tie), .2, 0 and clipped by 2 codes
    w = torch.tensor([[0.25, 0.4, 1.0, 2.5]])
    candidates = [WeightQuantizer(w, b, per_channel=False) for b in (2, 3)]
    for candidate in candidates:
        candidate.base.fill_(0.5)
    found = StochasticWeightQuantizer(candidates, parameters((2, 3)), [0])
    found(w)
    # v = .5 .8 2 5; codes 0 1 2 3 (3 bits end at 3): residuals -.5 .2 0 -2
    high = (0.25 + 0.04 + 0 + 4) / 4
    assert float(found.residual()) == pytest.approx(high, rel=1e-6)  # float32
    # 2 bits end at 1: residuals -.5 .2 -1 -4
    low = (0.25 + 0.04 + 1 + 16) / 4
    assert float(found.relative_error()) == pytest.approx(high / low, rel=1e-6)
    assert found.weights_per_unit == 4
