"""Losses of a network that gives maps: one logit a pixel for each foreground class.

A pixel may belong to several classes as far as the network says: each map has a sigmoid of its own,
and none stands for the background.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdq.errors import RequestError

SMOOTH = 1e-4
"""Added to both sides of Dice's fraction: two empty masks agree. Source: FedMix's released code."""


def class_maps(targets: Tensor, classes: int) -> Tensor:
    """Return one map for each foreground class, float ``(N, classes, H, W)``.

    Args:
        targets: integers ``(N, H, W)`` or ``(N, 1, H, W)``, 0 is background and 1 the first
            foreground class; or such maps already, of 0 to 1.
        classes: number of foreground classes.

    Raises:
        RequestError: targets of another kind. On a GPU values are not looked at.

    >>> class_maps(torch.tensor([[[0, 2]]]), 2).tolist()
    [[[[0.0, 0.0]], [[0.0, 1.0]]]]
    """
    whole = not targets.is_floating_point()
    if targets.dim() == 4 and targets.shape[1] == classes and not (whole and classes == 1):
        _check_values(targets, 1, "maps of each class")
        return targets.float()
    if targets.dim() == 4 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.dim() != 3 or not whole:
        raise RequestError(
            f"masks: must be integers (N, H, W), or maps (N, {classes}, H, W) of 0 to 1, got "
            f"{targets.dtype} {tuple(targets.shape)}; give the number of each pixel's class, 0 for "
            "background, such as by .long()"
        )
    _check_values(targets, classes, "numbers of classes, 0 for background")
    numbers = torch.arange(1, classes + 1, device=targets.device).view(1, -1, 1, 1)
    return (targets[:, None] == numbers).float()


def _check_values(targets: Tensor, most: int, what: str) -> None:
    if targets.device.type != "cpu" or not targets.numel():  # a GPU would have to be waited for
        return
    low, high = (float(x) for x in targets.aminmax())
    if not 0 <= low <= high <= most:
        repair = "divide by 255" if high == 255 else "number the foreground classes from 1"
        raise RequestError(
            f"masks: must be {what}, in 0..{most}, got {low:g} to {high:g}; {repair}"
        )


def soft_dice(a: Tensor, b: Tensor, smooth: float = SMOOTH) -> Tensor:
    r"""Return the Dice coefficient of each image, over all its maps together.

    .. math:: \frac{2 \sum ab + \epsilon}{\sum a + \sum b + \epsilon}

    Args:
        a: ``(N, ...)``, probabilities or 0 and 1.
        b: of the same shape.
        smooth: epsilon.

    Returns:
        ``(N,)``; two empty masks have 1.

    Source: Wicaksana et al., FedMix, TMI 2023, https://arxiv.org/abs/2205.01840.

    >>> soft_dice(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])).item()
    0.6666777729988098
    """
    a, b = a.flatten(1).float(), b.flatten(1).float()
    return (2 * (a * b).sum(1) + smooth) / (a.sum(1) + b.sum(1) + smooth)


def dice_loss(logits: Tensor, targets: Tensor, smooth: float = SMOOTH) -> Tensor:
    """Return one minus the mean Dice coefficient.

    Args:
        logits: ``(N, C, H, W)``.
        targets: see :func:`class_maps`.
        smooth: see :func:`soft_dice`.
    """
    maps = class_maps(targets, logits.shape[1])
    return 1 - soft_dice(logits.float().sigmoid(), maps, smooth).mean()


def segmentation_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return :func:`dice_loss` plus the mean binary cross-entropy of the pixels.

    Where a mask is empty Dice alone has next to no gradient, whatever the network shows there.

    Args:
        logits: ``(N, C, H, W)``.
        targets: see :func:`class_maps`.
    """
    maps = class_maps(targets, logits.shape[1])
    pixels = F.binary_cross_entropy_with_logits(logits.float(), maps)
    return dice_loss(logits, maps) + pixels


def map_distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Return the binary cross-entropy of the student's pixels against the teacher's probabilities.

    Args:
        student_logits: ``(N, C, H, W)``.
        teacher_logits: likewise; no gradient flows into them.
    """
    targets = teacher_logits.detach().float().sigmoid()
    return F.binary_cross_entropy_with_logits(student_logits.float(), targets)


def map_curvature_noise(logits: Tensor, signs: Tensor) -> Tensor:
    """Return random vectors with the covariance of the Hessian of :func:`map_divergence`.

    Its Hessian by the logits of one image is diagonal, p (1 - p) over the number of pixels.

    Args:
        logits: ``(N, C, H, W)``.
        signs: of that shape, -1 or 1 with equal chances.
    """
    p = torch.sigmoid(logits)
    return (p * (1 - p) / logits[0].numel()).sqrt() * signs


def map_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return the mean Kullback-Leibler divergence of the pixels from a reference's.

    Args:
        logits: ``(N, C, H, W)``.
        reference: likewise, of the network that is to be matched.
    """
    return map_distillation(logits, reference) - map_distillation(reference, reference)
