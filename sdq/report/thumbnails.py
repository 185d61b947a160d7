"""Images whose answer changed, small enough to be part of a page."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from sdq.data import ImageSet
from sdq.report.predictions import Predictions

SIDE = 96
"""Pixels of the longer side of an image in the page, at most."""


@dataclass(frozen=True)
class Changed:
    """An image that the two networks answer differently.

    Args:
        place: of the image in the test set.
        name: of its file, where it has one.
        label: its class.
        before: answer of the float network.
        before_confidence: probability that it gave.
        after: answer of the quantized network.
        after_confidence: likewise.
        picture: as a data URI; None where there is no image to show.
    """

    place: int
    name: str
    label: str
    before: str
    before_confidence: float
    after: str
    after_confidence: float
    picture: str | None

    @property
    def kind(self) -> str:
        """``lost``, ``gained`` or ``other``: what became of the right answer."""
        if self.before == self.label:
            return "lost"
        return "gained" if self.after == self.label else "other"


def changed_images(
    predictions: Predictions,
    names: Sequence[str],
    rare_first: Sequence[str],
    images: ImageSet | None,
    most: int = 24,
) -> tuple[list[Changed], int]:
    """Return images with another answer than before, and how many there are in all.

    Lost ones come first, then gained ones; among them those of rare classes, and then those whose
    lost answer was surest.

    Args:
        predictions: of both networks.
        names: of the classes.
        rare_first: the classes in the order of the page.
        images: what the predictions are of; None: no pictures.
        most: of the first value.
    """
    if predictions.after is None:
        return [], 0
    sure_before, before = predictions.before.softmax(1).max(1)
    sure_after, after = predictions.after.softmax(1).max(1)
    where = (before != after).nonzero().flatten().tolist()
    rank = {name: place for place, name in enumerate(rare_first)}
    labels = predictions.labels

    def order(i: int) -> tuple[int, int, float]:
        kind = 0 if before[i] == labels[i] else 1 if after[i] == labels[i] else 2
        return kind, rank.get(names[int(labels[i])], len(rank)), -float(sure_before[i])

    chosen = sorted(where, key=order)[:most]
    found = [
        Changed(
            i,
            images.names[i] if images is not None and images.names else "",
            names[int(labels[i])],
            names[int(before[i])],
            float(sure_before[i]),
            names[int(after[i])],
            float(sure_after[i]),
            None if images is None else data_uri(images.images.take(torch.tensor([i]))[0]),
        )
        for i in chosen
    ]
    return found, len(where)


def data_uri(image: Tensor, side: int = SIDE) -> str:
    """Return a PNG of an image uint8 ``(C, H, W)`` as a data URI, a side at most ``side`` pixels.

    Of three channels it is in colour; of any other number the first channel is shown.
    """
    pixels = image.permute(1, 2, 0).numpy() if len(image) == 3 else image[0].numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side))
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode("ascii")
