"""What a network is for, and what follows from that: losses, metrics, the shape of its output.

A network's output says which task it has: logits ``(N, classes)`` name a class of each image, maps
``(N, C, H, W)`` have a logit a pixel for each of C foreground classes (a sigmoid each; none for the
background). So nobody who trains, searches or measures has to name it.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import losses, mask_metrics, metrics, segmentation
from sdq.batches import Loader
from sdq.data import TaskName
from sdq.errors import RequestError
from sdq.modes import evaluating


@dataclass(frozen=True)
class Task:
    """One kind of network. ``logits`` are as its output is, ``targets`` as batches have them.

    Args:
        name: of the task.
        loss: of ``(logits, targets)``; targets may be soft, as ``soft_labels`` gives them.
        distillation: of ``(student's logits, teacher's logits)``.
        divergence: the same less its least value, for networks that are compared.
        curvature_noise: of ``(logits, random signs)``: vectors with the covariance of the Hessian
            of an image's divergence by its logits.
        soft_labels: probabilities from logits.
        metrics: of ``(logits, targets)``, for ``metrics.json``.
        scores: of ``(logits, targets)``: those by which epochs can be compared.
        agreement: share of equal decisions of ``(logits, other's logits)``.
        selections: what ``--select`` can be besides ``loss`` and ``last``; the first is the
            default.
        logits_shape: of one image, from ``(number of classes, (H, W))``.
        answer: what a network must return, for messages.
    """

    name: TaskName
    loss: Callable[[Tensor, Tensor], Tensor]
    distillation: Callable[[Tensor, Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]
    curvature_noise: Callable[[Tensor, Tensor], Tensor]
    soft_labels: Callable[[Tensor], Tensor]
    metrics: Callable[[Tensor, Tensor], dict[str, Any]]
    scores: Callable[[Tensor, Tensor], dict[str, float | None]]
    agreement: Callable[[Tensor, Tensor], float]
    selections: tuple[str, ...]
    logits_shape: Callable[[int, tuple[int, int]], tuple[int, ...]]
    answer: str

    def selection(self, asked: str | None) -> str:
        """Return what epochs are compared by: as asked, or this task's own choice.

        Raises:
            RequestError: a metric of another task.
        """
        known = (*self.selections, "loss", "last")
        if asked is not None and asked not in known:
            raise RequestError(
                f"--select: must be one of {', '.join(known)} in {self.name}, got {asked!r}; "
                "choose one of them, or leave it out"
            )
        return asked or self.selections[0]

    def check_logits(self, network: nn.Module, sample: Tensor, classes: int) -> None:
        """Raise RequestError unless the network answers a sample ``(1, C, H, W)`` as it must."""
        out = answer_to(network, sample)
        height, width = sample.shape[2:]
        wanted = (1, *self.logits_shape(classes, (height, width)))
        if not isinstance(out, Tensor) or out.shape != wanted:
            got = tuple(out.shape[1:]) if isinstance(out, Tensor) else type(out).__name__
            raise RequestError(
                f"model: must return {self.answer.format(classes)}, got {got}; "
                "check the number of classes"
            )


def answer_to(network: nn.Module, sample: Tensor) -> Any:
    """Return a network's output in evaluation mode; RequestError if it does not take the sample."""
    try:
        with evaluating(network), torch.no_grad():
            return network(sample)
    except Exception as error:  # the user's code may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"model: must accept images of shape {tuple(sample.shape[1:])} (C, H, W), "
            f"but: {reason}; pass --image-size, or another model"
        ) from error


def _class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy; of soft labels too, as ``sdq.ptq.soft_labelled`` gives them."""
    soft = labels.is_floating_point() and labels.shape == logits.shape
    if soft and not bool(((labels.sum(1) - 1).abs() < 1e-2).all()):
        raise RequestError(
            "labels: must be one class an image, int64 (N,), or probabilities of sum 1, got rows "
            "of another sum; several labels an image are not supported"
        )
    if not soft and labels.device.type == "cpu":  # on a GPU it would have to be waited for
        metrics.check_labels(labels, logits.shape[1])
    return F.cross_entropy(logits, labels)


def _class_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    ours, theirs = F.log_softmax(logits, dim=1), F.log_softmax(reference, dim=1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _class_scores(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    found = metrics.classification_metrics(logits, labels)
    return {name: found[name] for name in ("accuracy", "balanced_accuracy", "auc")}


CLASSIFICATION = Task(
    name="classification",
    loss=_class_loss,
    distillation=losses.distillation,
    divergence=_class_divergence,
    curvature_noise=losses.curvature_noise,
    soft_labels=lambda logits: logits.softmax(1),
    metrics=metrics.classification_metrics,
    scores=_class_scores,
    agreement=metrics.agreement,
    selections=("auc", "accuracy", "balanced_accuracy"),
    logits_shape=lambda classes, _: (classes,),
    answer="one logit for each of {} classes",
)

SEGMENTATION = Task(
    name="segmentation",
    loss=segmentation.segmentation_loss,
    distillation=segmentation.map_distillation,
    divergence=segmentation.map_divergence,
    curvature_noise=segmentation.map_curvature_noise,
    soft_labels=torch.sigmoid,
    metrics=mask_metrics.segmentation_metrics,
    scores=mask_metrics.overlap,
    agreement=mask_metrics.pixel_agreement,
    selections=("dice", "iou"),
    logits_shape=lambda classes, side: (classes, *side),
    answer="a map of logits, as large as the image, for each of {} foreground classes",
)

TASKS: dict[TaskName, Task] = {task.name: task for task in (CLASSIFICATION, SEGMENTATION)}


def task_of(logits: Any) -> Task:
    """Return the task that a network's output ``(N, classes)`` or ``(N, C, H, W)`` speaks of.

    Raises:
        RequestError: it is of neither.
    """
    if not isinstance(logits, Tensor):
        raise RequestError(
            f"network: must answer with one tensor of logits, got {type(logits).__name__}; wrap it "
            "in a module that returns the logits alone"
        )
    if logits.dim() not in (2, 4):
        raise RequestError(
            "network: must answer with logits (N, classes), or maps of them (N, C, H, W), got "
            f"{tuple(logits.shape)}; wrap it in a module that returns such"
        )
    if logits.dim() == 2 and logits.shape[1] == 1:
        raise RequestError(
            "network: must answer with a logit for each of 2 classes or more, got one; give it two "
            "outputs, and the labels 0 and 1"
        )
    return SEGMENTATION if gives_maps(logits) else CLASSIFICATION


def gives_maps(answer: Any) -> bool:
    """Return whether a network's output is ``(N, C, H, W)``."""
    return isinstance(answer, Tensor) and answer.dim() == 4


def evaluate(model: nn.Module, loader: Loader) -> dict[str, Any]:
    """Return the metrics of a model's task on a set of batches."""
    logits, targets = metrics.predict(model, loader)
    return task_of(logits).metrics(logits, targets)


class Teacher:
    """A frozen copy of a float network, asked for soft labels."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    def loss(self, student_logits: Tensor, images: Tensor) -> Tensor:
        """Return the distillation loss of a batch ``(N, C, H, W)``."""
        with torch.no_grad():
            targets = self.network.to(images.device)(images)
        if targets.shape != student_logits.shape:
            raise RequestError(
                f"teacher: must give logits of shape {tuple(student_logits.shape)} as the student "
                f"does, got {tuple(targets.shape)}; take one of the same classes"
            )
        return task_of(student_logits).distillation(student_logits, targets)
