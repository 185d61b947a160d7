"""CT slices from DICOM, PNG or npy files, through a window of Hounsfield units.

A DICOM file holds Hounsfield units (after its slope and intercept); a window maps those that
matter to 0..255. A PNG, or an npy of uint8, was windowed by whoever made it and is taken as it is;
an npy of any other type holds Hounsfield units.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdq.data import ArrayImages, Images
from sdq.errors import RequestError
from sdq.image_files import DECODE_THREADS, fit_side
from sdq.image_rows import EAGER_BYTES

SUFFIXES = (".dcm", ".npy", ".png", ".jpg")


@dataclass(frozen=True)
class Window:
    """Hounsfield units that become 0..255: ``width`` of them around ``centre``."""

    centre: float = 40.0
    width: float = 80.0

    def __call__(self, hounsfield: np.ndarray) -> np.ndarray:
        """Return uint8 of the same shape."""
        share = (hounsfield.astype(np.float32) - (self.centre - self.width / 2)) / self.width
        pixels: np.ndarray = (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)
        return pixels


BRAIN = Window(40.0, 80.0)
"""The usual window of the brain: blood, at 50 to 80 units, is bright."""


@dataclass(frozen=True)
class CtSlices:
    """Slices decoded when asked for, one channel.

    Args:
        files: one a slice.
        side: of every image; the shorter side is resized to it, and the centre square cut out.
        window: of files that hold Hounsfield units.
    """

    files: tuple[Path, ...]
    side: int
    window: Window = BRAIN

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, 1, H, W)``."""
        return (len(self.files), 1, self.side, self.side)

    def take(self, indices: Tensor) -> Tensor:
        """Return the slices at ``indices`` (int64, ``(B,)``) as uint8 ``(B, 1, H, W)``.

        Raises:
            RequestError: a file cannot be decoded; the message names it.
        """
        wanted = [self.files[i] for i in indices.tolist()]
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            decoded = list(pool.map(self._decode, wanted))
        if not decoded:
            return torch.zeros((0, *self.shape[1:]), dtype=torch.uint8)
        return torch.from_numpy(np.stack(decoded)[:, None])

    def _decode(self, path: Path) -> np.ndarray:
        pixels = read_slice(path, self.window)
        if pixels.shape == (self.side, self.side):
            return pixels
        return np.array(fit_side(Image.fromarray(pixels), self.side))


def slices(files: Sequence[Path], side: int, window: Window = BRAIN) -> Images:
    """Return slices: decoded at once where they fit in memory, else when asked for."""
    lazy = CtSlices(tuple(files), side, window)
    if len(files) * side * side > EAGER_BYTES:
        return lazy
    return ArrayImages(lazy.take(torch.arange(len(files))))


def read_slice(path: Path, window: Window) -> np.ndarray:
    """Return one slice, uint8 ``(H, W)``.

    Raises:
        RequestError: it cannot be decoded, or is no slice.
    """
    try:
        if path.suffix == ".dcm":
            pixels = window(_hounsfield(path))
        elif path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            pixels = array if array.dtype == np.uint8 else window(array)
        else:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("L"))
    except RequestError:  # pydicom is not installed
        raise
    except Exception as error:  # three decoders, each with errors of many kinds
        raise _no_slice(path, error) from error
    if pixels.ndim != 2:
        raise RequestError(f"{path}: must be one slice (H, W), got shape {pixels.shape}")
    return pixels


def _no_slice(path: Path, error: Exception) -> RequestError:
    return RequestError(
        f"{path}: must be a CT slice (DICOM, PNG or npy), got {type(error).__name__}: "
        f"{error!s:.200}; replace or remove the file"
    )


def _hounsfield(path: Path) -> np.ndarray:
    data = _dicom().dcmread(path)
    slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
    found: np.ndarray = data.pixel_array.astype(np.float32) * slope + intercept
    return found


def patient(path: Path) -> str:
    """Return the patient of a DICOM file; empty for files that do not say.

    Raises:
        RequestError: it cannot be read.
    """
    if path.suffix != ".dcm":
        return ""
    pydicom = _dicom()
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID", ""))
    except Exception as error:  # as in read_slice
        raise _no_slice(path, error) from error


def _dicom() -> Any:
    try:
        import pydicom  # here: nothing else of this package needs it
    except ImportError:
        raise RequestError(
            "DICOM: pydicom must be installed to read it; pip install 'sdq[dicom]', or convert the "
            "slices to PNG"
        ) from None
    return pydicom
