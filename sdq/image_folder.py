"""Images from a folder: class folders, or images with a CSV in one of several layouts."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sdq.csv_file import open_lines, rows_under
from sdq.data import DataOptions, Splits
from sdq.errors import RequestError, nearest
from sdq.image_files import SUFFIXES, ImageFile, NameIndex, name_in, stem
from sdq.image_rows import (
    CENTRE_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    LAYOUTS,
    SPLIT_NAMES,
    Row,
    build,
    class_folder_rows,
    part_folders,
    sorted_names,
)

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,3})?")

GROUP_COLUMNS = ("patient_id", "patient", "lesion_id")
"""The wider group first: images of one never part."""

ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")


def read_folder(path: Path, options: DataOptions) -> Splits:
    """Read ``{train,val,test}/CLASS/*.jpg``, or a folder of images with one CSV.

    The CSV may be that of HAM10000, ISIC 2018 task 3 or ISIC 2019, or have an image and a label
    column, and a column ``split``. Without one the set is divided by ``options.split`` and
    ``options.seed``, and images of one ``lesion_id``, ``patient`` or ``patient_id`` stay together.

    Raises:
        RequestError: no layout fits, or an image is missing, unreadable or of another size.
    """
    training = [p for p in part_folders(path) if SPLIT_NAMES[p.name.lower()] == "train"]
    if any(p.is_dir() for folder in training for p in folder.glob("[!.]*")):
        rows, names = class_folder_rows(path)
        return build(path, rows, names, options)
    tables = [t for t in _csv_files(path) if _has_labels(t)]
    if len(tables) > 1:
        raise RequestError(
            f"{path}: the folder must have one CSV with labels, got "
            f"{', '.join(str(t.relative_to(path)) for t in tables)}; move the others away"
        )
    if not tables:
        raise RequestError(f"{path}: no train/CLASS folders and no CSV with labels; {LAYOUTS}")
    return read_tables(path, {"": tables[0]}, options)


def read_tables(
    folder: Path,
    tables: Mapping[str, Path],
    options: DataOptions,
    *,
    centres: Mapping[str, str] | None = None,
    parts: Mapping[str, str] | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Splits:
    """Read a folder of images described by one CSV, or by one CSV a split.

    Args:
        folder: holds the images, at any depth; their names without suffix are looked up.
        tables: ``{"": csv}`` for a set with a column ``split`` or none, else split name to CSV.
        options: see :class:`sdq.data.DataOptions`.
        centres: where each image was taken, by its name without suffix; None looks for a column
            in the CSV files of the folder.
        parts: the split of each image, by its name without suffix; others are left out.
        class_names: in their order; None takes those in the tables.

    Raises:
        RequestError: a table without the columns, a row without its image or with another's, or an
            image that cannot be read.
    """
    index = FileIndex(folder, sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES))
    groups = column_by_file(index, GROUP_COLUMNS, tables.values())
    places = {} if centres is not None else column_by_file(index, CENTRE_COLUMNS, tables.values())
    rows: list[Row] = []
    names: list[str] = []
    for split, table in tables.items():
        found, known = _table_rows(table, index, split, groups)
        rows += found
        names += [n for n in known if n not in names]
    if parts is not None:
        chosen = [(row, parts.get(row.file.path.stem)) for row in rows]
        rows = [replace(row, split=part) for row, part in chosen if part is not None]
    if centres is not None:
        places = {row.file.path: centres.get(row.file.path.stem, "") for row in rows}
    rows = [replace(row, centre=places.get(row.file.path, "")) for row in rows]
    seen: set[Path] = set()
    for row in rows:
        if row.file.path in seen:
            raise RequestError(
                f"{folder}: every image must have one row, got {row.file.path.name} twice; "
                "remove the second row"
            )
        seen.add(row.file.path)
    if class_names is not None:
        if unknown := sorted(set(names) - set(class_names)):
            raise RequestError(
                f"{folder}: classes must be {', '.join(class_names)}, got {unknown[0]!r:.100}"
            )
        return build(folder, rows, class_names, options)
    one_hot = set(names) <= set(ISIC_CLASSES)
    return build(folder, rows, tuple(names) if one_hot else sorted_names(names), options)


def find_table(name: str, folder: Path, tables: Sequence[str]) -> Path:
    """Return the first of the CSV files that is in ``folder`` or one folder below.

    Args:
        name: of the data set, for the message.
        folder: of the data set.
        tables: file names that will do.

    Raises:
        RequestError: none is there; the message names the path and the layout.
    """
    found = [p for t in tables for p in (*folder.glob(t), *sorted(folder.glob(f"*/{t}")))]
    found = [p for p in found if p.is_file()]
    if not found:
        raise RequestError(
            f"{name}: no file {str(folder / tables[0])!r}; put the images (at any depth) and "
            "this table into the folder"
        )
    return found[0]


def has_table(folder: Path, table: str) -> bool:
    """Tell whether the CSV is in ``folder`` or one folder below."""
    return any(p.is_file() for p in (*folder.glob(table), *folder.glob(f"*/{table}")))


def _csv_files(path: Path) -> list[Path]:
    """CSV files in the folder and, as the official archives of ISIC unpack, one folder below."""
    return sorted(path.glob("*.csv")) + sorted(path.glob("*/*.csv"))


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Return the header and the rows; names in lower case, but for the ISIC classes."""
    with open_lines(path) as lines:
        header = _column_names(next(lines, []))
        return header, list(rows_under(header, lines))


def _first(candidates: Sequence[str], header: Sequence[str]) -> str | None:
    return next((c for c in candidates if c in header), None)


def _header(path: Path) -> list[str]:
    """Return the names of the columns alone: tables of pixels beside the images may be large."""
    with open_lines(path, errors="replace") as lines:
        return _column_names(next(lines, []))


def _column_names(line: Sequence[str]) -> list[str]:
    stripped = [h.strip() for h in line]
    return [h if h in ISIC_CLASSES else h.lower() for h in stripped]


def _has_labels(path: Path) -> bool:
    header = _header(path)
    labelled = _first(LABEL_COLUMNS, header) or {"MEL", "NV"} <= set(header)
    return bool(labelled and _first(IMAGE_COLUMNS, header))


def by_image(table: Path, column: str) -> dict[str, str]:
    """Return a column of a CSV by image name without suffix; empty cells are left out.

    Raises:
        RequestError: the CSV has no such column, or none that names images.
    """
    header, lines = _read_csv(table)
    image = _first(IMAGE_COLUMNS, header)
    if image is None or column not in header:
        missing = IMAGE_COLUMNS[0] if image is None else column
        raise RequestError(f"{table}: no column {missing!r}; {nearest(missing, header)}")
    return {
        stem(line[image]): line[column] for line in lines if line.get(image) and line.get(column)
    }


class FileIndex:
    """Finds image files of a folder by what a CSV calls them.

    Args:
        folder: what paths are relative to.
        files: that may be found.
    """

    def __init__(self, folder: Path, files: Iterable[Path]) -> None:
        self.folder, self.files = folder, tuple(files)
        self.names = NameIndex(name_in(folder, file) for file in self.files)

    def find(self, name: str, where: str) -> Path | None:
        """Return the file of a row; see :meth:`sdq.image_files.NameIndex.find`."""
        place = self.names.find(name, where)
        return None if place is None else self.files[place]


def column_by_file(
    index: FileIndex, names: Sequence[str], tables: Iterable[Path] = ()
) -> dict[Path, str]:
    """Return what each image has in the first such column of every CSV that names images.

    Args:
        index: of the images; the CSV files of its folder are read.
        names: of the column, any of them.
        tables: to read besides.

    Raises:
        RequestError: a row's image may be several files.
    """
    found: dict[Path, str] = {}
    for path in dict.fromkeys((*_csv_files(index.folder), *tables)):
        header = _header(path)
        image, column = _first(IMAGE_COLUMNS, header), _first(names, header)
        if image and column:
            for line in _read_csv(path)[1]:
                file = index.find(line.get(image, ""), str(path))
                if file is not None and line.get(column):
                    found[file] = line[column]
    return found


def _table_rows(
    table: Path, index: FileIndex, split: str, groups: Mapping[Path, str]
) -> tuple[list[Row], list[str]]:
    """Return the rows of one CSV and its class names."""
    header, lines = _read_csv(table)
    image = _first(IMAGE_COLUMNS, header)
    if image is None:
        raise RequestError(f"{table}: no image column; {nearest(IMAGE_COLUMNS[0], header)}")
    files = [(line.get(image, ""), index.find(line.get(image, ""), str(table))) for line in lines]
    missing = [name for name, file in files if file is None]
    if missing:
        raise RequestError(
            f"{table}: every row must have an image file under {index.folder}, got none for "
            f"{missing[0]!r:.100} ({len(missing)} of {len(lines)} rows); "
            "add the images or remove the rows"
        )
    labels, names = _table_labels(table, header, lines)
    rows = [
        Row(ImageFile(file), label, split or _split_of(table, header, line), groups.get(file, ""))
        for (_, file), label, line in zip(files, labels, lines, strict=True)
        if file is not None
    ]
    return rows, names


def _split_of(table: Path, header: Sequence[str], line: Mapping[str, str]) -> str:
    if "split" not in header:
        return ""
    text = line.get("split", "")  # a row may end before it
    if text.lower() not in SPLIT_NAMES:
        raise RequestError(
            f"{table}: split must be train, val or test, got {text!r:.100}; mend the column"
        )
    return SPLIT_NAMES[text.lower()]


def _table_labels(
    table: Path, header: Sequence[str], lines: Sequence[Mapping[str, str]]
) -> tuple[list[str], list[str]]:
    """Return one class name a row, and all of them, from a label column or one-hot columns."""
    column = _first(LABEL_COLUMNS, header)
    if column is not None:
        labels = [line.get(column, "") for line in lines]
        if "" in labels:
            raise RequestError(
                f"{table}: {column} must name a class in every row, got none in row "
                f"{labels.index('') + 2}; fill it in or remove the row"
            )
        measured = [x for x in labels if _NUMBER.fullmatch(x) and not float(x).is_integer()]
        if measured and all(map(_NUMBER.fullmatch, labels)):
            raise RequestError(
                f"{table}: {column} must name a class, a word or a whole number, got numbers with "
                f"decimals, such as {measured[0]!r:.100}; divide them into classes first"
            )
        return labels, sorted(set(labels))
    names = [h for h in header if h in ISIC_CLASSES]
    labels = []
    for number, line in enumerate(lines, start=2):
        ones = [n for n in names if line.get(n, "") in ("1", "1.0")]
        if len(ones) != 1:
            raise RequestError(
                f"{table}: one of {', '.join(names)} must be 1 in every row, got {len(ones)} "
                f"in row {number}; mend the row"
            )
        labels += ones
    if "UNK" not in labels:  # ISIC 2019 keeps a column for images of no known class, unused
        names = [n for n in names if n != "UNK"]
    return labels, names
