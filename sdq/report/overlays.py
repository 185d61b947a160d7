"""Test images with the outlines of what is there and of what networks find."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdq.batches import Batches, Normalization
from sdq.data import ImageSet
from sdq.errors import RunError
from sdq.metrics import predict
from sdq.report.thumbnails import data_uri
from sdq.segmentation import class_maps, soft_dice

MOST_SHOWN = 8
MOST_LOOKED_AT = 200
"""Images among which those that are shown are chosen; a page is not worth another whole test."""
PICTURE_SIDE = 256
BATCH = 16
TRUTH = "truth"


@dataclass(frozen=True)
class Outline:
    """The border of a region.

    Args:
        of: :data:`TRUTH`, or a network's name.
        dice: overlap with the truth, over all classes together; None for the truth.
        path: of an SVG path, in pixels of the image.
    """

    of: str
    dice: float | None
    path: str


@dataclass(frozen=True)
class Overlay:
    """A test image with outlines.

    Args:
        place: of the image in the test set.
        name: of its file, where it has one.
        size: ``(H, W)``, in which the outlines are.
        picture: as a data URI.
        outlines: the truth first.
    """

    place: int
    name: str
    size: tuple[int, int]
    picture: str
    outlines: Sequence[Outline]


@dataclass(frozen=True)
class Overlays:
    """Images from the least to the greatest overlap of the last network with the truth.

    Args:
        images: at even steps of the order.
        looked_at: images that were put in order.
    """

    images: Sequence[Overlay] = ()
    looked_at: int = 0


def overlays(
    networks: Mapping[str, nn.Module], images: ImageSet, normalization: Normalization
) -> Overlays:
    """Return test images that range from the worst to the best of the last network.

    Args:
        networks: that give maps, by the name on the page.
        images: with masks; of many, :data:`MOST_LOOKED_AT` at even steps are looked at.
        normalization: of the networks.

    Raises:
        RunError: an output is NaN or infinite, or no map (of a run whose files disagree).
    """
    places = _even(len(images), MOST_LOOKED_AT)
    judged = list(networks.values())[-1]
    logits, masks = predict(judged, _batches(images, places, normalization))
    if logits.dim() != 4 or masks.dim() < 3:
        raise RunError(
            f"the network and the data must give maps (N, C, H, W), got {tuple(logits.shape)} and "
            f"{tuple(masks.shape)}; is the run's metrics.json its own?"
        )
    order = soft_dice(logits > 0, class_maps(masks, logits.shape[1])).argsort(stable=True)
    chosen = places[order[_even(len(order), MOST_SHOWN)]]
    found = {
        name: predict(network, _batches(images, chosen, normalization))
        for name, network in networks.items()
    }
    return Overlays(
        [_overlay(images, int(place), i, found) for i, place in enumerate(chosen)], len(places)
    )


def _even(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()


def _batches(images: ImageSet, places: Tensor, normalization: Normalization) -> Batches:
    return Batches(images.subset(places), normalization, batch_size=BATCH)


def _overlay(
    images: ImageSet, place: int, row: int, found: Mapping[str, tuple[Tensor, Tensor]]
) -> Overlay:
    """Return one image's overlay; ``found`` has logits and masks of each network, by rows."""
    shown: list[Outline] = []
    for name, (logits, masks) in found.items():
        there = class_maps(masks[row : row + 1], logits.shape[1]) > 0
        predicted = logits[row : row + 1] > 0
        if not shown:
            shown.append(Outline(TRUTH, None, outline(there[0])))
        shown.append(Outline(name, float(soft_dice(predicted, there)), outline(predicted[0])))
    pixels = images.images.take(torch.tensor([place]))[0]
    name = images.names[place] if images.names else ""
    return Overlay(
        place, name, (pixels.shape[1], pixels.shape[2]), data_uri(pixels, PICTURE_SIDE), shown
    )


def outline(maps: Tensor) -> str:
    """Return the borders of regions as an SVG path along the edges of their pixels.

    Args:
        maps: bool ``(C, H, W)``; regions of different classes have borders of their own.

    >>> outline(torch.ones(1, 1, 2, dtype=torch.bool))
    'M0 0h2M0 1h2M0 0v1M2 0v1'
    """
    return "".join(_borders(m, "M{1} {0}h{2}") + _borders(m.T, "M{0} {1}v{2}") for m in maps)


def _borders(region: Tensor, step: str) -> str:
    """Return the edges between a region's rows and what is not in it, edges in line as one.

    Args:
        region: bool ``(H, W)``.
        step: made of an edge's row, first column and length.
    """
    nothing = region.new_zeros(1, region.shape[1])
    edge = torch.cat([nothing, region]) != torch.cat([region, nothing])
    found = []
    for row in edge.any(1).nonzero()[:, 0].tolist():
        change = torch.diff(edge[row].int(), prepend=torch.zeros(1), append=torch.zeros(1))
        starts, ends = (change == 1).nonzero()[:, 0], (change == -1).nonzero()[:, 0]
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        found += [step.format(row, start, end - start) for start, end in pairs]
    return "".join(found)
