"""Masks as they are saved: class indices, or black and white for a single class.

A mask is resized to its nearest pixels, and cut out as its image is, so that both go on fitting.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdq.errors import RequestError
from sdq.image_files import DECODE_THREADS, UNDECODABLE, fit_side

MOST_UNNAMED = 32
"""More classes than these nobody leaves without names: such values are shades of grey."""


def class_indices(where: str, mask: np.ndarray, classes: int | None) -> np.ndarray:
    """Return masks as class indices, uint8 of the same shape.

    Args:
        where: of the masks, for messages.
        mask: integers or bool. Of a single class they may be grey, up to 255: what is brighter than
            127 is foreground.
        classes: number of foreground classes; None takes the greatest value, or 1 if all values
            are 0 or 255.

    Raises:
        RequestError: another value.

    >>> class_indices("here", np.array([0, 255, 255]), None).tolist()
    [0, 1, 1]
    """
    if mask.dtype.kind not in "biu":
        raise RequestError(
            f"{where}: masks must be integers, got {mask.dtype}; save the number of each pixel's "
            "class, 0 for background"
        )
    low, high = (int(mask.min()), int(mask.max())) if mask.size else (0, 0)
    if classes is None:
        white = high == 255 and bool(np.isin(mask, (0, 255)).all())
        classes = 1 if white else max(high, 1)
        if MOST_UNNAMED < classes < 256:
            raise RequestError(
                f"{where}: masks without names must have values in 0..{MOST_UNNAMED}, or 0 and 255 "
                f"alone, got {high}, as grey edges of a resized mask are; save 0 and 1, or name "
                "the classes (mask_names)"
            )
    if classes == 1 and 127 < high < 256 and low >= 0:
        grey: np.ndarray = (mask > 127).astype(np.uint8)
        return grey
    if low < 0 or high > min(classes, 255):
        known = "0 and 1, or 0 and 255" if classes == 1 else f"in 0..{classes}"
        raise RequestError(
            f"{where}: masks must have values {known}, got {low if low < 0 else high}; "
            "number the foreground classes from 1, name all of them, and save PNG, for JPEG "
            "changes values"
        )
    return mask.astype(np.uint8)


def fit_mask(mask: np.ndarray, side: int | None) -> np.ndarray:
    """Return a mask ``(H, W)`` resized and cut as :func:`sdq.image_files.fit_side` does images."""
    if side is None or mask.shape == (side, side):
        return mask
    return np.asarray(fit_side(Image.fromarray(mask), side, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class FileMasks:
    """Masks decoded when asked for.

    Args:
        files: of each mask; several are united, none is an empty mask.
        classes: number of foreground classes.
        size: ``(H, W)`` of every mask.
        side: to which the shorter side is resized, or None.
    """

    files: tuple[tuple[Path, ...], ...]
    classes: int
    size: tuple[int, int]
    side: int | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, 1, H, W)``."""
        return (len(self.files), 1, *self.size)

    def take(self, indices: Tensor) -> Tensor:
        """Return the masks at ``indices`` (int64, ``(B,)``) as uint8 ``(B, 1, H, W)``.

        Raises:
            RequestError: a file cannot be decoded or has a value that is no class; it is named.
        """
        wanted = [self.files[i] for i in indices.tolist()]
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            decoded = list(pool.map(self._decode, wanted))
        found = np.zeros((len(wanted), 1, *self.size), np.uint8)
        for slot, mask in enumerate(decoded):
            found[slot, 0] = mask
        return torch.from_numpy(found)

    def _decode(self, files: tuple[Path, ...]) -> np.ndarray:
        united = np.zeros(self.size, np.uint8)
        for path in files:
            mask = fit_mask(class_indices(str(path), read_mask(path), self.classes), self.side)
            united = np.maximum(united, mask)
        return united


def read_mask(path: Path) -> np.ndarray:
    """Return the values of a mask file, ``(H, W)``: grey ones, or the indices of a palette.

    Raises:
        RequestError: it cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            plain = image.mode in ("1", "L", "P", "I", "I;16")
            return np.asarray(image if plain else image.convert("L"))
    except UNDECODABLE as error:
        raise RequestError(
            f"{path}: must be a mask in PNG or BMP, got {type(error).__name__}: {error}; replace "
            "the file"
        ) from error


def check_sizes(images: Sequence[Path], masks: Sequence[tuple[Path, ...]]) -> None:
    """Raise RequestError if a mask file has not the size of its image's file."""
    for image, files in zip(images, masks, strict=True):
        for mask in files:
            ours, theirs = _size(image), _size(mask)
            if ours != theirs:
                raise RequestError(
                    f"{mask}: must be as large as its image, {ours} (H, W) of {image.name}, got "
                    f"{theirs}; save both at one size"
                )


def _size(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size[1], image.size[0]
    except UNDECODABLE as error:
        raise RequestError(
            f"{path}: must be an image, got {type(error).__name__}: {error}; replace the file"
        ) from error
