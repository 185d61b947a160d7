"""Labels that say less than a mask: boxes, from files or simulated, and which classes an image has.

A mask of boxes is uint8 ``(..., C, H, W)``, a map for each foreground class: boxes of several
classes may overlap.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from torch import Tensor

from sdq.errors import RequestError, nearest
from sdq.mask_files import fit_mask
from sdq.segmentation import class_maps

MOST_PIXELS = 2**27
"""Of an image that boxes are believed to be in; a map of it has to be made for each class."""


@dataclass(frozen=True)
class Box:
    """A rectangle around something of a class.

    Args:
        class_name: of the foreground.
        left, top: the first column and row in it, counted from 0.
        right, bottom: the first column and row behind it.
    """

    class_name: str
    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class BoxedImage:
    """The boxes of one image: its file's name without suffix, its ``(H, W)``, and the boxes."""

    name: str
    size: tuple[int, int]
    boxes: tuple[Box, ...]

    def masks(self, class_names: Sequence[str], side: int | None = None) -> Tensor:
        """Return the boxes as a mask, uint8 ``(C, H, W)``.

        Args:
            class_names: of the foreground, in their order.
            side: to which the image is resized and cut, as data are with ``image_size``.

        Raises:
            RequestError: a box of another class.
        """
        found = np.zeros((len(class_names), *self.size), np.uint8)
        for box in self.boxes:
            if box.class_name not in class_names:
                raise RequestError(
                    f"{self.name:.100}: the class of a box must be one of "
                    f"{', '.join(class_names)}, got {box.class_name!r:.100}; "
                    f"{nearest(box.class_name, class_names)}"
                )
            found[class_names.index(box.class_name), box.top : box.bottom, box.left : box.right] = 1
        return torch.from_numpy(np.stack([fit_mask(mask, side) for mask in found]))


def box_masks(
    masks: Tensor,
    generator: torch.Generator,
    margin: tuple[int, int] = (1, 9),
    *,
    classes: int = 1,
) -> Tensor:
    """Return the box that an annotator might have drawn around each class of each mask.

    Args:
        masks: uint8 ``(N, 1, H, W)``, class indices.
        generator: of the margins.
        margin: least and greatest number of pixels between the class and each side of its box,
            drawn for each side alone; the box ends at the image's edge.
        classes: number of foreground classes.

    Returns:
        uint8 ``(N, classes, H, W)``; a class that is not in a mask has no box.

    Source: Wicaksana et al., FedMix, TMI 2023, https://arxiv.org/abs/2205.01840.
    """
    maps = class_maps(masks[:, 0], classes) > 0
    rows, columns = (
        _covered(maps.any(3), generator, margin),
        _covered(maps.any(2), generator, margin),
    )
    return (rows[..., :, None] & columns[..., None, :]).to(torch.uint8)


def _covered(shown: Tensor, generator: torch.Generator, margin: tuple[int, int]) -> Tensor:
    """Return which rows or columns a box covers, from those ``(N, C, L)`` that show the class."""
    count = shown.shape[2]
    least, greatest = margin
    draws = torch.randint(least, greatest + 1, (2, *shown.shape[:2]), generator=generator)
    place = torch.arange(count)
    first = torch.where(shown, place, count).amin(2) - draws[0]
    last = torch.where(shown, place, -1).amax(2) + draws[1]
    inside = (place >= first[..., None]) & (place <= last[..., None])
    return inside & shown.any(2, keepdim=True)


def classes_present(masks: Tensor, classes: int) -> Tensor:
    """Return which foreground classes each mask shows, bool ``(N, classes)``.

    Args:
        masks: ``(N, 1, H, W)``, class indices.
        classes: number of foreground classes.
    """
    return (class_maps(masks[:, 0], classes) > 0).flatten(2).any(2)


def read_coco(path: Path) -> dict[str, BoxedImage]:
    """Read the boxes of a COCO JSON file, by image name without suffix.

    Raises:
        RequestError: no such file, not in COCO's layout, or a box that is empty or reaches outside
            its image.

    Source: https://cocodataset.org/#format-data: ``bbox`` is left, top, width and height.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        names = {entry["id"]: str(entry["name"]) for entry in document["categories"]}
        files = {entry["id"]: str(entry["file_name"]) for entry in document["images"]}
        found = {entry["id"]: _coco_image(path, entry) for entry in document["images"]}
        for number, entry in enumerate(document["annotations"]):
            image = found[entry["image_id"]]
            left, top, width, height = map(float, entry["bbox"])
            where = f"{path}: annotation {number} ({files[entry['image_id']]:.100})"
            corners = (left, top, left + width, top + height)
            box = _box(where, names[entry["category_id"]], corners, image.size)
            found[entry["image_id"]] = replace(image, boxes=(*image.boxes, box))
        return {image.name: image for image in found.values()}
    except RequestError:  # a ValueError too
        raise
    except _DAMAGED as error:
        raise _damaged(
            path, "a COCO file with images, categories and annotations with bbox", error
        ) from error


def _coco_image(path: Path, entry: dict[str, Any]) -> BoxedImage:
    size = _size(str(path), int(entry["height"]), int(entry["width"]))
    return BoxedImage(Path(entry["file_name"]).stem, size, ())


def read_voc(path: Path) -> BoxedImage:
    """Read the boxes of an image from a Pascal VOC XML file.

    Raises:
        RequestError: no such file, not in VOC's layout, or a box that is empty or reaches outside
            the image.

    Source: Everingham et al. 2010, https://doi.org/10.1007/s11263-009-0275-4: pixels count from 1,
    and ``xmax`` and ``ymax`` belong to the box.
    """
    try:
        root = ElementTree.parse(path).getroot()
        size = _size(str(path), _number(root, "size/height"), _number(root, "size/width"))
        boxes = []
        for number, entry in enumerate(root.iter("object")):
            left, top, right, bottom = (
                _number(entry, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")
            )
            where, name = f"{path}: object {number}", entry.findtext("name", "").strip()
            boxes.append(_box(where, name, (left - 1, top - 1, right, bottom), size))
    except RequestError:  # a ValueError too
        raise
    except _DAMAGED as error:
        raise _damaged(path, "a Pascal VOC file with size and object/bndbox", error) from error
    name = Path(root.findtext("filename") or path.name).stem
    return BoxedImage(name, size, tuple(boxes))


_DAMAGED = (
    OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError,
    ElementTree.ParseError,
)  # fmt: skip
"""What a document that is not laid out as expected leads to."""


def _damaged(path: Path, rule: str, error: Exception) -> RequestError:
    return RequestError(
        f"{path}: must be {rule}, got {type(error).__name__}: {error!s:.200}; mend the file"
    )


def _size(where: str, height: int, width: int) -> tuple[int, int]:
    """Return the size of an image; RequestError if it can be none."""
    if min(height, width) < 1 or height * width > MOST_PIXELS:
        raise RequestError(
            f"{where}: an image must have 1 to {MOST_PIXELS} pixels, got {height:.6g} x "
            f"{width:.6g}; mend its height and width"
        )
    return height, width


def _number(element: ElementTree.Element, tag: str) -> int:
    text = element.findtext(tag)
    if text is None:
        raise ValueError(f"no {tag}")
    return round(float(text))


def _box(
    where: str, name: str, corners: tuple[float, float, float, float], size: tuple[int, int]
) -> Box:
    """Return a box of whole pixels; RequestError if it is empty or reaches outside the image."""
    left, top, right, bottom = corners
    height, width = size
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise RequestError(
            f"{where}: a box must have pixels and lie inside the image ({height} x {width}), got "
            f"columns {left:g} to {right:g} and rows {top:g} to {bottom:g}; mend or remove it"
        )
    return Box(name, math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom))
