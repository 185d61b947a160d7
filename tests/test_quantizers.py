"""The uniform quantizers against torch's own, numbers worked by hand, and LSQ's equations."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdq import quantizers
from sdq.errors import RunError
from sdq.learned_scale import SMALLEST_GAIN, ActQuantizer, WeightQuantizer

BITS = (1, 2, 3, 4, 5, 6, 7, 8)


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize(
    ("bits", "signed", "expected"),
    [
        (1, True, (-1, 1)), (2, True, (-2, 1)), (3, True, (-4, 3)), (8, True, (-128, 127)),
        (1, False, (0, 1)), (2, False, (0, 3)), (4, False, (0, 15)), (8, False, (0, 255)),
    ],
)  # fmt: skip
def test_code_range(bits: int, signed: bool, expected: tuple[int, int]) -> None:
    assert quantizers.code_range(bits, signed) == expected


def test_codes_round_half_to_even_and_clip() -> None:
    x = torch.tensor([-9.0, -2.5, -1.5, -0.5, 0.0, 0.5, 1.5, 2.5, 3.5, 9.0])
    assert quantizers.codes(x, torch.tensor(1.0), 3, True).tolist() == [
        -4, -2, -2, 0, 0, 0, 2, 2, 3, 3,
    ]  # fmt: skip
    assert quantizers.codes(x, torch.tensor(1.0), 3, False).tolist() == [
        0, 0, 0, 0, 0, 0, 2, 2, 4, 7,
    ]  # fmt: skip


def test_codes_divide_and_do_not_multiply_by_the_reciprocal() -> None:
    # for these values the two differ: the ratio is a tie that the reciprocal just misses
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.01, 0.2, 200_000).astype(np.float32)
    x = ((rng.integers(-7, 7, 200_000) + 0.5).astype(np.float32) * scale).astype(np.float32)
    divided = np.clip(np.rint(x / scale), -8, 7)
    multiplied = np.clip(np.rint(x * (np.float32(1) / scale)), -8, 7)
    assert (divided != multiplied).any()
    ours = quantizers.codes(torch.from_numpy(x), torch.from_numpy(scale), 4, True)
    assert np.array_equal(ours.numpy(), divided)


@pytest.mark.parametrize("bits", BITS[1:])
@pytest.mark.parametrize("signed", [True, False])
def test_values_equal_torch_fake_quantize(bits: int, signed: bool) -> None:
    # a power of two: torch multiplies by 1 / scale, which is then exact
    low, high = quantizers.code_range(bits, signed)
    x = weights(5000) * 3
    ours = quantizers.quantize(x, torch.tensor(0.0625), bits, signed)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, 0.0625, 0, low, high))
    scale = torch.tensor([0.5, 0.25, 0.125, 2.0, 0.0625])
    x = x.reshape(5, -1)
    theirs = torch.fake_quantize_per_channel_affine(
        x, scale, torch.zeros(5, dtype=torch.int32), 0, low, high
    )
    assert torch.equal(quantizers.quantize(x, scale[:, None], bits, signed), theirs)


def test_one_bit_is_the_sign_and_zero_counts_as_plus() -> None:
    x = torch.tensor([-3.0, -1e-30, -0.0, 0.0, 1e-30, 3.0])
    assert quantizers.codes(x, torch.tensor(0.5), 1, True).tolist() == [-1, -1, 1, 1, 1, 1]
    assert quantizers.quantize(x, torch.tensor(0.5), 1, True).tolist() == [
        -0.5, -0.5, 0.5, 0.5, 0.5, 0.5,
    ]  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8),
    signed=st.booleans(),
    scale=st.floats(2.0**-20, 1024.0, width=32),
    seed=st.integers(0, 1000),
)
def test_values_are_exactly_float32_code_times_scale(
    bits: int, signed: bool, scale: float, seed: int
) -> None:
    x = weights(200, seed=seed) * scale * 2**bits / 3
    s = torch.tensor(scale)
    codes = quantizers.codes(x, s, bits, signed)
    low, high = quantizers.code_range(bits, signed)
    assert codes.min() >= low
    assert codes.max() <= high
    assert torch.equal(codes, codes.round())
    numpy = (codes.numpy().astype(np.int32).astype(np.float32) * np.float32(scale)).astype("<f4")
    assert np.array_equal(quantizers.quantize(x, s, bits, signed).numpy(), numpy)
    # half a step, and the two roundings of float32 (of the ratio and of the product) above it
    inside = (x / s >= low) & (x / s <= high)
    if bits > 1:
        error = (quantizers.quantize(x, s, bits, signed) - x).abs()[inside]
        assert (error <= scale * (0.5 + 2**bits * 2**-23)).all()


def test_quantizing_twice_changes_nothing() -> None:
    x = weights(1000)
    for bits, signed in itertools.product(BITS, (True, False)):
        once = quantizers.quantize(x, torch.tensor(0.07), bits, signed)
        assert torch.equal(quantizers.quantize(once, torch.tensor(0.07), bits, signed), once)


# ------------------------------------------------------------------------------------- gradient


def lsq(x: Tensor, scale: Tensor, bits: int, signed: bool, g: Tensor) -> tuple[Tensor, Tensor]:
    """Esser et al., ICLR 2020, equations 3 and 5 and section 2.2, element by element."""
    low, high = quantizers.code_range(bits, signed)
    v = x / scale
    inside = (v > low) & (v < high)
    ds = torch.where(inside, v.round() - v, torch.where(v <= low, float(low), float(high)))
    if bits == 1 and signed:  # ours: every weight keeps its gradient, the scale sees the sign
        inside, ds = torch.ones_like(inside), torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
    gain = 1 / math.sqrt(x.numel() / scale.numel() * high)
    total = torch.zeros_like(scale.expand_as(x)) + g * ds
    reduced = total.sum() if scale.dim() == 0 else total.flatten(1).sum(1).reshape(scale.shape)
    return g * inside, reduced * gain


LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_those_of_lsq(
    bits: int, signed: bool, per_channel: bool, layout: str
) -> None:
    # in float64, so that the identity behind the fused scale gradient is compared to 1e-10
    x = LAYOUTS[layout](weights(6, 4, 3, 3, dtype=torch.float64)).requires_grad_()
    scale = torch.rand(6, 1, 1, 1, dtype=torch.float64) / 2**bits + 0.8 / 2**bits
    scale = (scale if per_channel else scale[0].reshape(())).requires_grad_()
    g = LAYOUTS[layout](weights(6, 4, 3, 3, seed=1, dtype=torch.float64))
    quantizers.quantize(x, scale, bits, signed).backward(g)
    dx, ds = lsq(x.detach(), scale.detach(), bits, signed, g)
    torch.testing.assert_close(x.grad, dx, rtol=0, atol=0)
    torch.testing.assert_close(scale.grad, ds, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_channel", [False, True])
def test_mixed_layouts_of_weight_and_gradient(per_channel: bool) -> None:
    x = weights(4, 4, 3, 3, dtype=torch.float64).requires_grad_()
    scale = torch.full((4, 1, 1, 1) if per_channel else (), 0.3, dtype=torch.float64)
    scale.requires_grad_()
    g = LAYOUTS["channels_last"](weights(4, 4, 3, 3, seed=1, dtype=torch.float64))
    quantizers.quantize(x, scale, 3, True).backward(g)
    dx, ds = lsq(x.detach(), scale.detach(), 3, True, g)
    torch.testing.assert_close(x.grad, dx, rtol=0, atol=0)
    torch.testing.assert_close(scale.grad, ds, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("per_channel", [False, True])
def test_gradient_at_the_ends_of_the_range(per_channel: bool, signed: bool) -> None:
    # equation 3 counts an end as outside; powers of two, so that the ends are met exactly
    low, high = quantizers.code_range(3, signed)
    x = torch.tensor([[low * 0.5, high * 0.5, 0.6, 0.0]], dtype=torch.float64).requires_grad_()
    scale = torch.full((1, 1) if per_channel else (), 0.5, dtype=torch.float64).requires_grad_()
    g = torch.tensor([[1.0, 10.0, 100.0, 1000.0]], dtype=torch.float64)
    quantizers.quantize(x, scale, 3, signed).backward(g)
    dx, ds = lsq(x.detach(), scale.detach(), 3, signed, g)
    assert torch.equal(x.grad, dx)
    torch.testing.assert_close(scale.grad, ds, rtol=1e-12, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scale_gradient_outside_the_range_equals_finite_differences(bits: int) -> None:
    # where everything is clipped, Q is linear in s and the true derivative is LSQ's
    low, high = quantizers.code_range(bits, True)
    x = torch.tensor([5.0 * low, 5.0 * high, 7.0 * high], dtype=torch.float64)
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (quantizers.quantize(x, scale, bits, True) * g).sum().backward()
    step = 1e-3
    ends = [
        float((quantizers.quantize(x, torch.tensor(1.0 + d).double(), bits, True) * g).sum())
        for d in (-step, step)
    ]
    gain = 1 / math.sqrt(3 * high)
    # linear: only the rounding of 1 +- 1e-3 in float32 (6e-8) over 1e-3 remains
    assert float(scale.grad) == pytest.approx(gain * (ends[1] - ends[0]) / (2 * step), rel=2e-4)


def test_gradient_reaches_only_what_needs_it() -> None:
    x = weights(10)
    scale = torch.tensor(0.2, requires_grad=True)
    quantizers.quantize(x, scale, 4, True).sum().backward()
    assert scale.grad is not None
    x.requires_grad_()
    quantizers.quantize(x, torch.tensor(0.2), 4, True).sum().backward()
    assert x.grad is not None


# ------------------------------------------------------------------------------ powers of two


def test_power_of_two_is_the_nearest_in_the_logarithm() -> None:
    scale = torch.tensor([1.0, 0.5, 0.3, 0.36, 0.35, 3.0, 1.5, 1.4, 1e-7, 100.0])
    expected = [2.0 ** round(math.log2(float(s))) for s in scale]
    assert quantizers.power_of_two(scale).tolist() == expected
    assert expected[2:8] == [0.25, 0.5, 0.25, 4.0, 2.0, 1.0]  # sqrt(2) / 4 = .3536 divides
    mantissa, _ = np.frexp(quantizers.power_of_two(torch.rand(1000) + 1e-4).numpy())
    assert (mantissa == 0.5).all()


def test_power_of_two_is_straight_through() -> None:
    scale = torch.tensor([0.3, 3.0], requires_grad=True)
    (quantizers.power_of_two(scale) * torch.tensor([2.0, 5.0])).sum().backward()
    assert scale.grad.tolist() == [2.0, 5.0]


# -------------------------------------------------------------------------------- first scale


def error(x: Tensor, scale: Tensor, bits: int, signed: bool) -> Tensor:
    quantized = quantizers.codes(x, scale, bits, signed) * scale
    return (quantized - x).double().square().flatten(1).mean(1)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_mse_scale_against_a_search_by_brute_force(bits: int, signed: bool) -> None:
    # many weights: of few, the error is jagged in the scale and a finer grid fits their noise
    x = weights(3, 20, 10, 20)
    x = x if signed else x.relu()
    ours = quantizers.mse_scale(x, bits, signed, per_channel=True)
    assert ours.shape == (3, 1, 1, 1)
    low, high = quantizers.code_range(bits, signed)
    flat = x.flatten(1)
    least = torch.full((3,), math.inf, dtype=torch.float64)
    bound = torch.maximum(flat.amax(1) / high, flat.amin(1) / low if low else flat.amax(1) / high)
    for share in torch.linspace(0.01, 1.0, 300):
        least = torch.minimum(least, error(flat, (bound * share)[:, None], bits, signed))
    # the grid of 40 points misses the optimum by at most a 1/80 of the range, where the error
    # is flat to the first order: 2.5 % of the scale squared and the clipped tail make up 5 %
    assert (error(x, ours, bits, signed) <= least * 1.05).all()


def test_mse_scale_is_the_best_point_of_its_own_grid() -> None:
    x = weights(3, 50)
    for bits in (2, 3, 4, 8):
        ours = quantizers.mse_scale(x, bits, True, per_channel=False)
        assert ours.shape == ()
        low, high = quantizers.code_range(bits, True)
        bound = max(float(x.max()) / high, float(x.min()) / low)
        grid = torch.arange(1, 41) / 40 * bound
        errors = torch.stack([error(x.reshape(1, -1), s, bits, True)[0] for s in grid])
        assert float(ours) == pytest.approx(float(grid[errors.argmin()]), rel=1e-6)  # float32


def test_mse_scale_of_one_bit_is_the_mean_magnitude() -> None:
    x = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.5, -0.5]])
    assert quantizers.mse_scale(x, 1, True, per_channel=True).flatten().tolist() == [2.0, 0.5]
    assert float(quantizers.mse_scale(x, 1, True, per_channel=False)) == 1.25


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_zeros_stay_next_to_zero(bits: int) -> None:
    dead = torch.stack([torch.zeros(3), torch.ones(3)])
    for x in (torch.zeros(2, 3), dead):
        scale = quantizers.mse_scale(x, bits, True, per_channel=True)
        assert scale[0] == (1.0 if bits > 1 else pytest.approx(1e-8))
        # of one bit no code is zero: with a scale of 1 a dead channel would be all ones
        assert quantizers.quantize(x, scale, bits, True)[0].abs().max() <= 1e-8
    assert 0 < scale[1] <= 1.0


@pytest.mark.parametrize("sign", [1, -1])
def test_mse_scale_of_one_sided_weights(sign: int) -> None:
    x = sign * torch.arange(1.0, 9.0)[None]
    scale = quantizers.mse_scale(x, 8, True, per_channel=False)
    # 8 bits hold 8 values to within half a step of a range of 8 / 127
    assert (quantizers.quantize(x, scale, 8, True) - x).abs().max() <= 8 / 127 / 2 * 1.0001


def full_range(x: Tensor, bits: int, signed: bool) -> float:
    """Return the scale at which nothing is clipped."""
    low, high = quantizers.code_range(bits, signed)
    return max(float(x.max()) / high, float(x.min()) / low if low else 0.0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [*BITS[1:], 16])
def test_the_histogram_gives_the_scale_of_the_values_themselves(bits: int, signed: bool) -> None:
    x = weights(40, 1000)
    x = (x if signed else x.relu()) ** 3  # long tails, as after a residual sum
    ours = quantizers.histogram_mse_scale(x, bits, signed)
    exact = quantizers.mse_scale(x, bits, signed, per_channel=False, steps=100)
    assert ours.shape == ()
    # near its minimum the error is flat: at most the next point of the grid, and 1 %
    assert abs(float(ours - exact)) <= 1.01 * full_range(x, bits, signed) / 100
    found, least = (error(x.reshape(1, -1), s, bits, signed) for s in (ours, exact))
    assert float(found) <= 1.01 * float(least)


@pytest.mark.parametrize("value", [0.0, 3.0, math.nan, math.inf])
def test_a_large_sample_without_a_histogram(value: float) -> None:
    scale = quantizers.histogram_mse_scale(torch.full((1 << 16,), value), 4, signed=False)
    exact = quantizers.mse_scale(torch.full((1, 2), value), 4, False, False, steps=100)
    assert torch.equal(scale, exact) or math.isnan(float(exact))


# ------------------------------------------------------------------------------ the two modules


@pytest.mark.parametrize("restrict", ["float", "power_of_two"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_weight_quantizer_returns_values_scale_zero_point_and_width(
    per_channel: bool, restrict: str
) -> None:
    w = weights(4, 3, 3, 3)
    quantizer = WeightQuantizer(w, 3, per_channel, restrict)
    values, scale, zero_point, width = quantizer(w)
    assert torch.equal(values, quantizer.codes(w) * scale)
    assert scale.shape == ((4, 1, 1, 1) if per_channel else ())
    assert (float(zero_point), float(width)) == (0.0, 3.0)
    if restrict == "power_of_two":
        assert (np.frexp(scale.detach().numpy())[0] == 0.5).all()
    assert set(quantizer.state_dict()) == {"base", "gain"}


def test_the_learned_gain_never_takes_the_scale_to_zero() -> None:
    quantizer = WeightQuantizer(weights(4, 3), 4, per_channel=True)
    base = quantizer.base.clone()
    quantizer.gain.data.copy_(torch.tensor([[-5.0], [0.0], [0.5], [2.0]]))
    share = (quantizer.scale / base).flatten()
    # float32 products
    expected = torch.tensor([SMALLEST_GAIN, SMALLEST_GAIN, 0.5, 2.0])
    torch.testing.assert_close(share, expected, rtol=1e-6, atol=0)


def test_a_gain_below_the_floor_can_return() -> None:
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    quantizer = WeightQuantizer(w, 4, per_channel=True)
    quantizer.gain.data.fill_(-0.5)
    wanted = 1.0
    for push in (1.0, -1.0):  # a loss that falls with the scale, and one that rises with it
        quantizer.gain.grad = None
        (push * quantizer.scale.sum()).backward()
        pulled_down = push > 0
        assert (quantizer.gain.grad == 0).all() == pulled_down
        assert (quantizer.gain.grad <= 0).all()
    optimizer = torch.optim.SGD([quantizer.gain], lr=0.5)
    for _ in range(50):
        optimizer.zero_grad()
        ((quantizer.scale / quantizer.base - wanted) ** 2).sum().backward()
        optimizer.step()
    assert quantizer.gain.detach().flatten().tolist() == pytest.approx([wanted] * 4)


def test_gain_gradient_is_the_scale_gradient_times_the_first_scale() -> None:
    w = weights(4, 3, 3, 3)
    quantizer = WeightQuantizer(w, 3, per_channel=True)
    g = weights(4, 3, 3, 3, seed=1)
    quantizer(w)[0].backward(g)
    _, ds = lsq(w, quantizer.base, 3, True, g)
    # float32 sums of 27 terms
    torch.testing.assert_close(quantizer.gain.grad, ds * quantizer.base, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("restrict", ["float", "power_of_two"])
def test_double_keeps_the_float32_scale(restrict: str) -> None:
    quantizer = WeightQuantizer(weights(4, 3), 4, True, restrict)
    quantizer.gain.data.uniform_(0.3, 1.7)
    before = quantizer.scale.detach().clone()
    after = quantizer.double().scale
    assert after.dtype == torch.float64
    assert torch.equal(after, before.double())


def test_act_quantizer_asks_for_calibration_then_takes_the_best_scale() -> None:
    quantizer = ActQuantizer(4, signed=False)
    with pytest.raises(RunError, match=r"calibrated before use; call sdq\.calibrate_"):
        quantizer(torch.ones(3))
    quantizer.observing = True
    parts = [weights(100, seed=s).relu() for s in (0, 1)]
    for part in parts:
        values, *_ = quantizer(part)
        assert torch.equal(values, part)  # unchanged while observing
    quantizer.settle_()
    expected = quantizers.mse_scale(torch.cat(parts)[None], 4, False, per_channel=False, steps=100)
    assert torch.equal(quantizer.scale, expected)
    assert bool(quantizer.calibrated)
    values, *_ = quantizer(parts[0])
    assert torch.equal(values, quantizers.quantize(parts[0], expected, 4, False))


def test_act_quantizer_that_saw_nothing_stays_uncalibrated() -> None:
    quantizer = ActQuantizer(4, signed=True)
    quantizer.observing = True
    quantizer.settle_()
    assert not bool(quantizer.calibrated)


def test_act_quantizer_samples_all_columns_of_an_image() -> None:
    # brightness grows from column to column; every 32nd value would lie in the first column
    x = torch.arange(1.0, 33.0).expand(128, 16, 32, 32)
    quantizer = ActQuantizer(8, signed=False)
    quantizer.observing = True
    quantizer(x)
    again = ActQuantizer(8, signed=False)
    again.observing = True
    again(x)
    seen = quantizer._seen[0]
    assert seen.shape == (quantizer.sample_size,)
    assert torch.equal(seen, again._seen[0])
    # 65,536 draws: five standard deviations of a mean of uniform values
    assert float(seen.mean()) == pytest.approx(16.5, abs=5 * 9.23 / 256)
    assert set(seen.tolist()) == set(range(1, 33))


def test_loading_an_uncalibrated_state_asks_for_calibration_again() -> None:
    quantizer = ActQuantizer(4, signed=False)
    fresh = {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}
    quantizer.observing = True
    quantizer(weights(100).relu())
    quantizer.settle_()
    quantizer(torch.ones(3))
    quantizer.load_state_dict(fresh)
    with pytest.raises(RunError, match="calibrated before use"):
        quantizer(torch.ones(3))


def test_both_ways_to_the_scalar_scales_gradient_agree() -> None:
    # a GPU takes the way of the channels' scales; here one channel stands for the tensor
    x, g = weights(2, 3, 4, 4), weights(2, 3, 4, 4, seed=1)
    found = []
    for shape in ((), (1, 1, 1, 1)):
        leaf = x.clone().requires_grad_()
        scale = torch.full(shape, 0.2, requires_grad=True)
        quantizers.quantize(leaf, scale, 3, True).backward(g)
        found.append((leaf.grad, scale.grad.reshape(())))
    assert torch.equal(found[0][0], found[1][0])
    # float32 sums of 96 terms
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
