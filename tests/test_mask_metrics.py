"""Overlap and outlines: masks drawn by hand, torchmetrics and MONAI."""

import numpy as np
import pytest
import torch
from torch import Tensor

from sdq.mask_metrics import hausdorff95, overlap, pixel_agreement, segmentation_metrics


def drawn(*rows: str) -> Tensor:
    """Return a mask of digits, ``(1, H, W)``."""
    return torch.tensor([[[int(c) for c in row] for row in rows]])


def logits_for(mask: Tensor, classes: int) -> Tensor:
    """Return logits that predict a mask."""
    return torch.stack([torch.where(mask == c + 1, 4.0, -4.0) for c in range(classes)], 1)


TRUE = drawn("110000", "110000", "000220", "000220")
FOUND = drawn("011000", "011000", "000220", "000000")


def test_hand_made_masks() -> None:
    found = segmentation_metrics(logits_for(FOUND, 2), TRUE)
    # class 1: 2 of 4 and 4 pixels meet; class 2: 2 of 2 and 4
    assert found["per_class_dice"] == pytest.approx([0.5, 2 / 3], abs=1e-4)
    assert found["dice"] == pytest.approx((0.5 + 2 / 3) / 2, abs=1e-4)
    assert found["iou"] == pytest.approx((2 / 6 + 2 / 4) / 2)
    # class 1 is moved by one column; class 2 lacks the row below
    assert found["hd95"] == pytest.approx(1.0)
    assert found["num_examples"] == 1
    assert overlap(logits_for(FOUND, 2), TRUE) == {"dice": found["dice"], "iou": found["iou"]}


def test_empty_masks() -> None:
    """Nothing where there is nothing counts 1, something 0; distances are of what there is."""
    nothing = torch.zeros_like(TRUE)
    one = (TRUE == 1).long()
    right = segmentation_metrics(logits_for(nothing, 1), nothing)
    assert (right["dice"], right["iou"], right["dice_nonempty"], right["hd95"]) == (
        1,
        1,
        None,
        None,
    )
    wrong = segmentation_metrics(logits_for(one, 1), nothing)
    assert wrong["dice"] == pytest.approx(0, abs=1e-4)
    assert wrong["iou"] == 0
    assert wrong["hd95"] is None
    missed = segmentation_metrics(logits_for(nothing, 1), one)
    assert missed["dice_nonempty"] == pytest.approx(0, abs=1e-4)
    assert missed["hd95"] is None
    both = segmentation_metrics(
        torch.cat((logits_for(nothing, 1), logits_for(one, 1))), torch.cat((nothing, one))
    )
    assert (both["dice"], both["dice_nonempty"], both["hd95"], both["num_examples"]) == (1, 1, 0, 2)


def test_hausdorff_of_two_squares() -> None:
    """Ten columns apart: the outline's far side is as far as its near side."""
    first, second = np.zeros((2, 20, 40), bool)
    first[5:15, 5:15] = True
    second[5:15, 15:25] = True
    assert hausdorff95(first, second) == 10
    assert hausdorff95(first, first) == 0
    # a single stray pixel of many does not count
    stray = first.copy()
    stray[0, 39] = True
    assert hausdorff95(stray, first) == 0


def test_agreement_is_of_pixels() -> None:
    a = torch.tensor([[[[1.0, -1.0], [2.0, 3.0]]]])
    b = torch.tensor([[[[0.1, -5.0], [-2.0, 3.0]]]])
    assert pixel_agreement(a, b) == 0.75


def random_masks(seed: int) -> tuple[Tensor, Tensor]:
    """Return smooth random logits and targets of two classes, none empty."""
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(2, 6, 2, 24, 20)), (0, 0, 0, 2, 2))
    logits = torch.from_numpy(fields[0] - np.quantile(fields[0], 0.7)).float()
    top = fields[1].argmax(1) + 1
    targets = torch.from_numpy(np.where(fields[1].max(1) > 0.05, top, 0))
    return logits, targets


def test_dice_as_torchmetrics_has_it() -> None:
    tm = pytest.importorskip("torchmetrics.functional.segmentation")
    logits, targets = random_masks(0)
    maps = torch.stack([targets == 1, targets == 2], 1)
    assert maps.flatten(2).any(2).all()  # where one is empty the conventions differ
    theirs = tm.dice_score((logits > 0).long(), maps.long(), 2, average="none")
    found = segmentation_metrics(logits, targets)
    assert found["per_class_dice"] == pytest.approx(theirs.mean(0).tolist(), abs=1e-4)
    assert found["dice_nonempty"] == found["dice"]


@pytest.mark.slow  # MONAI takes seconds to import
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_metrics_as_monai_has_them() -> None:
    monai = pytest.importorskip("monai.metrics")
    logits, targets = random_masks(1)
    predicted, maps = logits > 0, torch.stack([targets == 1, targets == 2], 1)
    distances = monai.compute_hausdorff_distance(
        predicted, maps, include_background=True, percentile=95
    )
    ours = [
        [hausdorff95(p.numpy(), t.numpy()) for p, t in zip(*pair, strict=True)]
        for pair in zip(predicted, maps, strict=True)
    ]
    torch.testing.assert_close(distances.double(), torch.tensor(ours).double(), atol=1e-5, rtol=0)
    found = segmentation_metrics(logits, targets)
    assert found["hd95"] == pytest.approx(float(distances.mean()), abs=1e-5)
    dice, iou = (
        measure(predicted, maps, include_background=True).mean()
        for measure in (monai.compute_dice, monai.compute_iou)
    )
    assert found["dice"] == pytest.approx(float(dice), abs=1e-4)
    assert found["iou"] == pytest.approx(float(iou), abs=1e-4)
