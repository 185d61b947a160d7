"""Image files: how they are decoded, resized, and read when asked for.

Everything that changes a size does it in one way, so that a set gives the same pixels from an
array and from files: the shorter side becomes ``image_size`` (PIL, bilinear with antialiasing),
then the centre square is cut out. Rotation tags (EXIF) are not applied.
"""

import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdq.errors import RequestError

DECODE_THREADS = 4  # PIL releases the lock while it decodes; more threads than that wait for disk
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


class NameIndex:
    """Finds files by what a table calls them: by the path, else by the name alone (:func:`stem`).

    Args:
        names: of the files, with their paths in the set's folder.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self.by_path: dict[str, list[int]] = {}
        self.by_stem: dict[str, list[int]] = {}
        for place, name in enumerate(self.names):
            self.by_path.setdefault(name, []).append(place)
            self.by_stem.setdefault(stem(name), []).append(place)

    def find(self, name: str, where: str) -> int | None:
        """Return the place of a file among the names; None if there is none.

        Args:
            name: as the table has it.
            where: in which table, for the message.

        Raises:
            RequestError: several files are called so.
        """
        places = self.by_path.get(name) or self.by_stem.get(stem(name), [])
        if len(places) > 1:
            raise RequestError(
                f"{where}: image {name!r:.100} must be one file, got "
                f"{', '.join(self.names[place] for place in places[:3])}; "
                "write the path inside the folder into the CSV"
            )
        return places[0] if places else None


def stem(name: str) -> str:
    """Return the name of an image without folders, and without suffix if it is an image's."""
    last = Path(name).name
    return Path(last).stem if Path(last).suffix.lower() in SUFFIXES else last


def name_in(folder: Path, file: Path) -> str:
    """Return a file's path in a folder, or its name where it is elsewhere."""
    return file.relative_to(folder).as_posix() if file.is_relative_to(folder) else file.name


@dataclass(frozen=True)
class ImageFile:
    """An image that is not decoded yet: a file, or the bytes of a member of an archive."""

    path: Path
    data: bytes | None = None

    def open(self) -> Image.Image:
        """Return the image with its header read; its pixels are read when asked for."""
        return Image.open(self.path if self.data is None else io.BytesIO(self.data))


@dataclass(frozen=True)
class FileImages:
    """Images decoded when asked for.

    Args:
        files: one an image.
        channels: 1 (grey) or 3 (RGB).
        size: ``(H, W)`` of every image.
        fit: whether images are resized and cut to ``size``; else they have it already.
    """

    files: tuple[ImageFile, ...]
    channels: int
    size: tuple[int, int]
    fit: bool

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)``."""
        return (len(self.files), self.channels, *self.size)

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (int64, ``(B,)``) as uint8 ``(B, C, H, W)``.

        Raises:
            RequestError: a file cannot be decoded; the message names it.
        """
        out = np.empty((len(indices), self.channels, *self.size), np.uint8)

        wanted = indices.tolist()

        def decode(first: int) -> None:  # every n-th image: a task an image would cost more
            for slot in range(first, len(wanted), DECODE_THREADS):
                out[slot] = self._decode(self.files[wanted[slot]])

        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            # list: an error of a thread is raised when its result is read
            list(pool.map(decode, range(DECODE_THREADS)))
        return torch.from_numpy(out)

    def _decode(self, file: ImageFile) -> np.ndarray:
        try:
            with file.open() as image:
                pixels = image.convert("L" if self.channels == 1 else "RGB")
        except UNDECODABLE as error:
            raise _undecodable(file, error) from error
        return planes(fit_side(pixels, self.size[0]) if self.fit else pixels)


UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _undecodable(file: ImageFile, error: BaseException) -> RequestError:
    return RequestError(
        f"{file.path}: must be a JPEG, PNG or BMP image, got {type(error).__name__}: {error}; "
        "replace or remove the file"
    )


def fit_side(
    image: Image.Image, side: int, resampling: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Resize the shorter side to ``side``, then cut out the centre square."""
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = image.resize((width, height), resampling)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def planes(image: Image.Image) -> np.ndarray:
    """Return the pixels as uint8 ``(C, H, W)``."""
    pixels = np.asarray(image)  # (H, W) or (H, W, C)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def common_format(
    where: str, files: Sequence[ImageFile], image_size: int | None
) -> tuple[int, tuple[int, int]]:
    """Read every header; return the channels and ``(H, W)`` that all images get.

    Raises:
        RequestError: an image cannot be read or has not 8 bits, or sizes differ without an
            ``image_size``.
    """
    grey, first = True, None
    for file in files:
        try:
            with file.open() as image:
                mode, (width, height) = image.mode, image.size
        except UNDECODABLE as error:
            raise _undecodable(file, error) from error
        if mode.startswith(("I", "F")):
            raise RequestError(
                f"{file.path}: pixels must be 8 bits, got mode {mode!r}; scale the image to 0..255"
            )
        grey = grey and mode in ("1", "L", "LA")
        first = first or (file, height, width)
        if image_size is None and (height, width) != first[1:]:
            raise RequestError(
                f"{where}: images must be of one size (H, W), got {first[1:]} "
                f"({first[0].path.name}) and {(height, width)} ({file.path.name}); "
                "pass --image-size S"
            )
    assert first is not None  # callers have at least one row
    return (1 if grey else 3), (first[1:] if image_size is None else (image_size, image_size))
