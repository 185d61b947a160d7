"""What a segmenter is worth: overlap, and the distance between outlines."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdq.segmentation import class_maps, soft_dice


def segmentation_metrics(logits: Tensor, targets: Tensor) -> dict[str, Any]:
    """Return metrics of a set of predicted maps, thresholded at a probability of 0.5.

    Args:
        logits: ``(N, C, H, W)``, one map for each foreground class.
        targets: see :func:`sdq.segmentation.class_maps`.

    Returns:
        ``dice`` and ``iou``: means over images and classes, where an empty mask counts 1 if nothing
        is predicted and 0 if anything is; ``per_class_dice``; ``dice_nonempty``: the mean over the
        masks that are not empty (None if all are), as most publications report it; ``hd95``: see
        :func:`hausdorff95`, the mean over the masks for which it is defined, in pixels (None
        without any); ``num_examples``.
    """
    predicted, true = logits > 0, class_maps(targets, logits.shape[1]) > 0.5
    dice = _by_class(soft_dice, predicted, true)
    present = true.flatten(2).any(2)
    distances = [
        distance
        for p, t in zip(predicted.flatten(0, 1), true.flatten(0, 1), strict=True)
        if (distance := hausdorff95(p.numpy(), t.numpy())) is not None
    ]
    return {
        "dice": float(dice.mean()),
        "iou": float(_by_class(_iou, predicted, true).mean()),
        "per_class_dice": dice.mean(0).tolist(),
        "dice_nonempty": float(dice[present].mean()) if bool(present.any()) else None,
        "hd95": float(np.mean(distances)) if distances else None,
        "num_examples": len(logits),
    }


def overlap(logits: Tensor, targets: Tensor) -> dict[str, float | None]:
    """Return ``dice`` and ``iou`` alone: an epoch's distances would take longer than its steps."""
    predicted, true = logits > 0, class_maps(targets, logits.shape[1]) > 0.5
    return {
        "dice": float(_by_class(soft_dice, predicted, true).mean()),
        "iou": float(_by_class(_iou, predicted, true).mean()),
    }


def pixel_agreement(logits: Tensor, other: Tensor) -> float:
    """Return the share of pixels, over all maps, on which two networks decide alike."""
    return float(((logits > 0) == (other > 0)).float().mean())


def hausdorff95(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Return the 95th percentile of the distances between two outlines, in pixels.

    From each pixel of the one outline (the mask's pixels with a neighbour above, below, left or
    right that is not in it) to the nearest of the other; the larger of the two directions'
    percentiles. None if either mask is empty.

    Args:
        predicted: bool ``(H, W)``.
        true: likewise.

    Source: Huttenlocher et al. 1993, https://doi.org/10.1109/34.232073; the percentile as in MONAI.

    >>> row = np.arange(8)[None].repeat(8, 0)
    >>> hausdorff95(row < 3, row < 5)
    2.0
    """
    from scipy import ndimage  # here: who imports sdq does not wait for it

    if not (predicted.any() and true.any()):
        return None
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (predicted, true)]
    # to a mask's own outline, at every pixel
    to = [ndimage.distance_transform_edt(~edge) for edge in edges]
    return float(max(np.percentile(to[1][edges[0]], 95), np.percentile(to[0][edges[1]], 95)))


def _by_class(measure: Any, predicted: Tensor, true: Tensor) -> Tensor:
    """Return a measure of each image and class, ``(N, C)``."""
    found: Tensor = measure(predicted.flatten(0, 1), true.flatten(0, 1))
    return found.view(predicted.shape[:2])


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Return intersection over union of each bool mask ``(N, H, W)``; of two empty ones 1."""
    union = (a | b).flatten(1).sum(1)
    return torch.where(union > 0, (a & b).flatten(1).sum(1) / union.clamp_min(1), 1.0)
