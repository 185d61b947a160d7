"""Losses of phase 2: distillation from the float model, and entropy-aware bin regularization."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sdq.config import BinReduction


def distillation(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    r"""Return the cross-entropy between the teacher's and the student's class probabilities.

    .. math:: L_{KD} = -\frac1N \sum_i \sum_c p^F_c(X_i) \log p^Q_c(X_i)

    Soft labels at temperature 1, no hard-label term.

    Args:
        student_logits: ``(N, classes)``.
        teacher_logits: ``(N, classes)``; no gradient flows into them.

    Source: Huang et al., SDQ, ICML 2022, equation 9.
    """
    targets = F.softmax(teacher_logits.detach(), dim=1)
    return F.cross_entropy(student_logits, targets)


def curvature_noise(logits: Tensor, signs: Tensor) -> Tensor:
    r"""Return random vectors with the covariance of the cross-entropy's Hessian by the logits.

    .. math:: u = \sqrt p \odot s - p\, (\sqrt p \cdot s), \qquad
              \mathrm{E}\, u u^T = \mathrm{diag}(p) - p p^T

    The Hessian of cross-entropy is the same for all labels, hard or soft.

    Args:
        logits: ``(N, classes)``.
        signs: of that shape, -1 or 1 with equal chances.
    """
    p = logits.softmax(1)
    root = p.sqrt() * signs
    return root - p * root.sum(1, keepdim=True)


def bin_regularization(position: Tensor, level: Tensor, reduction: BinReduction = "mean") -> Tensor:
    r"""Return the entropy-aware bin regularization of one layer.

    .. math:: L_{EBR} = \sum_n \big[(\overline{v_n} - q_n)^2 + \mathrm{Var}(v_n)\big]

    over the filled bins of the layer's own bitwidth, or that sum over the number of filled bins:
    real weights are pulled to the level of the bin they round to. Weights are taken in units of the
    step between levels, so that a bin has width 1 in every layer. A bin with one weight has
    variance 0.

    Args:
        position: of each weight among the levels, in steps; see
            :meth:`sdq.learned_scale.WeightQuantizer.in_steps`.
        level: that each weight is rounded to, in steps; they differ by whole numbers.
        reduction: over the bins. The paper has the ``sum``; the ``mean`` is our choice, for a sum
            gives a layer of 8 bits 64 times the say of one of 2 bits.

    Source: Huang et al., SDQ, ICML 2022, equation 10; Han et al., "Improving Low-Precision Network
    Quantization via Bin Regularization", ICCV 2021, equation 5.
    """
    # reshape, not view: weights may lie in channels-last order
    values = position.reshape(-1)
    with torch.no_grad():
        level = level.reshape(-1)
        low = level.min()
        bin_index = (level - low).long()
        count = torch.bincount(bin_index)
        filled = count.clamp_min(1).to(values.dtype)
    zeros = values.new_zeros(len(count))
    mean = zeros.index_add(0, bin_index, values) / filled
    square = zeros.index_add(0, bin_index, (values - mean[bin_index]).square())
    # the unbiased variance; one weight alone deviates from its mean by 0
    variance = square / (filled - 1).clamp_min(1)
    levels = low + torch.arange(len(count), device=values.device, dtype=values.dtype)
    terms = ((mean - levels).square() + variance)[count > 0]
    return terms.sum() if reduction == "sum" else terms.mean()
