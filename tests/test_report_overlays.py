"""Outlines on test images: where they run, and which images are shown."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from torch import Tensor, nn

from sdq.batches import Normalization
from sdq.data import ArrayImages, ImageSet
from sdq.mask_metrics import segmentation_metrics
from sdq.report.overlays import MOST_LOOKED_AT, MOST_SHOWN, TRUTH, outline, overlays

EDGE = re.compile(r"M(\d+) (\d+)([hv])(\d+)")


def filled(path: str, shape: tuple[int, int], along: str) -> np.ndarray:
    """Return the pixels between edges of one direction, counted from the first one on."""
    crossed = np.zeros((shape[0] + 1, shape[1] + 1), int)
    for x, y, direction, length in EDGE.findall(path):
        column, row, count = int(x), int(y), int(length)
        if direction == along == "h":
            crossed[row, column : column + count] += 1
        elif direction == along == "v":
            crossed[row : row + count, column] += 1
    inside = crossed.cumsum(0 if along == "h" else 1) % 2 == 1
    return inside[: shape[0], : shape[1]]


@given(arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_an_outline_is_what_parts_inside_and_outside(region):
    path = outline(torch.from_numpy(region)[None])
    assert not EDGE.sub("", path)
    for along in "hv":
        np.testing.assert_array_equal(filled(path, region.shape, along), region)


def test_classes_have_outlines_of_their_own():
    maps = torch.zeros(2, 1, 2, dtype=torch.bool)
    maps[0, 0, 0] = maps[1, 0, 1] = True
    assert outline(maps) == "M0 0h1M0 1h1M0 0v1M1 0v1" + "M1 0h1M1 1h1M1 0v1M2 0v1"


class Brighter(nn.Module):
    """Finds what is brighter than a threshold; the images are not normalised."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(threshold))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :1] - self.threshold


def squares(count: int) -> ImageSet:
    """A bright square on black; from image to image more of the background is half as bright."""
    pixels = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    masks = torch.zeros(count, 1, 8, 8, dtype=torch.uint8)
    masks[:, :, 2:5, 2:5] = 1
    for i in range(count):
        pixels[i].view(-1)[: i * 64 // count] = 100
    pixels[masks > 0] = 200
    return ImageSet(
        ArrayImages(pixels), torch.zeros(count, dtype=torch.int64), masks=ArrayImages(masks)
    )


PLAIN = Normalization((0.0,), (1.0,))


def test_images_from_the_worst_to_the_best_of_the_last_network():
    images = squares(20)
    networks = {"float": Brighter(0.6), "quantized": Brighter(0.3)}
    found = overlays(networks, images, PLAIN)
    assert (found.looked_at, len(found.images)) == (20, MOST_SHOWN)
    for shown in found.images:
        truth, before, after = shown.outlines
        assert (truth.of, before.of, after.of) == (TRUTH, "float", "quantized")
        assert truth.dice is None
        assert truth.path == before.path == "M2 2h3M2 5h3M2 2v3M5 2v3"  # a square of 3 x 3 at 2
        assert before.dice == pytest.approx(1)
        part = images.subset(torch.tensor([shown.place]))
        pixels, masks = (p.take(torch.tensor([0])) for p in (part.images, part.masks))
        with torch.no_grad():
            logits = networks["quantized"](pixels / 255)
        expected = segmentation_metrics(logits, masks[:, 0].long())["dice"]
        assert after.dice == pytest.approx(expected)
    # the more of the background is bright, the worse: the last image first, the first one last
    places = [shown.place for shown in found.images]
    assert places == sorted(places, reverse=True)
    assert (places[0], places[-1]) == (19, 0)


def test_a_picture_is_the_image():
    found = overlays({"float": Brighter(0.6)}, squares(3), PLAIN).images[0]
    head, _, content = found.picture.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert (picture.size, found.size) == ((8, 8), (8, 8))
        assert picture.getpixel((3, 3)) == 200


def test_of_many_images_some_are_looked_at():
    found = overlays({"float": Brighter(0.3)}, squares(MOST_LOOKED_AT + 50), PLAIN)
    assert (found.looked_at, len(found.images)) == (MOST_LOOKED_AT, MOST_SHOWN)
    # they are of the whole set, not its first ones
    assert found.images[0].place >= MOST_LOOKED_AT


def test_nothing_there_and_nothing_found():
    images = squares(1)
    empty = ImageSet(
        images.images, images.labels, masks=ArrayImages(torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    )
    found = overlays({"a": Brighter(0.9), "b": Brighter(0.3)}, empty, PLAIN).images[0].outlines
    assert [o.path == "" for o in found] == [True, True, False]
    assert found[1].dice == pytest.approx(1)
    assert found[2].dice == pytest.approx(0, abs=1e-4)
