"""Folders of images with folders of masks.

``images/`` and ``masks/``, or ``train/images``, ``train/masks`` and likewise ``val`` and ``test``.
A mask has its image's name without suffix, or that followed by ``_mask``, ``_segmentation`` or
``_lesion``. ``classes.txt`` names the foreground classes, one a line, from value 1 on; without it
there is one. A CSV that names the images may say more of them: a label, the centre, the patient,
the split.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.image_files import SUFFIXES, ImageFile
from sdq.image_folder import GROUP_COLUMNS, FileIndex, column_by_file
from sdq.image_rows import (
    CENTRE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_NAMES,
    Row,
    build,
    part_folders,
    sorted_names,
)

ENDINGS = ("", "_mask", "_segmentation", "_lesion")


def is_mask_folder(path: Path) -> bool:
    """Tell whether a folder is laid out so."""
    return any((part / "masks").is_dir() for part in (path, *part_folders(path)))


def read_mask_folder(path: Path, options: DataOptions) -> Splits:
    """Read a folder of images with masks; without parts it is divided by the options.

    Raises:
        RequestError: an image without a mask, files of different sizes or that cannot be read, or
            values that are no class.
    """
    parts = part_folders(path)
    images = {part: _files(part / "images") for part in parts or [path]}
    index = FileIndex(path, (image for files in images.values() for image in files))
    splits, centres, groups, labels = (
        column_by_file(index, names)
        for names in (("split",), CENTRE_COLUMNS, GROUP_COLUMNS, LABEL_COLUMNS)
    )
    rows: list[Row] = []
    for part, files in images.items():
        for image, mask in paired(str(part), files, _files(part / "masks")):
            split = SPLIT_NAMES.get(part.name.lower(), "") if parts else _split(path, image, splits)
            rows.append(
                Row(ImageFile(image), labels.get(image, ""), split, groups.get(image, ""),
                    centres.get(image, ""), (mask,))
            )  # fmt: skip
    names = sorted_names({row.label for row in rows})
    if "" in names and len(names) > 1:
        bare = next(row.file.path.name for row in rows if not row.label)
        raise RequestError(
            f"{path}: every image must have a label in the CSV if one has, got none for {bare!r}; "
            "add its row"
        )
    return build(path, rows, names, options, foreground=_classes(path))


def paired(where: str, images: Iterable[Path], masks: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Return every image with its mask.

    Raises:
        RequestError: an image has none, or two.
    """
    by_stem: dict[str, list[Path]] = {}
    for mask in masks:
        by_stem.setdefault(mask.stem, []).append(mask)
    found = []
    for image in images:
        own = [m for ending in ENDINGS for m in by_stem.get(image.stem + ending, []) if m != image]
        if len(own) != 1:
            raise RequestError(
                f"{where}: {image.name} must have one mask of its name, got "
                f"{', '.join(m.name for m in own) or 'none'}; an image without any foreground has "
                "an empty (black) mask"
            )
        found.append((image, own[0]))
    return found


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give images/ and masks/ beside each other")
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)


def _split(path: Path, image: Path, splits: Mapping[Path, str]) -> str:
    if not splits:
        return ""
    name = splits.get(image, "").lower()
    if name not in SPLIT_NAMES:
        raise RequestError(
            f"{path}: split of {image.name} must be train, val or test, got {name!r}; mend the "
            "column"
        )
    return SPLIT_NAMES[name]


def _classes(path: Path) -> tuple[str, ...]:
    file = path / "classes.txt"
    if not file.is_file():
        return ("foreground",)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise RequestError(f"{file}: must be text in UTF-8, got {error}; save it again") from error
    names = tuple(filter(None, map(str.strip, lines)))
    if not names or len(set(names)) < len(names):
        raise RequestError(
            f"{file}: must have one foreground class a line, each once, got {names!s:.200}; "
            "without the background"
        )
    return names
