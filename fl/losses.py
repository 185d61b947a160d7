r"""Losses against class imbalance; any of them goes with any method.

:math:`z` logits, :math:`y` the label, :math:`n_c` the client's images of class c, :math:`N_c` those
of all clients. A class of which the client has none never pulls on the others: its prior is 0 (with
1e-9 in the logarithm), its weight is never asked for, its margin is that of one image.

Segmentation has two losses of its own, ``dice_bce``, the engine's, and ``dice``, which are no
losses of classes; a method may bring another, as :mod:`fl.methods.cpa` does.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sdq.config import Config
from sdq.data import TaskName
from sdq.errors import RequestError
from sdq.segmentation import class_maps, dice_loss, segmentation_loss

LossName = Literal[
    "ce", "weighted", "focal", "balanced_softmax", "ldam_drw", "cpa", "dice", "dice_bce"
]
OF_TASK: dict[TaskName, tuple[LossName, ...]] = {
    "classification": ("ce", "weighted", "focal", "balanced_softmax", "ldam_drw", "cpa"),
    "segmentation": ("dice_bce", "dice"),
}
"""The losses of each task, its own choice first."""
Criterion = Callable[[Tensor, Tensor], Tensor]
"""Maps logits ``(N, classes)`` and labels ``(N,)``, or maps and masks, to the mean loss."""


class LossConfig(Config):
    """Which loss, and its hyper-parameters.

    Args:
        name: ``ce``; ``weighted``, by 1 / n_c; ``focal``; ``balanced_softmax``; ``ldam_drw``;
            ``cpa``, the conjoint prototype-aligned loss, without prototypes until a method gives
            its weights; of masks ``dice_bce``, Dice and binary cross-entropy, or ``dice`` alone.
        gamma: of ``focal``.
        max_margin: of ``ldam_drw``: of the rarest class.
        scale: of ``ldam_drw``: of the logits.
        drw_start: of ``ldam_drw``: share of the rounds after which classes are re-weighted.
        drw_beta: of ``ldam_drw``: of the effective number of images.
        beta: of ``cpa``: exponent of the mitigation.
    """

    name: LossName = "ce"
    gamma: Annotated[float, Field(ge=0)] = 2.0
    max_margin: Annotated[float, Field(gt=0)] = 0.5
    scale: Annotated[float, Field(gt=0)] = 30.0
    drw_start: Annotated[float, Field(ge=0, le=1)] = 0.8
    drw_beta: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    beta: Annotated[float, Field(ge=0)] = 0.8


def loss_of(
    task: TaskName, asked: LossConfig | None, of_method: LossConfig | None = None
) -> LossConfig:
    """Return the loss asked for, or the method's, or the task's own choice.

    Raises:
        RequestError: a loss of another task.
    """
    known = OF_TASK[task]
    if asked is None:
        return of_method or LossConfig(name=known[0])
    if asked.name not in known:
        raise RequestError(
            f"--loss: must be one of {', '.join(known)} in {task}, got {asked.name!r}; choose one "
            "of them, or leave it out"
        )
    return asked


def criterion(
    config: LossConfig, own_counts: Tensor, all_counts: Tensor, progress: float = 0.0
) -> Criterion:
    """Return the loss of one client in one round.

    Args:
        config: which.
        own_counts: ``(classes,)``, images of each class that the client has.
        all_counts: ``(classes,)``, of all clients; only ``cpa`` uses it.
        progress: share of the rounds that are over, in [0, 1).
    """
    match config.name:
        case "ce":
            return F.cross_entropy
        case "weighted":
            return lambda z, y: F.cross_entropy(z, y, inverse_frequency(own_counts).to(z))
        case "focal":
            return lambda z, y: focal(z, y, config.gamma)
        case "balanced_softmax":
            return lambda z, y: balanced_softmax(z, y, own_counts)
        case "ldam_drw":
            late = progress >= config.drw_start
            weight = effective_number_weight(own_counts, config.drw_beta) if late else None
            margins = ldam_margins(own_counts, config.max_margin)
            return lambda z, y: ldam(z, y, margins, config.scale, weight)
        case "cpa":
            mitigation = seesaw(all_counts, config.beta)
            return lambda z, y: prototype_aligned(z, y, mitigation)
        case "dice":
            return dice_loss
        case "dice_bce":
            return segmentation_loss


def inverse_frequency(counts: Tensor) -> Tensor:
    """Return weights ``N / (C' n_c)`` over the C' classes that occur, and 0 for the others."""
    present = counts > 0
    weight = counts.sum() / (present.sum() * counts.clamp_min(1)).float()
    return torch.where(present, weight, torch.zeros_like(weight))


def focal(logits: Tensor, labels: Tensor, gamma: float = 2.0) -> Tensor:
    r"""Return the mean of :math:`-(1 - p_y)^\gamma \log p_y`.

    Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, equation 4,
    https://arxiv.org/abs/1708.02002.
    """
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    # a power below 1 has no slope at 0, where nothing is left to learn
    rest = (-torch.expm1(log_p)).clamp_min(1e-12)
    return (-(rest**gamma) * log_p).mean()


def log_prior(counts: Tensor) -> Tensor:
    """Return ``log(n_c / n + 1e-9)``: -20.7 for a class that does not occur."""
    share = counts.double() / counts.sum().clamp_min(1)
    return (share + 1e-9).log().float()


def balanced_softmax(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    r"""Return :math:`CE(z + \log\pi, y)` with the classes' shares :math:`\pi`.

    Source: Ren et al., "Balanced Meta-Softmax", NeurIPS 2020, equation 4,
    https://arxiv.org/abs/2007.10740.
    """
    return F.cross_entropy(logits + log_prior(counts).to(logits), labels)


def ldam_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    r"""Return :math:`\Delta_c \propto n_c^{-1/4}`, the largest ``max_margin``; n at least 1."""
    margins = counts.clamp_min(1).float() ** -0.25
    # the rarest class that occurs has the largest: an absent one must not shrink all others
    present = counts > 0
    largest = margins[present].max() if bool(present.any()) else margins.max()
    return (margins / largest).clamp_max(1.0) * max_margin


def effective_number_weight(counts: Tensor, beta: float = 0.9999) -> Tensor:
    r"""Return weights :math:`(1-\beta)/(1-\beta^{n_c})`, of mean 1 over classes that occur, else 0.

    Source: Cui et al., "Class-Balanced Loss", CVPR 2019, equation 3,
    https://arxiv.org/abs/1901.05555.
    """
    present = counts > 0
    weight = (1 - beta) / (1 - beta ** counts.clamp_min(1).double())
    weight = torch.where(present, weight, torch.zeros_like(weight))
    return (weight / weight.sum() * present.sum()).float()


def ldam(
    logits: Tensor, labels: Tensor, margins: Tensor, scale: float = 30.0,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""Return :math:`CE(s (z - \Delta_y e_y), y)`, weighted by class from a late round on.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
    NeurIPS 2019, equations 10 to 13, https://arxiv.org/abs/1906.07413. The paper normalises
    features and head; here the logits are taken as they are.
    """
    shifted = logits - F.one_hot(labels, logits.shape[1]) * margins.to(logits)[labels, None]
    return F.cross_entropy(scale * shifted, labels, None if weight is None else weight.to(logits))


def seesaw(counts: Tensor, beta: float = 0.8) -> Tensor:
    r"""Return :math:`s_{ij} = (N_j/N_i)^\beta` where :math:`N_i > N_j`, else 1; ``(C, C)``."""
    n = counts.double()
    ratio = n[None, :] / n[:, None].clamp_min(1e-300)
    return torch.where(n[:, None] > n[None, :], ratio**beta, torch.ones_like(ratio)).float()


def prototype_aligned(
    logits: Tensor, labels: Tensor, mitigation: Tensor, class_weight: Tensor | None = None
) -> Tensor:
    r"""Return CPA: the mean of :math:`-\gamma_y \log \hat p_y`.

    .. math:: \hat p_i = e^{z_i} / (e^{z_i} + \sum_{j \neq i} s_{ij} e^{z_j})

    for the label's class i, with 1e-6 in the ratio and in the logarithm.

    Args:
        logits: ``(N, C)``.
        labels: ``(N,)``.
        mitigation: s, ``(C, C)``; see :func:`seesaw`.
        class_weight: gamma, ``(C,)``; None is 1, the loss of the first rounds.

    Source: Chen et al., "Personalized Retrogress-Resilient Federated Learning Toward Imbalanced
    Medical Data", IEEE TMI 41(12), 2022.
    """
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits)
    # a constant taken from all logits cancels in the ratio and keeps exp from overflowing
    e = (logits - logits.max(dim=1, keepdim=True).values.detach()).exp()
    own = (e * one_hot).sum(1)
    others = (e * (1 - one_hot) * mitigation.to(logits)[labels]).sum(1)
    loss = -(own / (own + others + 1e-6) + 1e-6).log()
    if class_weight is not None:
        loss = loss * class_weight.to(logits)[labels]
    return loss.mean()


def prototype_aligned_maps(
    logits: Tensor, targets: Tensor, mitigation: Tensor, class_weight: Tensor | None = None
) -> Tensor:
    r"""Return CPA's form for segmentation: half of CPA, half of cross-entropy, and Dice.

    A map is a network's answer to two classes, outside with logit 0 and inside; CPA is that of its
    pixels, and the mean over maps. Dice is smoothed with 1.

    Args:
        logits: ``(N, L, H, W)``.
        targets: see :func:`sdq.segmentation.class_maps`.
        mitigation: s between outside and inside, ``(L, 2, 2)``.
        class_weight: gamma of outside and inside, ``(L, 2)``; None is 1.

    Source: Chen et al., IEEE TMI 41(12), 2022, and its released code, for the sum.
    """
    z = logits.float()
    maps = class_maps(targets, z.shape[1])
    aligned = []
    for number, (of_map, inside) in enumerate(zip(z.unbind(1), maps.unbind(1), strict=True)):
        pair = torch.stack([torch.zeros_like(of_map), of_map], dim=-1).view(-1, 2)
        weight = None if class_weight is None else class_weight[number]
        aligned.append(prototype_aligned(pair, inside.long().flatten(), mitigation[number], weight))
    pixels = F.binary_cross_entropy_with_logits(z, maps)
    return (torch.stack(aligned).mean() + pixels) / 2 + dice_loss(z, maps, smooth=1.0)


def alignment_weight(own: Tensor, common: Tensor, present: Tensor, tau: float = 3.0) -> Tensor:
    r"""Return CPA's :math:`\gamma_c = (1+\tau)/(\cos(m_c, g_c)+\tau)`, 1 for an absent class.

    Args:
        own: the client's prototypes m, ``(C, D)``.
        common: the prototypes of all clients g, ``(C, D)``.
        present: bool ``(C,)``: where both exist.
        tau: at least 1.
    """
    # opposite prototypes have no finite weight at tau = 1
    gamma = (1 + tau) / (F.cosine_similarity(own, common, dim=1) + tau).clamp_min(1e-3)
    return torch.where(present, gamma, torch.ones_like(gamma)).detach()
