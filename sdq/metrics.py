"""What a classifier is worth: metrics that do not hide the rare classes."""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from sdq.batches import Loader, pairs
from sdq.errors import RequestError, RunError
from sdq.modes import evaluating


@torch.no_grad()
def predict(model: nn.Module, loader: Loader) -> tuple[Tensor, Tensor]:
    """Return logits ``(N, classes)`` and labels ``(N,)`` of a whole set, on the CPU.

    Of a segmenter they are maps: ``(N, C, H, W)`` and ``(N, H, W)``.

    Raises:
        RequestError: there are no images.
        RunError: an output is NaN or infinite.
    """
    device = next(model.parameters()).device
    logits, labels = [], []
    with evaluating(model):
        for x, y in pairs(loader):
            logits.append(model(x.to(device)).float().cpu())
            labels.append(y)
    if not logits:
        raise RequestError("evaluation: the loader must have images, got none; give it some")
    found = torch.cat(logits)
    if not torch.isfinite(found).all():
        raise RunError(
            "evaluation: outputs must be finite, got NaN or infinity; the weights are unusable"
        )
    return found, torch.cat(labels)


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise RequestError unless labels ``(N,)`` are of the network's classes."""
    if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.uint8):
        raise RequestError(
            f"labels: must be int64 (N,), got {labels.dtype} {tuple(labels.shape)}; convert them, "
            "such as by .flatten().long()"
        )
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise RequestError(
            f"labels: must be 0 to {classes - 1}, for the network has {classes} outputs, got "
            f"{int(labels.min())} to {int(labels.max())}; number the classes from 0, or give the "
            "network as many outputs as there are classes"
        )


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Return metrics of a set of predictions.

    Args:
        logits: ``(N, classes)``.
        labels: int64 ``(N,)``.

    Returns:
        ``accuracy``; ``balanced_accuracy``, the mean recall over the classes that occur;
        ``macro_f1`` and ``auc`` (one against the rest), means over the classes that occur (None
        if a single class does);
        ``per_class_recall``, None for a class that does not occur; ``ece``, the expected
        calibration error over 15 bins; ``num_examples``.

    Raises:
        RequestError: a label is of no class.
    """
    from torchmetrics.functional import classification as tm  # here: it imports half of scipy

    classes = logits.shape[1]
    check_labels(labels, classes)
    present = torch.bincount(labels, minlength=classes) > 0
    probabilities = logits.softmax(dim=1)
    # torchmetrics gives a confidence of exactly 1 a bin of its own, beyond the last
    below_one = probabilities.clamp_max(1 - torch.finfo(probabilities.dtype).eps)
    with warnings.catch_warnings():
        # a class without examples has no AUC; it is left out of the mean below
        warnings.filterwarnings("ignore", message="No (positive|negative) samples")
        auc = tm.multiclass_auroc(probabilities, labels, classes, average="none")
    recall = tm.multiclass_recall(logits, labels, classes, average="none")
    f1 = tm.multiclass_f1_score(logits, labels, classes, average="none")
    return {
        "accuracy": float((logits.argmax(1) == labels).float().mean()),
        "balanced_accuracy": float(recall[present].mean()),
        "macro_f1": float(f1[present].mean()),
        "auc": float(auc[present].mean()) if int(present.sum()) > 1 else None,
        "per_class_recall": [float(r) if p else None for r, p in zip(recall, present, strict=True)],
        "ece": float(tm.multiclass_calibration_error(below_one, labels, classes, n_bins=15)),
        "num_examples": len(labels),
    }


def agreement(logits: Tensor, other: Tensor) -> float:
    """Return the share of samples for which two sets of logits name the same class."""
    return float((logits.argmax(1) == other.argmax(1)).float().mean())
