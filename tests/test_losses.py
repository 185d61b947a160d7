"""The losses of phase 2 against slow loops, closed forms and finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdq import quantizers
from sdq.losses import bin_regularization, distillation


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -------------------------------------------------------------------------------- distillation


def test_distillation_equals_its_formula() -> None:
    student, teacher = randn(7, 5), randn(7, 5, seed=1)
    total = 0.0
    for i in range(7):
        p = torch.exp(teacher[i]) / torch.exp(teacher[i]).sum()
        q = torch.exp(student[i]) / torch.exp(student[i]).sum()
        total -= float((p * q.log()).sum())
    assert float(distillation(student, teacher)) == pytest.approx(total / 7, rel=1e-12)  # float64


def test_distillation_is_the_entropy_plus_the_divergence() -> None:
    student, teacher = randn(7, 5), randn(7, 5, seed=1)
    p = teacher.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    divergence = F.kl_div(student.log_softmax(1), p, reduction="batchmean")
    torch.testing.assert_close(distillation(student, teacher), entropy + divergence)


def test_distillation_has_its_minimum_at_the_teacher() -> None:
    teacher = randn(7, 5)
    student = (teacher + 3.0).requires_grad_()  # the same probabilities
    loss = distillation(student, teacher)
    loss.backward()
    assert student.grad.abs().max() < 1e-15  # float64
    for seed in range(5):
        assert distillation(teacher + 0.1 * randn(7, 5, seed=seed + 1), teacher) > loss


def test_distillation_gradient_is_the_difference_of_probabilities() -> None:
    student, teacher = randn(7, 5).requires_grad_(), randn(7, 5, seed=1).requires_grad_()
    distillation(student, teacher).backward()
    expected = (student.detach().softmax(1) - teacher.detach().softmax(1)) / 7
    torch.testing.assert_close(student.grad, expected, rtol=1e-12, atol=1e-14)
    assert teacher.grad is None


# --------------------------------------------------------------------------- bin regularization


def regularization(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The loss on LSQ's levels, as WeightQuantizer.in_steps gives them."""
    codes = quantizers.codes(weight.detach(), scale, bits, signed=True)
    return bin_regularization(weight / scale.detach(), codes)


def slow(weight: Tensor, scale: Tensor, bits: int) -> float:
    """Equation 10, one bin after the other, in units of the scale; the mean over filled bins."""
    v = (weight / scale).flatten().tolist()
    codes = quantizers.codes(weight, scale, bits, signed=True).flatten().tolist()
    low, high = quantizers.code_range(bits, signed=True)
    terms = []
    for n in range(low, high + 1):
        inside = [x for x, code in zip(v, codes, strict=True) if code == n]
        if not inside:
            continue
        mean = sum(inside) / len(inside)
        variance = 0.0
        if len(inside) > 1:
            variance = sum((x - mean) ** 2 for x in inside) / (len(inside) - 1)
        terms.append((mean - n) ** 2 + variance)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_bin_regularization_equals_the_loop(
    bits: int, per_channel: bool, channels_last: bool
) -> None:
    # 108 weights: of 256 bins of 8 bits most are empty and many hold one weight
    weight = randn(4, 3, 3, 3)
    if channels_last:
        weight = weight.contiguous(memory_format=torch.channels_last)
    scale = quantizers.mse_scale(weight, bits, True, per_channel)
    ours = regularization(weight, scale, bits)
    assert float(ours) == pytest.approx(slow(weight, scale, bits), rel=1e-10)  # float64


def test_bin_regularization_by_hand() -> None:
    weight = torch.tensor([[0.2, -0.1, 1.1, 3.0]])  # scale 1, 2 bits: codes 0 0 1 1
    # bin 0: mean .05, variance (.15^2 + .15^2) / 1; bin 1: mean 2.05, (.95^2 + .95^2) / 1
    expected = ((0.05**2 + 0.045) + (1.05**2 + 1.805)) / 2
    value = regularization(weight, torch.tensor(1.0), 2)
    assert float(value) == pytest.approx(expected, rel=1e-6)  # float32


def test_the_paper_s_sum_over_bins_by_hand() -> None:
    weight = torch.tensor([[0.2, -0.1, 1.1, 3.0]])  # the two bins of the test above
    expected = (0.05**2 + 0.045) + (1.05**2 + 1.805)
    value = bin_regularization(
        weight, quantizers.codes(weight, torch.tensor(1.0), 2, signed=True), "sum"
    )
    assert float(value) == pytest.approx(expected, rel=1e-6)  # float32


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_sum_is_the_mean_times_the_filled_bins(bits: int) -> None:
    weight = randn(4, 3, 3, 3)
    scale = quantizers.mse_scale(weight, bits, True, True)
    filled = len(quantizers.codes(weight, scale, bits, signed=True).unique())
    codes = quantizers.codes(weight, scale, bits, signed=True)
    total = float(bin_regularization(weight / scale, codes, "sum"))
    assert total == pytest.approx(filled * slow(weight, scale, bits), rel=1e-10)  # float64


def test_a_bin_with_one_weight_has_no_variance() -> None:
    value = regularization(torch.tensor([[0.25]]), torch.tensor(1.0), 4)
    assert float(value) == 0.0625


def test_weights_on_their_levels_cost_nothing() -> None:
    scale = torch.tensor([[0.1], [0.3]])
    codes = torch.tensor([[-4.0, 3, 0, 1], [2, -2, -2, 3]])
    # float32: the ratio may miss the integer by an ulp, 2e-7, squared
    assert float(regularization(codes * scale, scale, 3)) < 1e-12


def test_bin_regularization_does_not_depend_on_the_unit() -> None:
    weight = randn(5, 8)
    scale = torch.tensor(0.25, dtype=torch.float64)
    torch.testing.assert_close(
        regularization(weight * 1024, scale * 1024, 4), regularization(weight, scale, 4),
        rtol=0, atol=0,
    )  # fmt: skip  # powers of two: exact


@pytest.mark.parametrize("bits", [1, 3])
def test_bin_regularization_gradient_equals_finite_differences(bits: int) -> None:
    weight = randn(3, 5).requires_grad_()
    scale = torch.tensor([[0.3], [0.5], [0.7]], dtype=torch.float64, requires_grad=True)
    distance = (weight / scale).detach()
    # no weight so near a border of its bin that gradcheck's step of 1e-6 moves it across
    border = (distance - distance.floor() - 0.5).abs() if bits > 1 else distance.abs()
    assert border.min() > 1e-4
    torch.autograd.gradcheck(lambda w: regularization(w, scale, bits), (weight,))
    regularization(weight, scale, bits).backward()
    assert scale.grad is None  # the scale is fixed in this loss
