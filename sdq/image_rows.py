"""Labelled image files as rows, and how rows become splits."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdq.data import ArrayImages, DataOptions, Images, ImageSet, Splits, divide
from sdq.errors import RequestError
from sdq.image_files import SUFFIXES, FileImages, ImageFile, common_format

EAGER_BYTES = 512 * 2**20
"""Decoded sets up to this size stay in memory; larger ones are read when asked for."""

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
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
    ``centre`` names where the image was taken; empty where that is not known.
    """

    file: ImageFile
    label: str
    split: str = ""
    group: str = ""
    centre: str = ""


def class_folder_rows(path: Path) -> tuple[list[Row], tuple[str, ...]]:
    """Return the images of ``{train,val,test}/CLASS/`` and the sorted names of the classes."""
    rows, names = [], set()
    for split in sorted(p for p in path.iterdir() if p.name in SPLIT_NAMES and p.is_dir()):
        for folder in sorted(p for p in split.glob("[!.]*") if p.is_dir()):
            names.add(folder.name)
            files = sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)
            rows += [Row(ImageFile(f), folder.name, SPLIT_NAMES[split.name]) for f in files]
    return rows, sorted_names(names)


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sort class names: as numbers where all are, so that 10 follows 9."""
    names = set(names)
    numbers = all(n.isdecimal() and len(n) < 1000 for n in names)  # int refuses longer ones
    return tuple(sorted(names, key=int if numbers else None))


def build(
    where: str, rows: Sequence[Row], class_names: tuple[str, ...], options: DataOptions
) -> Splits:
    """Turn rows into splits: decoded at once where they fit in EAGER_BYTES, else when asked for."""
    if not rows:
        raise RequestError(f"{where}: the set must have at least one image, got none; {LAYOUTS}")
    files = [r.file for r in rows]
    channels, size = common_format(where, files, options.image_size)
    lazy = FileImages(tuple(files), channels, size, fit=options.image_size is not None)
    images: Images = lazy
    if len(files) * channels * size[0] * size[1] <= EAGER_BYTES:
        images = ArrayImages(lazy.take(torch.arange(len(files))))
    number = {name: c for c, name in enumerate(class_names)}
    centre_names = sorted_names(r.centre for r in rows if r.centre)
    centre = {"": -1} | {name: c for c, name in enumerate(centre_names)}
    whole = ImageSet(
        images,
        torch.tensor([number[r.label] for r in rows]),
        torch.tensor([centre[r.centre] for r in rows]) if centre_names else None,
        tuple(r.file.path.name for r in rows),
    )
    if not any(r.split for r in rows):
        splits = divided(whole, class_names, options, [r.group for r in rows])
        return replace(splits, centre_names=centre_names)
    parts = {
        name: whole.subset(torch.tensor([i for i, r in enumerate(rows) if r.split == name]).long())
        for name in ("train", "val", "test")
    }
    return Splits(
        parts["train"], _or_none(parts["val"]), _or_none(parts["test"]), class_names,
        centre_names=centre_names,
    )  # fmt: skip


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
