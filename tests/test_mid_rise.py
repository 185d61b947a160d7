"""DoReFa's and N2UQ's weight quantizers: numbers worked by hand, the formulas, gradients."""

import math

import pytest
import torch
from torch import Tensor, nn

from sdq import quantizers
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import QuantConfig, SearchConfig, TrainConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.finetune import FineTuning, finetune_
from sdq.learned_scale import WeightQuantizer
from sdq.losses import bin_regularization
from sdq.mid_rise import DorefaQuantizer, EntropyQuantizer, MidRiseQuantizer
from sdq.quant_model import QuantModel, quantize
from sdq.search import search
from sdq.stochastic import BitwidthParameters, StochasticWeightQuantizer
from sdq.train import weight_groups

BITS = (1, 2, 3, 4, 5, 6, 7, 8)
KINDS = (DorefaQuantizer, EntropyQuantizer)
Kind = type[MidRiseQuantizer]


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------ odd codes


def test_odd_codes_are_the_nearest_and_ties_go_up() -> None:
    u = torch.tensor([-9.0, -3.1, -2.1, -2.0, -1.9, -0.1, 0.0, 0.1, 1.9, 2.0, 2.1, 9.0])
    assert quantizers.odd_codes(u, 2).tolist() == [-3, -3, -3, -1, -1, -1, 1, 1, 1, 3, 3, 3]
    assert quantizers.odd_codes(u, 1).tolist() == [-1.0] * 6 + [1.0] * 6


@pytest.mark.parametrize("bits", BITS)
def test_there_are_two_to_the_bits_codes(bits: int) -> None:
    u = torch.linspace(-300, 300, 60_001)
    found = quantizers.odd_codes(u, bits).unique()
    assert found.tolist() == list(range(-(2**bits) + 1, 2**bits, 2))


# tanh is .8, -.4, .2, 0, -.8; over the maximum 1, -.5, .25, 0, -1
SQUASHED = torch.atanh(torch.tensor([[0.8, -0.4, 0.2, 0.0, -0.8]], dtype=torch.float64)).float()
BY_HAND_DOREFA = {
    1: [1, -1, 1, 1, -1],
    2: [3, -1, 1, 1, -3],  # 3, -1.5, .75, 0, -3
    3: [7, -3, 1, 1, -7],  # 7, -3.5, 1.75, 0, -7
    8: [255, -127, 63, 1, -255],  # 255, -127.5, 63.75, 0, -255
}


@pytest.mark.parametrize("bits", BY_HAND_DOREFA)
def test_dorefa_by_hand(bits: int) -> None:
    quantizer = DorefaQuantizer(SQUASHED, bits, per_channel=False)
    codes = BY_HAND_DOREFA[bits]
    assert quantizer.codes(SQUASHED).flatten().tolist() == codes
    w = [math.atanh(x) for x in (0.8, -0.4, 0.2, 0.0, -0.8)]
    scale = sum(c * x for c, x in zip(codes, w, strict=True)) / sum(c * c for c in codes)
    assert float(quantizer.scale.detach()) == pytest.approx(scale, rel=1e-6)  # float32
    paper = DorefaQuantizer(SQUASHED, bits, per_channel=False, paper=True)
    values = paper(SQUASHED)[0].flatten().tolist()
    assert values == pytest.approx([c / (2**bits - 1) for c in codes], rel=1e-6)


# the mean magnitude is 1.25; a code unit is that over 2^(b-1)
LOPSIDED = torch.tensor([[3.0, -1.0, 0.5, -0.5]])
BY_HAND_ENTROPY = {
    1: [1, -1, 1, -1],
    2: [3, -1, 1, -1],  # 4.8, -1.6, .8, -.8
    3: [7, -3, 1, -1],  # 9.6, -3.2, 1.6, -1.6
    8: [255, -103, 51, -51],  # 307.2, -102.4, 51.2, -51.2
}


@pytest.mark.parametrize("bits", BY_HAND_ENTROPY)
def test_entropy_by_hand(bits: int) -> None:
    quantizer = EntropyQuantizer(LOPSIDED, bits, per_channel=True)
    codes = BY_HAND_ENTROPY[bits]
    assert quantizer.codes(LOPSIDED).flatten().tolist() == codes
    w = LOPSIDED.flatten().tolist()
    scale = sum(c * x for c, x in zip(codes, w, strict=True)) / sum(c * c for c in codes)
    assert float(quantizer.scale.detach()) == pytest.approx(scale, rel=1e-6)  # float32
    paper = EntropyQuantizer(LOPSIDED, bits, per_channel=True, paper=True)
    unit = 1.25 / 2 ** (bits - 1)  # exact in float32, and so is every product below
    assert paper(LOPSIDED)[0].flatten().tolist() == [c * unit for c in codes]
    gamma = (2**bits - 1) / 2 ** (bits - 1)
    assert float(paper(LOPSIDED)[0].max()) == gamma * 1.25


def formula(
    kind: Kind, w: Tensor, bits: int, per_channel: bool, magnitude: Tensor | None
) -> Tensor:
    """The papers' levels ``magnitude (2k / n - 1)``, straight through rounding and clipping."""
    n = 2**bits - 1
    dims = list(range(1 if per_channel else 0, w.dim()))
    if kind is DorefaQuantizer:
        squashed = torch.tanh(w)
        v, size = squashed / squashed.abs().amax(dims, keepdim=True), torch.ones(())
    else:
        size = n / 2 ** (bits - 1) * w.detach().abs().mean(dims, keepdim=True)
        v = w / size
    v = v + (v.clamp(-1, 1) - v).detach()
    k = (v + 1) / 2 * n
    k = k + (k.round() - k).detach()
    return (size if magnitude is None else magnitude) * (2 * k / n - 1)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_papers_formula(kind: Kind, bits: int, per_channel: bool) -> None:
    w = weights(5, 4, 3, 3, dtype=torch.float64)
    quantizer = kind(w, bits, per_channel, paper=True)
    expected = formula(kind, w, bits, per_channel, None)
    # the scale is a float32 number
    torch.testing.assert_close(quantizer(w)[0], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind: Kind, bits: int, per_channel: bool) -> None:
    w = weights(5, 4, 3, 3, dtype=torch.float64).requires_grad_()
    g = weights(5, 4, 3, 3, seed=1, dtype=torch.float64)
    quantizer = kind(w.detach(), bits, per_channel)
    quantizer(w)[0].backward(g)
    plain = w.detach().clone().requires_grad_()
    magnitude = (quantizer.scale.detach() * (2**bits - 1)).requires_grad_()
    formula(kind, plain, bits, per_channel, magnitude).backward(g)
    torch.testing.assert_close(w.grad, plain.grad, rtol=1e-10, atol=1e-12)  # float64
    count = w.numel() / magnitude.numel()
    factor = quantizer.base * (2**bits - 1) / math.sqrt(count * (2**bits - 1))
    # the gain passes through float32 on its way
    torch.testing.assert_close(quantizer.gain.grad, magnitude.grad * factor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("per_channel", [False, True])
def test_the_gradient_of_dorefas_transform_equals_finite_differences(per_channel: bool) -> None:
    w = weights(3, 5, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x: quantizers.dorefa(x, 3, per_channel), (w,))


def test_weights_beyond_the_clip_keep_their_gradient() -> None:
    w = LOPSIDED.clone().requires_grad_()
    quantizer = EntropyQuantizer(LOPSIDED, 2, per_channel=True, paper=True)
    quantizer(w)[0].sum().backward()
    assert w.grad.flatten().tolist() == [1.0, 1.0, 1.0, 1.0]


# ------------------------------------------------------------------------------------ the point


def bin_entropy(codes: Tensor) -> float:
    share = codes.unique(return_counts=True)[1] / codes.numel()
    return float(-(share * share.log2()).sum())


@pytest.mark.parametrize("seed", range(3))
def test_entropy_fills_its_bins_more_evenly_than_the_others(seed: int) -> None:
    w = weights(100, 1000, seed=seed) * 0.05
    found = {
        kind: bin_entropy(kind(w, 2, per_channel=False).codes(w))
        for kind in (WeightQuantizer, *KINDS)
    }
    # of a Gaussian, borders at 0 and +-.798 standard deviations: shares .212 .288 .288 .212
    assert found[EntropyQuantizer] == pytest.approx(1.983, abs=0.002)
    assert found[EntropyQuantizer] > found[WeightQuantizer] + 0.1
    assert found[EntropyQuantizer] > found[DorefaQuantizer] + 0.1


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_scale_has_the_least_squared_error(
    kind: Kind, bits: int, per_channel: bool
) -> None:
    w = weights(4, 3, 3, 3)
    quantizer = kind(w, bits, per_channel)
    codes = quantizer.codes(w)
    dims = list(range(1 if per_channel else 0, 4))
    least = (codes * quantizer.scale.detach() - w).square().sum(dims)
    for share in (0.99, 1.01):
        assert ((codes * quantizer.scale.detach() * share - w).square().sum(dims) > least).all()


# --------------------------------------------------------------------------------- odd weights


@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("restrict", ["float", "power_of_two"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_dead_and_constant_channels(kind: Kind, bits: int, restrict: str, paper: bool) -> None:
    w = torch.zeros(3, 8)
    w[1], w[2, ::2], w[2, 1::2] = 0.3, 0.3, -0.3
    quantizer = kind(w, bits, True, restrict, paper=paper)
    w.requires_grad_()
    values = quantizer(w)[0]
    values.square().sum().backward()
    assert torch.isfinite(values).all()
    assert torch.isfinite(w.grad).all()
    if paper:
        return
    assert torch.isfinite(quantizer.gain.grad).all()
    assert values[0].abs().max() < 1e-5  # 255 times the smallest scale
    if restrict == "float":
        # one magnitude is one code: least squares meets it but for float32
        torch.testing.assert_close(values[1:], w[1:].detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_tensor_of_zeros(kind: Kind) -> None:
    w = torch.zeros(2, 3)
    assert kind(w, 2, per_channel=False)(w)[0].abs().max() < 1e-7


# ---------------------------------------------------------------------------------- the modules


@pytest.mark.parametrize("restrict", ["float", "power_of_two"])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantizer_returns_values_scale_zero_point_and_width(
    kind: Kind, per_channel: bool, restrict: str
) -> None:
    w = weights(4, 3, 3, 3)
    quantizer = kind(w, 3, per_channel, restrict)
    values, scale, zero_point, width = quantizer(w)
    assert torch.equal(values, quantizer.codes(w) * scale)
    assert scale.shape == ((4, 1, 1, 1) if per_channel else ())
    assert (float(zero_point), float(width)) == (0.0, 3.0)
    assert set(quantizer.state_dict()) == {"base", "gain"}
    if restrict == "power_of_two":
        assert (torch.frexp(scale).mantissa == 0.5).all()
    assert quantizer.odd
    assert [WeightQuantizer(w, bits, True).odd for bits in (1, 2, 8)] == [True, False, False]
    assert torch.equal(quantizer.double().scale, scale.double())


def test_one_bit_is_the_present_one_bit() -> None:
    w = weights(4, 30)
    lsq, ours = WeightQuantizer(w, 1, True), EntropyQuantizer(w, 1, True)
    assert torch.equal(lsq.codes(w), ours.codes(w))
    torch.testing.assert_close(lsq.scale, ours.scale, rtol=1e-6, atol=0)  # the mean of |w|, float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", [WeightQuantizer, *KINDS])
def test_frozen_weights_keep_their_codes(
    kind: type[WeightQuantizer], bits: int, dtype: torch.dtype
) -> None:
    w = weights(4, 200)
    quantizer = kind(w, bits, True)
    codes, values = quantizer.codes(w), quantizer(w)[0]
    if bits == 8 and kind is not WeightQuantizer:  # the transform would move them
        assert not torch.equal(quantizer.codes(values), codes)
    quantizer.freeze_()
    quantizer = quantizer.to(dtype)
    written = codes.to(dtype) * quantizer.scale
    assert torch.equal(quantizer.codes(written), codes.to(dtype))
    again = quantizer(written)[0]
    assert torch.equal(again, written)


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_magnitude_is_not_learned_and_follows_the_weights_in_training(
    kind: Kind,
) -> None:
    w = weights(4, 30)
    quantizer = kind(w, 3, True, paper=True)
    groups = weight_groups(quantizer, TrainConfig())
    assert not any(group["params"] for group in groups)
    before = quantizer(w)[0]
    quantizer.eval()
    torch.testing.assert_close(quantizer(2 * w)[1], quantizer.scale, rtol=0, atol=0)
    quantizer.train()
    after = quantizer(2 * w)[0]
    if kind is EntropyQuantizer:
        torch.testing.assert_close(after, 2 * before, rtol=0, atol=0)
    else:
        assert after.max() == before.max() == 1.0
    quantizer.eval()
    assert torch.equal(quantizer(w)[1], quantizer.scale)
    fresh = kind(w, 3, True, paper=True)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.eval()(2 * w)[0], after)


# ------------------------------------------------------------------------- in units of the step


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_positions_lie_within_half_a_step_of_their_level(kind: Kind, bits: int) -> None:
    w = weights(6, 50).requires_grad_()
    quantizer = kind(w.detach(), bits, True)
    position, level = quantizer.in_steps(w)
    assert (position - level).abs().max() <= 0.5 + 1e-5  # float32 of up to 128 steps
    assert torch.equal(level * 2, quantizer.codes(w))
    values, scale, *_ = quantizer(w)
    residual = quantizer.residual(w, values, scale)
    assert torch.equal(residual, (level - position).detach())
    bin_regularization(position, level).backward()
    assert torch.isfinite(w.grad).all()
    assert quantizer.gain.grad is None  # the scale has no part in this loss


def test_the_step_of_the_learned_step_is_its_scale() -> None:
    w = weights(6, 50).requires_grad_()
    quantizer = WeightQuantizer(w.detach(), 3, True)
    position, level = quantizer.in_steps(w)
    assert torch.equal(position, w / quantizer.scale)
    assert torch.equal(level, quantizer.codes(w))
    values, scale, *_ = quantizer(w)
    assert torch.equal(quantizer.residual(w, values, scale), (values - w) / scale)
    bin_regularization(position, level).backward()
    assert quantizer.gain.grad is None


def test_bin_regularization_by_hand() -> None:
    # code units 4.8, -1.6, .8, -.8; clipped and in steps 1.5, -.8, .4, -.4; levels 1.5 -.5 .5 -.5
    quantizer = EntropyQuantizer(LOPSIDED, 2, per_channel=True)
    low = (-0.6 + 0.5) ** 2 + 2 * 0.2**2  # of -.8 and -.4: mean -.6, unbiased variance
    expected = (low + (0.4 - 0.5) ** 2 + 0.0) / 3
    loss = bin_regularization(*quantizer.in_steps(LOPSIDED))
    assert float(loss) == pytest.approx(expected, rel=1e-5)  # float32


@pytest.mark.parametrize("kind", KINDS)
def test_weights_on_their_levels_cost_nothing(kind: Kind) -> None:
    w = weights(4, 100)
    quantizer = kind(w, 3, True)
    values = quantizer(w)[0]
    quantizer.freeze_()
    assert float(bin_regularization(*quantizer.in_steps(values)).detach()) < 1e-10  # float32


# --------------------------------------------------------------------------------- in a network

NAMES = {"dorefa": DorefaQuantizer, "entropy": EntropyQuantizer}
Batches = list[tuple[Tensor, Tensor]]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3),
        nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip


@pytest.fixture
def batches() -> Batches:
    rng = torch.Generator().manual_seed(2)
    return [
        (torch.randn(16, 1, 8, 8, generator=rng), torch.randint(0, 3, (16,), generator=rng))
        for _ in range(4)
    ]


def made(batches: Batches, **config: object) -> QuantModel:
    fields = {"bit_choices": (1, 2, 4, 8), **config}
    qmodel = quantize(network(), QuantConfig(**fields), sample=batches[0][0])
    calibrate_(qmodel, batches)
    return qmodel


@pytest.mark.parametrize("name", NAMES)
def test_searched_layers_have_it_and_pinned_layers_keep_the_learned_step(
    name: str, batches: Batches
) -> None:
    qmodel = made(batches, weight_quantizer=name, weight_magnitude="paper")
    kinds = [type(qmodel.weight_quantizer(bits.name)) for bits in qmodel.policy]
    assert kinds == [WeightQuantizer, NAMES[name], NAMES[name], WeightQuantizer]
    assert qmodel.weight_quantizer("2").paper
    policy = qmodel.policy.with_weight_bits({"2": 1, "4": 4})
    apply_policy_(qmodel, policy)
    assert type(qmodel.weight_quantizer("2")) is NAMES[name]
    assert qmodel.weight_quantizer("4").bits == 4
    free = made(batches, weight_quantizer=name, first_last_bits=None)
    assert {type(free.weight_quantizer(bits.name)) for bits in free.policy} == {NAMES[name]}


@pytest.mark.parametrize("magnitude", ["learned", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_search_and_fine_tuning_run_and_the_state_is_whole(
    name: str, magnitude: str, batches: Batches
) -> None:
    config = {"weight_quantizer": name, "weight_magnitude": magnitude}
    qmodel = made(batches, **config)
    policy = search(
        qmodel, batches, budget=Budget(avg_weight_bits=3.0), config=SearchConfig(epochs=2)
    )
    assert policy.avg_weight_bits <= 3.0
    apply_policy_(qmodel, policy)
    finetune_(qmodel, batches, config=TrainConfig(epochs=2, bin_warmup=0))
    qmodel.eval()
    other = made(batches, **config)
    apply_policy_(other, policy)
    other.load_state_dict(qmodel.state_dict())
    images = batches[0][0]
    assert torch.equal(other.eval()(images), qmodel(images))


@pytest.mark.parametrize("name", NAMES)
def test_bin_regularization_draws_weights_to_their_levels(name: str, batches: Batches) -> None:
    ends = {}
    for weight in (0.0, 1.0):
        qmodel = made(batches, weight_quantizer=name)
        apply_policy_(qmodel, qmodel.policy.with_weight_bits({"2": 2, "4": 4}))
        config = TrainConfig(epochs=10, lr=1e-2, bin_weight=weight, bin_warmup=0)
        finetune_(qmodel, batches, config=config)
        ends[weight] = FineTuning(qmodel, config).describe()["bin_loss"]
    assert ends[1.0] < 0.8 * ends[0.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_stochastic_step(kind: Kind) -> None:
    w = weights(8, 200).requires_grad_()
    bits = BitwidthParameters([(2, 4, 8)])
    bits.generator = torch.Generator().manual_seed(0)
    candidates = [kind(w.detach(), b, True) for b in (2, 4, 8)]
    layer = StochasticWeightQuantizer(candidates, bits, [0])
    bits.draw_()
    values = layer(w)[0]
    chosen = candidates[2 if float(bits.share().detach()) else 1]
    assert torch.equal(values, chosen.codes(w) * chosen.scale)
    # rounding noise; what the clip takes away of entropy's weights has none
    assert 0.5 < float(layer.residual()) * 12 < 1.1
    assert 0 < float(layer.relative_error()) < 0.1  # 8 bits beside 4
    values.square().sum().backward()
    for grad in (w.grad, bits.theta.grad):
        assert torch.isfinite(grad).all()
    assert bits.theta.grad[0, 1] != 0
    assert w.grad.abs().sum() > 0


# ------------------------------------------------------------------------------- configuration


def test_a_configuration_without_the_fields_is_the_learned_step() -> None:
    old = QuantConfig().model_dump()
    del old["weight_quantizer"], old["weight_magnitude"]
    assert QuantConfig(**old) == QuantConfig(weight_quantizer="lsq", weight_magnitude="learned")


WRONG: list[tuple[dict[str, str], str]] = [
    ({"weight_quantizer": "ternary"}, r"QuantConfig\.weight_quantizer: .*got 'ternary'"),
    ({"weight_magnitude": "paper"}, r"weight_magnitude: must be learned .* got 'paper'"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_a_wrong_value_names_its_field(fields: dict[str, str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        QuantConfig(**fields)
