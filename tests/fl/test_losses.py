"""Losses against the numbers of the papers' equations, worked elsewhere, and absent classes."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fl.losses import (
    LossConfig,
    alignment_weight,
    balanced_softmax,
    criterion,
    effective_number_weight,
    focal,
    inverse_frequency,
    ldam,
    ldam_margins,
    log_prior,
    prototype_aligned,
    prototype_aligned_maps,
    seesaw,
)
from sdq.segmentation import dice_loss

Z = torch.tensor([[2.0, 0.5, -1.0]])
COUNTS = torch.tensor([5408.0, 941.0, 994.0])
NAMES = ("ce", "weighted", "focal", "balanced_softmax", "ldam_drw", "cpa")


def of_each_label(loss: object) -> list[float]:
    return [float(loss(Z, torch.tensor([y]))) for y in range(3)]  # type: ignore[operator]


def test_seesaw_of_the_dermoscopic_set() -> None:
    expected = [[1, 0.2469, 0.2579], [1, 1, 1], [1, 0.9571, 1]]
    torch.testing.assert_close(seesaw(COUNTS), torch.tensor(expected), atol=5e-5, rtol=0)


def test_seesaw_of_the_prostate_set() -> None:
    s = seesaw(torch.tensor([386166134.0, 7688842.0]))
    assert float(s[0, 1]) == pytest.approx(0.0436, abs=5e-5)


def test_cpa_without_prototypes() -> None:
    """Swapped indices of s give other numbers for every label but the second."""
    found = of_each_label(lambda z, y: prototype_aligned(z, y, seesaw(COUNTS)))
    assert found == pytest.approx([0.0657, 1.7413, 3.2337], abs=5e-5)
    assert of_each_label(F.cross_entropy) == pytest.approx([0.2413, 1.7413, 3.2413], abs=5e-5)


def test_cpa_with_prototypes() -> None:
    own = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    common = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 3.0]])  # cosines 1, 1/2, 0
    gamma = alignment_weight(own, common, torch.tensor([True] * 3), tau=3.0)
    torch.testing.assert_close(gamma, torch.tensor([1, 1.1429, 1.3333]), atol=5e-5, rtol=0)
    found = of_each_label(lambda z, y: prototype_aligned(z, y, seesaw(COUNTS), gamma))
    assert found == pytest.approx([0.0657, 1.9901, 4.3117], abs=5e-5)


def test_cpa_of_a_missing_prototype_is_not_weighted() -> None:
    present = torch.tensor([True, False])
    gamma = alignment_weight(torch.eye(2), torch.eye(2).flip(0), present, tau=3.0)
    torch.testing.assert_close(gamma, torch.tensor([4 / 3, 1.0]))


def test_cpa_of_a_class_nobody_has_is_finite() -> None:
    s = seesaw(torch.tensor([10.0, 0.0]))
    torch.testing.assert_close(s, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        # inside: log(1 + 1/e); outside: log(1 + 0.0436/e); their mean with cross-entropy, which
        # is log(1 + 1/e) for both, halved; Dice of 0.7311 and 0.2689: 1 - 2.4621 / 3
        (None, (0.164587 + 0.313262) / 2 + 0.179294),
        # twice the outside's
        (torch.tensor([[2.0, 1.0]]), (0.172544 + 0.313262) / 2 + 0.179294),
    ],
)
def test_cpa_of_masks_by_hand(weight: Tensor | None, expected: float) -> None:
    z = torch.tensor([[[[1.0, -1.0]]]])
    s = torch.tensor([[[1.0, 0.0436], [1.0, 1.0]]])
    for targets in (torch.tensor([[[1, 0]]]), torch.tensor([[[[1.0, 0.0]]]])):
        found = prototype_aligned_maps(z, targets, s, weight)
        assert float(found) == pytest.approx(expected, abs=5e-6)


def test_cpa_of_several_maps_is_their_mean() -> None:
    """But for Dice, which is of an image and not of a map."""
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(2, 2, 3, 3, generator=rng)
    y = (torch.rand(2, 2, 3, 3, generator=rng) < 0.4).float()
    s = torch.stack([seesaw(torch.tensor(n)) for n in ([90.0, 10.0], [5.0, 7.0])])
    weight = torch.tensor([[1.0, 1.5], [1.2, 1.1]])

    def without_dice(*which: int) -> Tensor:
        i = list(which)
        total = prototype_aligned_maps(z[:, i], y[:, i], s[i], weight[i])
        return total - dice_loss(z[:, i], y[:, i], smooth=1.0)

    mean = (without_dice(0) + without_dice(1)) / 2
    torch.testing.assert_close(without_dice(0, 1), mean)


def test_focal_by_hand() -> None:
    """p_y is 1/4: (3/4)^2 log 4."""
    z = torch.tensor([[math.log(1.0), math.log(3.0)]])
    assert float(focal(z, torch.tensor([0]))) == pytest.approx(0.5625 * math.log(4))
    assert float(focal(z, torch.tensor([0]), gamma=0)) == pytest.approx(math.log(4))


def test_focal_gradient_is_finite_where_nothing_is_left_to_learn() -> None:
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    focal(z, torch.tensor([0]), gamma=0.5).backward()
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_balanced_softmax_by_hand() -> None:
    """Equal logits: the loss is -log of the class's share; an absent class takes nothing."""
    z = torch.zeros(1, 3)
    counts = torch.tensor([3.0, 1.0, 0.0])
    assert float(balanced_softmax(z, torch.tensor([1]), counts)) == pytest.approx(math.log(4))
    assert float(log_prior(counts)[2]) == pytest.approx(-20.7233, abs=1e-3)


@pytest.mark.parametrize("name", ["balanced_softmax"])
def test_absent_classes_are_not_pushed(name: str) -> None:
    z = torch.zeros(4, 3, requires_grad=True)
    counts = torch.tensor([3.0, 1.0, 0.0])
    loss = criterion(LossConfig(name=name), counts, counts)  # type: ignore[arg-type]
    loss(z, torch.tensor([0, 0, 0, 1])).backward()
    assert z.grad is not None
    assert float(z.grad[:, 2].abs().max()) < 1e-8
    assert float(z.grad[:, :2].abs().max()) > 1e-2


def test_ldam_by_hand() -> None:
    """Margins go as n^-1/4: 16 images have half the margin of 1."""
    margins = ldam_margins(torch.tensor([1.0, 16.0, 0.0]), 0.5)
    torch.testing.assert_close(margins, torch.tensor([0.5, 0.25, 0.5]))
    found = ldam(torch.zeros(1, 2), torch.tensor([1]), margins[:2], scale=4.0)
    assert float(found) == pytest.approx(math.log(1 + math.exp(1.0)))


def test_an_absent_class_leaves_the_other_margins() -> None:
    with_it = ldam_margins(torch.tensor([100.0, 1000.0, 0.0]))
    without = ldam_margins(torch.tensor([100.0, 1000.0]))
    torch.testing.assert_close(with_it[:2], without)


def test_ldam_weights_late() -> None:
    counts = torch.tensor([1.0, 3.0])
    config = LossConfig(name="ldam_drw", drw_beta=0.5, scale=1.0, max_margin=1e-9)
    z, y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
    early = criterion(config, counts, counts, 0.79)(z, y)
    late = criterion(config, counts, counts, 0.8)(z, y)
    assert float(early) == pytest.approx(float(F.cross_entropy(z, y)), abs=1e-6)
    # effective numbers 1 and 1.75: weights 1 and 4/7
    a, b = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert float(late) == pytest.approx((a + b * 4 / 7) / (11 / 7), abs=1e-6)


def test_class_weights() -> None:
    counts = torch.tensor([6.0, 2.0, 0.0])
    torch.testing.assert_close(inverse_frequency(counts), torch.tensor([2 / 3, 2.0, 0.0]))
    weight = effective_number_weight(counts)
    assert float(weight.sum()) == pytest.approx(2.0)
    assert float(weight[2]) == 0.0


@pytest.mark.parametrize("name", NAMES)
def test_finite_with_absent_classes_and_large_logits(name: str) -> None:
    counts = torch.tensor([3.0, 0.0, 1.0])
    z = torch.tensor([[80.0, -80.0, 0.0], [-80.0, 80.0, 0.0]], requires_grad=True)
    config = LossConfig(name=name, drw_start=0.0)  # type: ignore[arg-type]
    found: Tensor = criterion(config, counts, counts)(z, torch.tensor([0, 2]))
    found.backward()
    assert found.isfinite()
    assert z.grad is not None
    assert z.grad.isfinite().all()
