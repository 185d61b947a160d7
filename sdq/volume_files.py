"""Volumes as slices: NIfTI (through nibabel) and MetaImage, with their masks."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdq.data import ArrayImages, DataOptions, ImageSet, Splits
from sdq.errors import RequestError
from sdq.image_files import fit_side
from sdq.image_rows import divided, segmenting, sorted_names
from sdq.mask_files import class_indices, fit_mask

ELEMENTS = {
    "MET_UCHAR": "u1", "MET_CHAR": "i1", "MET_USHORT": "u2", "MET_SHORT": "i2", "MET_UINT": "u4",
    "MET_INT": "i4", "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
PERCENTILES = (0.5, 99.5)
"""Of a volume, that become 0 and 255: magnetic resonance has no unit, and single voxels glare."""


@dataclass(frozen=True)
class Volume:
    """One scan: its file, that of its mask, and where it was made."""

    image: Path
    mask: Path
    centre: str

    @property
    def name(self) -> str:
        """One that no other volume of the set has: centre, folder and file."""
        stem, folder = self.image.name.partition(".")[0], self.image.parent.name
        return "-".join(dict.fromkeys((self.centre, folder, stem)))


def read_volume(path: Path) -> np.ndarray:
    """Return a volume as slices ``(slices, H, W)``, of its own type.

    Raises:
        RequestError: the file cannot be decoded, is no volume, or nibabel is not installed.
    """
    try:
        found = _meta_image(path) if path.suffix in (".mhd", ".mha") else _nifti(path)
    except RequestError:  # a ValueError too
        raise
    except (OSError, ValueError, KeyError, EOFError, ArithmeticError, zlib.error) as error:
        raise RequestError(
            f"{path}: must be a volume (NIfTI or MetaImage), got {type(error).__name__}: "
            f"{error!s:.200}; copy it again"
        ) from error
    if found.ndim != 3 or not found.size:
        raise RequestError(
            f"{path}: must have three dimensions and voxels, got shape {found.shape}; save one "
            "volume a file"
        )
    return found


def _nifti(path: Path) -> np.ndarray:
    nibabel = _nibabel()
    try:
        image = nibabel.load(path)
        values = np.asarray(image.dataobj)  # (x, y, z): the first runs along a row
    except (
        nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError,
        nibabel.spatialimages.ImageDataError,
    ) as error:  # fmt: skip
        raise ValueError(str(error)) from error
    return values.transpose(2, 1, 0) if values.ndim == 3 else values


def _nibabel() -> Any:
    try:
        import nibabel  # here: nothing else of this package needs it
    except ImportError:
        raise RequestError(
            "NIfTI: nibabel must be installed to read it; pip install 'sdq[nifti]'"
        ) from None
    return nibabel


def _meta_image(path: Path) -> np.ndarray:
    """Read a MetaImage: a header of ``key = value`` lines; the voxels follow, or are in a file."""
    data = path.read_bytes()
    header: dict[str, str] = {}
    position = 0
    while "ElementDataFile" not in header:
        end = data.find(b"\n", position)
        if end < 0:
            raise ValueError("no ElementDataFile in the header")
        key, _, value = data[position:end].decode("ascii").partition("=")
        header[key.strip()] = value.strip()
        position = end + 1
    name = header["ElementDataFile"]
    raw = data[position:] if name == "LOCAL" else (path.parent / Path(name).name).read_bytes()
    if header.get("CompressedData", "False").lower() == "true":
        raw = zlib.decompress(raw)
    big = header.get("BinaryDataByteOrderMSB", header.get("ElementByteOrderMSB", "False"))
    order = ">" if big.lower() == "true" else "<"
    shape = [int(n) for n in header["DimSize"].split()][::-1]
    return np.frombuffer(raw, np.dtype(order + ELEMENTS[header["ElementType"]])).reshape(shape)


def grey(volume: np.ndarray) -> np.ndarray:
    """Return a volume as uint8; other types are scaled between two percentiles of the volume."""
    if volume.dtype == np.uint8:
        return volume
    low, high = np.percentile(volume, PERCENTILES)
    share = (volume.astype(np.float32) - low) / max(high - low, 1e-6)
    found: np.ndarray = (np.clip(share, 0, 1) * 255 + 0.5).astype(np.uint8)
    return found


def volume_splits(
    where: str,
    volumes: Sequence[Volume],
    class_names: tuple[str, ...],
    options: DataOptions,
    *,
    united: bool = False,
) -> Splits:
    """Return the slices that show foreground; all slices of a volume stay in one part.

    Args:
        where: of the set, for messages.
        volumes: at least one.
        class_names: of the mask's values from 1 on.
        options: see :class:`sdq.data.DataOptions`.
        united: whether every value above 0 is the one foreground class.

    Raises:
        RequestError: a file cannot be read, a mask has another shape than its volume or a value
            that is no class, or slices differ in size and no ``image_size`` is given.
    """
    images: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    names: list[str] = []
    owners: list[int] = []
    for number, volume in enumerate(volumes):
        for index, image, mask in _slices(volume, len(class_names), options.image_size, united):
            images.append(image)
            masks.append(mask)
            names.append(f"{volume.name}-{index}")
            owners.append(number)
        _check_size(where, volume, images)
    if not images:
        raise RequestError(f"{where}: a slice must show foreground, got none; check the masks")
    centres = sorted_names(v.centre for v in volumes)
    whole = ImageSet(
        ArrayImages(torch.from_numpy(np.stack(images)[:, None])),
        torch.zeros(len(images), dtype=torch.long),
        torch.tensor([centres.index(volumes[o].centre) for o in owners]),
        tuple(names),
        ArrayImages(torch.from_numpy(np.stack(masks)[:, None])),
    )
    splits = divided(whole, (), options, [str(o) for o in owners])
    return replace(segmenting(splits, class_names), centre_names=centres)


def _slices(
    volume: Volume, classes: int, side: int | None, united: bool
) -> "list[tuple[int, np.ndarray, np.ndarray]]":
    image, mask = grey(read_volume(volume.image)), read_volume(volume.mask)
    if image.shape != mask.shape:
        raise RequestError(
            f"{volume.mask}: must have the shape of {volume.image.name}, {image.shape} "
            f"(slices, H, W), got {mask.shape}; save the mask of this volume"
        )
    if united:
        mask = mask > 0
    elif mask.dtype.kind == "f":  # NIfTI masks often are
        mask = np.round(mask).astype(np.int64)
    indices = class_indices(str(volume.mask), mask, classes)
    shown = np.flatnonzero(indices.reshape(len(indices), -1).any(1))
    return [(int(i), _fit(image[i], side), fit_mask(indices[i], side)) for i in shown]


def _fit(image: np.ndarray, side: int | None) -> np.ndarray:
    if side is None or image.shape == (side, side):
        return image
    return np.asarray(fit_side(Image.fromarray(image), side))


def _check_size(where: str, volume: Volume, images: list[np.ndarray]) -> None:
    if images and images[-1].shape != images[0].shape:
        raise RequestError(
            f"{where}: slices must be of one size (H, W), got {images[0].shape} and "
            f"{images[-1].shape} ({volume.image}); pass --image-size S"
        )
