"""Losses of maps against numbers worked by hand."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sdq.errors import RequestError
from sdq.losses import distillation
from sdq.mask_metrics import segmentation_metrics
from sdq.segmentation import (
    class_maps,
    dice_loss,
    map_distillation,
    map_divergence,
    segmentation_loss,
    soft_dice,
)

TARGETS = torch.tensor([[[0, 1], [2, 1]]])  # (1, 2, 2)
LOGITS = torch.tensor([[[[-1.0, 2.0], [0.5, 0.0]], [[0.0, -3.0], [1.0, 2.0]]]])


def test_class_maps_leave_the_background_out() -> None:
    maps = class_maps(TARGETS, 3)
    assert maps.tolist() == [[[[0, 1], [0, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]]
    soft = torch.rand(2, 3, 4, 4)
    assert class_maps(soft, 3) is soft


def test_soft_dice_of_the_spec() -> None:
    """(2 sum ab + 1e-4) / (sum a + sum b + 1e-4), for each image."""
    a = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = [(2 * 1.5 + 1e-4) / (1.5 + 2 + 1e-4), 1.0, 1e-4 / (3 + 1e-4)]
    torch.testing.assert_close(soft_dice(a, b), torch.tensor(expected))


def test_dice_loss_takes_all_maps_of_an_image_together() -> None:
    p = LOGITS.double().sigmoid()
    hit = float(p[0, 0, 0, 1] + p[0, 0, 1, 1] + p[0, 1, 1, 0])
    expected = 1 - (2 * hit + 1e-4) / (float(p.sum()) + 3 + 1e-4)
    assert float(dice_loss(LOGITS, TARGETS)) == pytest.approx(expected, rel=1e-5)
    two = dice_loss(LOGITS.repeat(2, 1, 1, 1), TARGETS.repeat(2, 1, 1))
    assert float(two) == pytest.approx(expected, rel=1e-5)


def test_the_loss_is_dice_and_cross_entropy_of_pixels() -> None:
    sign = torch.where(class_maps(TARGETS, 2) > 0, 1.0, -1.0)
    pixels = (1 + (-sign * LOGITS).exp()).log().mean()
    expected = float(dice_loss(LOGITS, TARGETS) + pixels)
    assert float(segmentation_loss(LOGITS, TARGETS)) == pytest.approx(expected, rel=1e-6)
    # soft targets that are the masks give the same
    assert float(segmentation_loss(LOGITS, class_maps(TARGETS, 2))) == pytest.approx(expected)


def test_an_empty_mask_still_has_a_gradient() -> None:
    """Where dice alone has next to none."""
    empty = torch.zeros(1, 8, 8, dtype=torch.long)
    gradients = []
    for loss in (dice_loss, segmentation_loss):
        logits = torch.zeros(1, 1, 8, 8, requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(logits, empty), logits)
        gradients.append(float(gradient.sum()))
    assert gradients[0] < 1e-4
    assert gradients[1] == pytest.approx(0.5, rel=1e-3)  # sigmoid(0) - 0, in the mean


def test_distillation_is_that_of_two_classes_a_pixel() -> None:
    """A sigmoid is a softmax over (z, 0): the loss of classification on every pixel."""
    teacher = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    student = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    student_pairs, teacher_pairs = (
        torch.stack((z.reshape(-1), torch.zeros(z.numel())), 1) for z in (student, teacher)
    )
    expected = distillation(student_pairs, teacher_pairs)
    torch.testing.assert_close(map_distillation(student, teacher), expected)
    divergence = F.kl_div(
        student_pairs.log_softmax(1), teacher_pairs.log_softmax(1), log_target=True,
        reduction="batchmean",
    )  # fmt: skip
    torch.testing.assert_close(map_divergence(student, teacher), divergence)
    assert float(map_divergence(teacher, teacher)) == 0


def test_no_gradient_flows_into_the_teacher() -> None:
    teacher = torch.zeros(1, 1, 2, 2, requires_grad=True)
    student = torch.ones(1, 1, 2, 2, requires_grad=True)
    loss = map_distillation(student, teacher)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.e) - 0.5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None


@pytest.mark.parametrize(
    ("masks", "words"),
    [
        (torch.full((2, 4, 4), 255), "in 0..1, got 255 to 255; divide by 255"),
        (torch.full((2, 4, 4), -1), "got -1 to -1; number the foreground classes from 1"),
        (torch.full((2, 4, 4), 2), "must be numbers of classes, 0 for background, in 0..1, got 2"),
        (torch.full((2, 1, 4, 4), 255.0), "must be maps of each class, in 0..1, got 255 to 255"),
        (torch.zeros(2, 4, 4), "must be integers (N, H, W), or maps (N, 1, H, W) of 0 to 1"),
        (torch.zeros(2, 3, 4, 4).long(), "got torch.int64 (2, 3, 4, 4)"),
        (torch.zeros(2).long(), "got torch.int64 (2,)"),
    ],
)
def test_masks_of_another_form_are_refused(masks: Tensor, words: str) -> None:
    """White masks of 255 were no class at all, and a network that finds nothing had Dice 1."""
    logits = torch.zeros(2, 1, 4, 4)
    for compute in (segmentation_loss, segmentation_metrics):
        with pytest.raises(RequestError, match=re.escape(words)):
            compute(logits, masks)


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.bool])
def test_masks_may_have_a_channel(kind: torch.dtype) -> None:
    logits = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    masks = torch.arange(32).reshape(2, 4, 4) % 2
    expected = segmentation_loss(logits, masks)
    assert segmentation_loss(logits, masks[:, None].to(kind)) == expected
    assert segmentation_loss(logits, masks[:, None].float()) == expected
