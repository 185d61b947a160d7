"""Images from an ``.npz`` in MedMNIST's layout.

Decoded with ``allow_pickle=False``: a file can hold no code.
"""

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdq.data import ArrayImages, DataOptions, ImageSet, Splits
from sdq.errors import RequestError, nearest
from sdq.image_files import fit_side, planes
from sdq.image_rows import divided, segmenting
from sdq.mask_files import class_indices, fit_mask


def read_npz(path: Path, options: DataOptions) -> Splits:
    """Read an ``.npz`` in MedMNIST's layout, or ``images`` with ``labels`` to be divided.

    With ``masks`` it is a set for segmentation, whose labels may be missing.

    Args:
        path: the file. Images are uint8 N x H x W or N x H x W x C with C 1 or 3; labels are
            integers, N or N x 1. ``class_names`` (text) may name the classes. Masks are integers
            N x H x W or N x H x W x 1, 0 for background; ``mask_names`` may name the values from
            1 on (without labels ``class_names`` may as well).
        options: ``image_size`` resizes; ``split`` and ``seed`` divide a set without splits.

    Raises:
        RequestError: no such file, not an archive, or an array is missing or of a wrong kind.

    Source: Yang et al. 2023, MedMNIST v2, https://doi.org/10.1038/s41597-022-01721-8.
    """
    if not path.is_file():
        raise RequestError(f"{path}: no such file; give an .npz in MedMNIST's layout")
    if not zipfile.is_zipfile(path):
        raise RequestError(
            f"{path}: must be a complete .npz (zip) archive, got a file that is damaged, cut "
            "short or of another format; copy it again"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return _npz_splits(path, arrays, options)
    except RequestError:
        raise
    except Exception as error:  # zipfile and numpy have many for archives that are damaged
        raise RequestError(
            f"{path}: must be a complete .npz (zip) archive, got "
            f"{type(error).__name__}: {error!s:.200}; copy it again"
        ) from error


def _npz_splits(path: Path, arrays: Mapping[str, np.ndarray], options: DataOptions) -> Splits:
    has_splits = any(k.startswith(("train_", "val_", "test_")) for k in arrays)
    prefixes = ["train_"] if has_splits else [""]
    prefixes += [p for p in ("val_", "test_") if any(k.startswith(p) for k in arrays)]
    parts = {p: _npz_part(path, arrays, p, options.image_size) for p in prefixes}
    first = parts[prefixes[0]]
    labelled = first.masks is None or f"{prefixes[0]}labels" in arrays
    names = _npz_class_names(path, arrays, list(parts.values())) if labelled else ()
    if has_splits:
        splits = Splits(parts["train_"], parts.get("val_"), parts.get("test_"), names)
    else:
        splits = divided(first, names, options)
    if first.masks is None:
        return splits
    return segmenting(splits, _npz_mask_names(path, arrays, parts, labelled))


def _npz_part(
    path: Path, arrays: Mapping[str, np.ndarray], prefix: str, side: int | None
) -> ImageSet:
    images = _member(path, arrays, f"{prefix}images")
    masks = None
    if any(key.endswith("masks") for key in arrays):
        masks = _npz_masks(path, arrays, prefix, images.shape[:3], side)
    if masks is not None and f"{prefix}labels" not in arrays:
        labels = np.zeros(len(images), np.int64)
    else:
        labels = _member(path, arrays, f"{prefix}labels")
    if len(images) != len(labels):
        raise RequestError(
            f"{path}: {prefix}labels must have one entry an image, got {len(labels)} for "
            f"{len(images)} images; save both arrays from the same list"
        )
    return ImageSet(
        ArrayImages(_npz_pixels(f"{path}: {prefix}images", images, side)),
        _npz_labels(f"{path}: {prefix}labels", labels),
        masks=masks,
    )


def _npz_masks(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    prefix: str,
    shape: tuple[int, ...],
    side: int | None,
) -> ArrayImages:
    """Return masks uint8 ``(N, 1, H, W)`` for images ``(N, H, W)``."""
    where = f"{path}: {prefix}masks"
    masks = _member(path, arrays, f"{prefix}masks")
    if masks.ndim == 4 and masks.shape[3] == 1:
        masks = masks[..., 0]
    if masks.shape != shape:
        raise RequestError(
            f"{where} must be {' x '.join(map(str, shape))} (N x H x W) like the images, got shape "
            f"{masks.shape}; save one mask an image at the image's size"
        )
    indices = class_indices(where, masks, _named_masks(path, arrays))
    fitted = np.stack([fit_mask(mask, side) for mask in indices]) if len(indices) else indices
    return ArrayImages(torch.from_numpy(np.ascontiguousarray(fitted[:, None])))


def _named_masks(path: Path, arrays: Mapping[str, np.ndarray]) -> int | None:
    """Return how many foreground classes have a name; None if they have none."""
    key = "mask_names" if "mask_names" in arrays else "class_names"
    if key not in arrays or (key == "class_names" and any(k.endswith("labels") for k in arrays)):
        return None
    return len(_names(path, arrays, key, 1))


def _npz_mask_names(
    path: Path, arrays: Mapping[str, np.ndarray], parts: Mapping[str, ImageSet], labelled: bool
) -> tuple[str, ...]:
    """Return the names of the foreground classes; their numbers where they have none."""
    classes = 1
    for part in parts.values():
        assert part.masks is not None
        classes = max(classes, int(part.masks.take(torch.arange(len(part))).max()))
    if "mask_names" in arrays:
        return _names(path, arrays, "mask_names", classes)
    if "class_names" in arrays and not labelled:
        return _names(path, arrays, "class_names", classes)
    return ("foreground",) if classes == 1 else tuple(str(c + 1) for c in range(classes))


def _names(path: Path, arrays: Mapping[str, np.ndarray], key: str, classes: int) -> tuple[str, ...]:
    names = _member(path, arrays, key)
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) < classes:
        raise RequestError(
            f"{path}: {key} must be {classes} or more texts, got {names.dtype} of shape "
            f"{names.shape}; save np.array([name of the first class, ...])"
        )
    return tuple(str(n) for n in names)


def _member(path: Path, arrays: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    if key not in arrays:
        raise RequestError(
            f"{path}: no array {key!r}; {nearest(key, arrays)}; give train_images and "
            "train_labels (and val_…, test_…), or images and labels"
        )
    try:
        array = arrays[key]
    except ValueError as error:  # an object array, which numpy would have to unpickle
        raise RequestError(
            f"{path}: {key} must be an array of numbers or text, got {error}; "
            "save it again with a plain dtype"
        ) from error
    return np.atleast_1d(array)


def _npz_pixels(where: str, images: np.ndarray, side: int | None) -> Tensor:
    """Return uint8 ``(N, C, H, W)``."""
    if images.dtype != np.uint8:
        raise RequestError(
            f"{where} must be uint8, got {images.dtype}; scale the pixels to 0..255 and cast them"
        )
    if images.ndim not in (3, 4):
        raise RequestError(
            f"{where} must be N x H x W or N x H x W x C, got shape {images.shape}; "
            "reshape the array"
        )
    if images.ndim == 4 and images.shape[3] not in (1, 3):
        raise RequestError(
            f"{where} must have 1 or 3 channels on the last axis, got {images.shape[3]} in shape "
            f"{images.shape}; move the channels last or choose three of them"
        )
    if side is not None and images.shape[1:3] != (side, side) and len(images):
        grey = images.ndim == 3 or images.shape[3] == 1
        flat = (Image.fromarray(i.reshape(i.shape[:2]) if grey else i) for i in images)
        return torch.from_numpy(np.stack([planes(fit_side(i, side)) for i in flat]))
    images = images[..., None] if images.ndim == 3 else images
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def _npz_labels(where: str, labels: np.ndarray) -> Tensor:
    """Return int64 ``(N,)``."""
    if labels.dtype.kind not in "iu":
        raise RequestError(
            f"{where} must be integers, got {labels.dtype}; number the classes from 0"
        )
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise RequestError(
            f"{where} must have one class an image, got {labels.shape[1]} columns (multi-label); "
            "give one integer an image"
        )
    if labels.ndim not in (1, 2):
        raise RequestError(f"{where} must be N or N x 1, got shape {labels.shape}; reshape it")
    return torch.from_numpy(labels.reshape(-1).astype(np.int64))


def _npz_class_names(
    path: Path, arrays: Mapping[str, np.ndarray], parts: Sequence[ImageSet]
) -> tuple[str, ...]:
    classes = 1 + max((int(p.labels.max()) for p in parts if len(p)), default=0)
    if "class_names" in arrays:
        return _names(path, arrays, "class_names", classes)
    if classes > sum(len(p) for p in parts):
        raise RequestError(
            f"{path}: labels must be numbered from 0 without gaps, got {classes - 1} in a set of "
            f"{sum(len(p) for p in parts)} images; renumber the classes"
        )
    return tuple(str(c) for c in range(classes))
