"""What compression did to each class, the rare classes first, and what of it is no chance."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdq.report.intervals import Interval, Paired, mean_loss, wilson
from sdq.report.predictions import Predictions

Level = Literal["warning", "unsure", ""]

LEAST_LOSS = 0.01
"""Beyond the average, for a warning: a loss of less is no reason to change anything."""

UNSURE_LOSS, UNSURE_IMAGES = 0.05, 2
"""Beyond the average, for a note that chance may explain: share, and images."""


@dataclass(frozen=True)
class ClassRow:
    """One class of the test images.

    Args:
        name: of the class.
        train_images: it has in training; None where that is not known.
        images: it has in the test.
        before: how many of them the float network gets right.
        after: how many the quantized one does; None without one.
        paired: both on the same images; None without a quantized network.
        level: ``warning``: compression cost this class more than the mean of the classes, beyond
            what chance explains; ``unsure``: more, but with so few images chance may explain it.
    """

    name: str
    train_images: int | None
    images: int
    before: int
    after: int | None = None
    paired: Paired | None = None
    level: Level = ""

    @property
    def intervals(self) -> tuple[Interval, Interval | None]:
        """The 95 % intervals of the shares of right answers, before and after."""
        after = None if self.after is None else wilson(self.after, self.images)
        return wilson(self.before, self.images), after


def class_rows(
    predictions: Predictions, names: Sequence[str], train_counts: Sequence[int] | None = None
) -> list[ClassRow]:
    """Return a row for each class that occurs in the test, the one with fewest images first.

    Args:
        predictions: on the test images.
        names: of the classes.
        train_counts: images of each class in training, by which classes are rare; None: the test
            images decide.
    """
    counts = [int((predictions.labels == c).sum()) for c in range(len(names))]
    rare = train_counts if train_counts is not None else counts
    order = sorted((c for c in range(len(names)) if counts[c]), key=lambda c: (rare[c], counts[c]))
    before = predictions.before.argmax(1) == predictions.labels
    if predictions.after is None:
        return [
            ClassRow(names[c], train_counts[c] if train_counts is not None else None, counts[c],
                     int(before[predictions.labels == c].sum()))
            for c in order
        ]  # fmt: skip
    after = predictions.after.argmax(1) == predictions.labels
    pairs = {c: paired(before, after, predictions.labels == c) for c in order}
    average, _ = mean_loss(list(pairs.values()))
    return [
        ClassRow(
            names[c],
            train_counts[c] if train_counts is not None else None,
            counts[c],
            pairs[c].both + pairs[c].first,
            pairs[c].both + pairs[c].second,
            pairs[c],
            level_of(pairs[c], average, len(pairs)),
        )
        for c in order
    ]


def paired(before: Tensor, after: Tensor, among: Tensor | None = None) -> Paired:
    """Count how two networks do on the same images.

    Args:
        before: bool ``(N,)``, whether the first is right.
        after: whether the second is.
        among: bool ``(N,)``, the images that count; None: all.
    """
    here = torch.ones_like(before) if among is None else among
    cells = [before & after, before & ~after, ~before & after, ~before & ~after]
    return Paired(*(int((cell & here).sum()) for cell in cells))


def level_of(pair: Paired, average: float, classes: int) -> Level:
    """Tell whether a class lost more than the classes did on average.

    A loss is held to be no chance if its interval lies beyond the average at a level that allows
    for as many looks as there are classes (Bonferroni): of runs without any such loss, one in
    forty warns.

    Args:
        pair: of the class.
        average: loss of right answers, as the mean of the classes' shares.
        classes: that are looked at.
    """
    above = pair.loss - max(average, 0.0)
    shown = pair.interval(1 - 0.05 / classes).low > max(average, 0.0)
    if shown and above >= LEAST_LOSS:
        return "warning"
    if above >= UNSURE_LOSS and pair.first - pair.second >= UNSURE_IMAGES:
        return "unsure"
    return ""


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Return how many images of each class (row) were taken for which (column), int64.

    Args:
        logits: ``(N, classes)``.
        labels: int64 ``(N,)``.
    """
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


@dataclass(frozen=True)
class Bin:
    """Answers of similar confidence: the mean confidence, the share that is right, how many."""

    confidence: float
    right: float
    images: int


def reliability(logits: Tensor, labels: Tensor, bins: int = 10) -> list[Bin]:
    """Return the answers in bins of equal width of confidence, without the empty ones.

    Args:
        logits: ``(N, classes)``.
        labels: int64 ``(N,)``.
        bins: over 0 to 1.
    """
    confidence, answer = logits.double().softmax(1).max(1)
    right = (answer == labels).double()
    place = (confidence * bins).long().clamp_max(bins - 1)
    return [
        Bin(float(confidence[place == b].mean()), float(right[place == b].mean()), count)
        for b in range(bins)
        if (count := int((place == b).sum()))
    ]
