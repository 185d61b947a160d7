"""``SPLIT.csv``: which image is whose, and in which part.

One row an image. ``file`` is the path of its file in the set's folder, or, if no other file has it,
its name alone, with or without suffix; where the images are not files, ``index`` is its place: in
the set before it was divided, or, of a set that has parts of its own, counted over train, val and
test one after another. ``client`` names who has it; ``split`` is train, val or test, and may be
missing where the set has parts of its own. Images without a row are left out.
"""

from dataclasses import replace
from pathlib import Path

import torch

from sdq.csv_file import lower_names, open_lines, rows_under
from sdq.data import ImageSet, Splits
from sdq.errors import RequestError
from sdq.image_files import NameIndex
from sdq.image_rows import SPLIT_NAMES, sorted_names

PARTS = ("train", "val", "test")


def apply_split_file(path: Path, splits: Splits) -> Splits:
    """Return the images as the file divides them, with its clients as their centres.

    Raises:
        RequestError: no such file, a column is missing, or a row names no image, one twice, or no
            part.
    """
    header, rows = _read(path)
    key = next((k for k in ("file", "index") if k in header), None)
    if key is None or "client" not in header:
        raise RequestError(
            f"{path}: must have the columns 'file' or 'index', and 'client', got "
            f"{', '.join(header):.200}; add them"
        )
    index, places = _places(path, splits, key)
    clients = sorted_names(row["client"] for row in rows if row.get("client"))
    taken: dict[tuple[str, int], int] = {}
    found: dict[str, list[tuple[str, int, int]]] = {part: [] for part in PARTS}
    for number, row in enumerate(rows, start=2):
        name = row.get(key, "")
        which = index.find(name, f"{path}: row {number}")
        if which is None:
            raise RequestError(
                f"{path}: row {number}: {key} must be of the data, got {name!r:.100}"
            )
        place = places[which]
        if place in taken:
            raise RequestError(
                f"{path}: row {number}: {name!r:.100} must have one row, got a second"
            )
        if not row.get("client"):
            raise RequestError(f"{path}: row {number}: client must be named, got none")
        taken[place] = number
        part = _part(path, number, row.get("split"), place[0])
        found[part].append((*place, clients.index(row["client"])))
    if not found["train"]:
        raise RequestError(f"{path}: must have images to train on, got none; mend column 'split'")
    train, val, test = (_gathered(splits, found[part]) for part in PARTS)
    assert train is not None  # a row of it was found
    return replace(splits, train=train, val=val, test=test, centre_names=clients)


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open_lines(path) as lines:
        header = lower_names(next(lines, []))
        rows = list(rows_under(header, lines))
    if not rows:
        raise RequestError(f"{path}: must have a row an image, got none; write one for each")
    return header, rows


def _places(path: Path, splits: Splits, key: str) -> tuple[NameIndex, list[tuple[str, int]]]:
    """Return what finds an image by its name or number, and part and place in it of each."""
    found: list[tuple[str, int]] = []
    called: list[str] = []
    for part in PARTS:
        images: ImageSet | None = getattr(splits, part)
        if images is None:
            continue
        files = bool(images.names) and not images.names[0].isdecimal()
        if files is not (key == "file"):
            wanted = "file" if files else "index"
            raise RequestError(f"{path}: images must be named by {wanted!r}, got {key!r}")
        called += images.names or [str(len(found) + i) for i in range(len(images))]
        found += [(part, i) for i in range(len(images))]
    return NameIndex(called), found


def _part(path: Path, number: int, split: str | None, own: str) -> str:
    if not split:
        return own
    if split.lower() not in SPLIT_NAMES:
        raise RequestError(
            f"{path}: row {number}: split must be train, val or test, got {split!r:.100}"
        )
    return SPLIT_NAMES[split.lower()]


def _gathered(splits: Splits, wanted: list[tuple[str, int, int]]) -> ImageSet | None:
    """Return images named by part and place, with their clients."""
    if not wanted:
        return None
    sets: dict[str, ImageSet] = {}
    first: dict[str, int] = {}
    for part in PARTS:
        if (images := getattr(splits, part)) is not None:
            first[part] = sum(map(len, sets.values()))
            sets[part] = images
    places = torch.tensor([first[part] + place for part, place, _ in wanted])
    chosen = ImageSet.joined(list(sets.values())).subset(places)
    return replace(chosen, centres=torch.tensor([client for _, _, client in wanted]))
