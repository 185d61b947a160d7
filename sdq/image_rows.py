"""Labelled image files as rows, and how rows become splits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdq.data import ArrayImages, DataOptions, Images, ImageSet, Splits, divide
from sdq.errors import RequestError
from sdq.image_files import SUFFIXES, FileImages, ImageFile, common_format, name_in
from sdq.mask_files import FileMasks, check_sizes

EAGER_BYTES = 512 * 2**20
"""Decoded sets up to this size stay in memory; larger ones are read when asked for."""

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
UNREAD = (".tif", ".tiff", ".gif", ".webp", ".dcm", ".ppm", ".pgm", ".jp2", ".heic")
"""Images of other formats, which nobody should miss without a word."""

IMAGE_COLUMNS = ("image", "image_id", "file", "filename", "image_name")
LABEL_COLUMNS = ("label", "class", "dx", "target", "diagnosis")
CENTRE_COLUMNS = ("centre", "center", "client", "site", "hospital", "dataset")
LAYOUTS = (
    "give train/CLASS/*.jpg with test/ and val/ beside it, or images with one CSV that has "
    f"a column {'|'.join(IMAGE_COLUMNS)} and a column {'|'.join(LABEL_COLUMNS)} "
    "(or the one-hot columns of ISIC)"
)


@dataclass(frozen=True)
class Row:
    """One labelled image: ``split`` is train, val, test or empty (to be divided).

    Images of one ``group`` (a lesion, a patient) stay in one part; empty is a group of its own.
    ``centre`` names where the image was taken; empty where that is not known. ``masks`` are files
    that are united to its mask.
    """

    file: ImageFile
    label: str
    split: str = ""
    group: str = ""
    centre: str = ""
    masks: tuple[Path, ...] = ()


def class_folder_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """Return the images of ``{train,val,test}/CLASS/`` and the sorted names of the classes."""
    rows, names = [], set()
    for split in part_folders(path):
        for folder in sorted(p for p in split.glob("[!.]*") if p.is_dir()):
            names.add(folder.name)
            part, files = SPLIT_NAMES[split.name.lower()], _images_of_class(folder)
            rows += [Row(ImageFile(f), folder.name, part) for f in files]
    return rows, sorted_names(names)


def part_folders(path: Path) -> list[Path]:
    """Return the folders of a set's parts, ``train``, ``val`` and ``test``, however spelled."""
    return sorted(p for p in path.iterdir() if p.name.lower() in SPLIT_NAMES and p.is_dir())


def _images_of_class(folder: Path) -> list[Path]:
    """Return the images of a class; RequestError if some there could not be read or are deeper."""
    seen = [f for f in sorted(folder.rglob("*")) if f.suffix.lower() in (*SUFFIXES, *UNREAD)]
    # a program's own folders (thumbnails, checkpoints) and files are hidden
    seen = [f for f in seen if not any(p.startswith(".") for p in f.relative_to(folder).parts)]
    files = [f for f in seen if f.suffix.lower() in SUFFIXES and f.parent == folder]
    lost = [f for f in seen if f.suffix.lower() not in SUFFIXES or f.parent != folder]
    if lost:
        raise RequestError(
            f"{folder}: its images must be {', '.join(SUFFIXES)} files in the folder itself, got "
            f"{len(lost)} others, {lost[0].relative_to(folder)} first; convert or move them, or "
            "take them away"
        )
    return files


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class names: as numbers where all are, so that 10 follows 9."""
    names = set(names)
    numbers = all(n.isdecimal() and len(n) < 1000 for n in names)  # int refuses longer ones
    return tuple(sorted(names, key=int if numbers else None))


def build(
    folder: Path,
    rows: Sequence[Row],
    class_names: tuple[str, ...],
    options: DataOptions,
    *,
    foreground: tuple[str, ...] = (),
) -> Splits:
    """Turn rows into splits: decoded at once where they fit in EAGER_BYTES, else when asked for.

    Args:
        folder: of the set.
        rows: one an image.
        class_names: of the rows' labels.
        options: see :class:`sdq.data.DataOptions`.
        foreground: of a set for segmentation, the classes of its masks' values from 1 on; the
            labels may then be empty.

    Raises:
        RequestError: no rows, or images or masks that do not go together.
    """
    if not rows:
        raise RequestError(f"{folder}: the set must have at least one image, got none; {LAYOUTS}")
    files = [r.file for r in rows]
    channels, size = common_format(str(folder), files, options.image_size)
    lazy = FileImages(tuple(files), channels, size, fit=options.image_size is not None)
    images, masks = _in_memory(lazy), None
    if foreground:
        check_sizes([f.path for f in files], [r.masks for r in rows])
        found = tuple(r.masks for r in rows)
        masks = _in_memory(FileMasks(found, len(foreground), size, options.image_size))
    number = {name: c for c, name in enumerate(class_names or ("",))}
    centre_names = sorted_names(r.centre for r in rows if r.centre)
    centre = {"": -1} | {name: c for c, name in enumerate(centre_names)}
    whole = ImageSet(
        images,
        torch.tensor([number[r.label] for r in rows]),
        torch.tensor([centre[r.centre] for r in rows]) if centre_names else None,
        tuple(name_in(folder, r.file.path) for r in rows),
        masks,
    )
    if not any(r.split for r in rows):
        splits = divided(whole, class_names, options, [r.group for r in rows])
    else:
        train, val, test = (
            whole.subset(torch.tensor([i for i, r in enumerate(rows) if r.split == name]).long())
            for name in ("train", "val", "test")
        )
        splits = Splits(train, _or_none(val), _or_none(test), class_names)
    splits = replace(splits, centre_names=centre_names)
    return segmenting(splits, foreground) if foreground else splits


def segmenting(splits: Splits, foreground: tuple[str, ...]) -> Splits:
    """Return splits of images with masks for segmentation; their classes become label names."""
    labels = splits.class_names
    return replace(
        splits, task="segmentation", class_names=foreground,
        label_names=labels if len(labels) > 1 else (),
    )  # fmt: skip


def _in_memory(lazy: Images) -> Images:
    """Return images decoded at once if they fit in EAGER_BYTES."""
    n, channels, height, width = lazy.shape
    if n * channels * height * width > EAGER_BYTES:
        return lazy
    return ArrayImages(lazy.take(torch.arange(n)))


def _or_none(part: ImageSet) -> ImageSet | None:
    return part if len(part) else None


def divided(
    whole: ImageSet,
    class_names: tuple[str, ...],
    options: DataOptions,
    groups: Sequence[str] = (),
) -> Splits:
    """Divide a set by the options' shares and seed; images of one group stay together."""
    if not whole.names:
        whole = replace(whole, names=tuple(map(str, range(len(whole)))))
    if any(groups):
        parts = _divide_groups(whole.labels, groups, options)
    else:
        parts = divide(whole.labels, options.split, options.seed)
    train, val, test = (whole.subset(p) for p in parts)
    return Splits(train, _or_none(val), _or_none(test), class_names)


def _divide_groups(labels: Tensor, groups: Sequence[str], options: DataOptions) -> list[Tensor]:
    """Divide whole groups; a group counts as the rarest class in it, so that it reaches train."""
    keys = [g or f"\0{i}" for i, g in enumerate(groups)]  # no group: a group of one
    _, member_of = np.unique(np.array(keys), return_inverse=True)
    by_rarity = torch.bincount(labels).argsort(stable=True).argsort()[labels].numpy()
    rarest = np.full(member_of.max() + 1, len(labels))
    np.minimum.at(rarest, member_of, by_rarity)
    parts = divide(torch.from_numpy(rarest), options.split, options.seed)
    return [torch.from_numpy(np.flatnonzero(np.isin(member_of, p.numpy()))) for p in parts]
