"""Images read from disk: an ``.npz`` in MedMNIST's layout, or a folder of image files.

Both give :class:`sdq.data.Splits` with uint8 pixels. Everything that changes a size does it in one
way, so that a set gives the same pixels from an array and from files: the shorter side becomes
``image_size`` (PIL, bilinear with antialiasing), then the centre square is cut out. Rotation tags
(EXIF) are not applied. Arrays are decoded with ``allow_pickle=False``: a file can hold no code.
"""

import csv
import io
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdq.data import ArrayImages, DataOptions, Images, ImageSet, Splits, divide
from sdq.errors import RequestError, nearest

EAGER_BYTES = (
    512 * 2**20
)  # decoded sets up to this size stay in memory; larger ones are read lazily
DECODE_THREADS = 4  # PIL releases the lock while it decodes; more threads than that wait for disk
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
SPLIT_NAMES = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
IMAGE_COLUMNS = ("image", "image_id", "file", "filename", "image_name")
LABEL_COLUMNS = ("label", "class", "dx", "target", "diagnosis")
GROUP_COLUMNS = ("patient_id", "lesion_id")  # the wider group first: images of one never part
ISIC_CLASSES = ("MEL", "NV", "BCC", "AKIEC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
LAYOUTS = (
    "give train/CLASS/*.jpg with test/ and val/ beside it, or images with one CSV that has "
    f"a column {'|'.join(IMAGE_COLUMNS)} and a column {'|'.join(LABEL_COLUMNS)} "
    "(or the one-hot columns of ISIC)"
)


# ---------------------------------------------------------------------------------------- pixels


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
        except _UNDECODABLE as error:
            raise _undecodable(file, error) from error
        return _planes(_fit(pixels, self.size[0]) if self.fit else pixels)


_UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def _undecodable(file: ImageFile, error: BaseException) -> RequestError:
    return RequestError(
        f"{file.path}: must be a JPEG, PNG or BMP image, got {type(error).__name__}: {error}; "
        "replace or remove the file"
    )


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Resize the shorter side to ``side``, then cut out the centre square."""
    width, height = image.size
    scale = side / min(width, height)
    width, height = max(side, round(width * scale)), max(side, round(height * scale))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - side) // 2, (height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _planes(image: Image.Image) -> np.ndarray:
    pixels = np.asarray(image)  # (H, W) or (H, W, C)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _common_format(
    where: str, files: Sequence[ImageFile], image_size: int | None
) -> tuple[int, tuple[int, int]]:
    """Read every header; return the channels and ``(H, W)`` that all images get."""
    grey, first = True, None
    for file in files:
        try:
            with file.open() as image:
                mode, (width, height) = image.mode, image.size
        except _UNDECODABLE as error:
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


# ------------------------------------------------------------------------------------------- npz


def read_npz(path: Path, options: DataOptions) -> Splits:
    """Read an ``.npz`` in MedMNIST's layout, or ``images`` with ``labels`` to be divided.

    Args:
        path: the file. Images are uint8 N x H x W or N x H x W x C with C 1 or 3; labels are
            integers, N or N x 1. ``class_names`` (text) may name the classes.
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
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise RequestError(
            f"{path}: must be a complete .npz (zip) archive, got {type(error).__name__}: "
            f"{error}; copy it again"
        ) from error


def _npz_splits(path: Path, arrays: Mapping[str, np.ndarray], options: DataOptions) -> Splits:
    has_splits = any(k.startswith(("train_", "val_", "test_")) for k in arrays)
    prefixes = ["train_"] if has_splits else [""]
    prefixes += [p for p in ("val_", "test_") if any(k.startswith(p) for k in arrays)]
    parts = {p: _npz_part(path, arrays, p, options.image_size) for p in prefixes}
    names = _npz_class_names(path, arrays, list(parts.values()))
    if has_splits:
        return Splits(parts["train_"], parts.get("val_"), parts.get("test_"), names)
    return _divided(parts[""], names, options)


def _npz_part(
    path: Path, arrays: Mapping[str, np.ndarray], prefix: str, side: int | None
) -> ImageSet:
    if f"{prefix}labels" not in arrays and f"{prefix}masks" in arrays:
        raise RequestError(
            f"{path}: classification needs labels, got masks only; add an array {prefix}labels"
        )
    images, labels = (_member(path, arrays, f"{prefix}{k}") for k in ("images", "labels"))
    if len(images) != len(labels):
        raise RequestError(
            f"{path}: {prefix}labels must have one entry an image, got {len(labels)} for "
            f"{len(images)} images; save both arrays from the same list"
        )
    return ImageSet(
        ArrayImages(_npz_pixels(f"{path}: {prefix}images", images, side)),
        _npz_labels(f"{path}: {prefix}labels", labels),
    )


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
        return torch.from_numpy(np.stack([_planes(_fit(i, side)) for i in flat]))
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
        names = _member(path, arrays, "class_names")
        if names.dtype.kind != "U" or names.ndim != 1 or len(names) < classes:
            raise RequestError(
                f"{path}: class_names must be {classes} or more texts, got {names.dtype} of shape "
                f"{names.shape}; save np.array([name of class 0, ...])"
            )
        return tuple(str(n) for n in names)
    if classes > sum(len(p) for p in parts):
        raise RequestError(
            f"{path}: labels must be numbered from 0 without gaps, got {classes - 1} in a set of "
            f"{sum(len(p) for p in parts)} images; renumber the classes"
        )
    return tuple(str(c) for c in range(classes))


# ---------------------------------------------------------------------------------------- folder


@dataclass(frozen=True)
class Row:
    """One labelled image: ``split`` is train, val, test or empty (to be divided).

    Images of one ``group`` (a lesion, a patient) stay in one part; empty is a group of its own.
    """

    file: ImageFile
    label: str
    split: str = ""
    group: str = ""


def read_folder(path: Path, options: DataOptions) -> Splits:
    """Read ``{train,val,test}/CLASS/*.jpg``, or a folder of images with one CSV.

    The CSV may be that of HAM10000, ISIC 2018 task 3 or ISIC 2019, or have an image and a label
    column, and a column ``split``. Without one the set is divided by ``options.split`` and
    ``options.seed``, and images of one ``lesion_id`` or ``patient_id`` stay together.

    Raises:
        RequestError: no layout fits, or an image is missing, unreadable or of another size.
    """
    if any(p.is_dir() for p in (path / "train").glob("[!.]*")):
        rows, names = class_folder_rows(path)
        return build(str(path), rows, names, options)
    tables = [t for t in _csv_files(path) if _has_labels(t)]
    if len(tables) > 1:
        raise RequestError(
            f"{path}: the folder must have one CSV with labels, got "
            f"{', '.join(str(t.relative_to(path)) for t in tables)}; move the others away"
        )
    if not tables:
        raise RequestError(f"{path}: no train/CLASS folders and no CSV with labels; {LAYOUTS}")
    return read_tables(path, {"": tables[0]}, options)


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
    return tuple(sorted(names, key=int if all(n.isdecimal() for n in names) else None))


def build(
    where: str, rows: Sequence[Row], class_names: tuple[str, ...], options: DataOptions
) -> Splits:
    """Turn rows into splits: decoded at once where they fit in EAGER_BYTES, else when asked for."""
    if not rows:
        raise RequestError(f"{where}: the set must have at least one image, got none; {LAYOUTS}")
    files = [r.file for r in rows]
    channels, size = _common_format(where, files, options.image_size)
    lazy = FileImages(tuple(files), channels, size, fit=options.image_size is not None)
    images: Images = lazy
    if len(files) * channels * size[0] * size[1] <= EAGER_BYTES:
        images = ArrayImages(lazy.take(torch.arange(len(files))))
    number = {name: c for c, name in enumerate(class_names)}
    whole = ImageSet(images, torch.tensor([number[r.label] for r in rows]))
    if not any(r.split for r in rows):
        return _divided(whole, class_names, options, [r.group for r in rows])
    parts = {
        name: whole.subset(torch.tensor([i for i, r in enumerate(rows) if r.split == name]).long())
        for name in ("train", "val", "test")
    }
    return Splits(parts["train"], _or_none(parts["val"]), _or_none(parts["test"]), class_names)


def _or_none(part: ImageSet) -> ImageSet | None:
    return part if len(part) else None


def _divided(
    whole: ImageSet,
    class_names: tuple[str, ...],
    options: DataOptions,
    groups: Sequence[str] = (),
) -> Splits:
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


# ------------------------------------------------------------------------------------------- CSV


def read_tables(folder: Path, tables: Mapping[str, Path], options: DataOptions) -> Splits:
    """Read a folder of images described by one CSV, or by one CSV a split.

    Args:
        folder: holds the images, at any depth; their names without suffix are looked up.
        tables: ``{"": csv}`` for a set with a column ``split`` or none, else split name to CSV.
        options: see :class:`sdq.data.DataOptions`.
    """
    index = _index(folder)
    groups = _groups(folder, tables.values(), index)
    rows: list[Row] = []
    names: list[str] = []
    for split, table in tables.items():
        found, known = _table_rows(table, index, split, groups)
        rows += found
        names += [n for n in known if n not in names]
    seen: set[Path] = set()
    for row in rows:
        if row.file.path in seen:
            raise RequestError(
                f"{folder}: every image must have one row, got {row.file.path.name} twice; "
                "remove the second row"
            )
        seen.add(row.file.path)
    one_hot = set(names) <= set(ISIC_CLASSES)
    return build(str(folder), rows, tuple(names) if one_hot else sorted_names(names), options)


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
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            lines = list(csv.reader(stream, delimiter=_delimiter(path)))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{path}: must be a CSV in UTF-8, got {error}; save it again") from error
    header = _column_names(lines[0]) if lines else []
    rows = [dict(zip(header, map(str.strip, line), strict=False)) for line in lines[1:] if line]
    return header, rows


def _first(candidates: Sequence[str], header: Sequence[str]) -> str | None:
    return next((c for c in candidates if c in header), None)


def _header(path: Path) -> list[str]:
    """Return the names of the columns alone: tables of pixels beside the images may be large."""
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        return _column_names(next(csv.reader(stream, delimiter=_delimiter(path)), []))


def _column_names(line: Sequence[str]) -> list[str]:
    stripped = [h.strip() for h in line]
    return [h if h in ISIC_CLASSES else h.lower() for h in stripped]


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix in (".tab", ".tsv") else ","  # Dataverse gives tables as .tab


def _has_labels(path: Path) -> bool:
    header = _header(path)
    labelled = _first(LABEL_COLUMNS, header) or {"MEL", "NV"} <= set(header)
    return bool(labelled and _first(IMAGE_COLUMNS, header))


def _groups(folder: Path, tables: Iterable[Path], index: "_Index") -> dict[Path, str]:
    """Return the lesion or patient of each image, from every CSV that has both columns."""
    found: dict[Path, str] = {}
    for path in {*_csv_files(folder), *tables}:
        header = _header(path)
        image, group = _first(IMAGE_COLUMNS, header), _first(GROUP_COLUMNS, header)
        if image and group:
            for line in _read_csv(path)[1]:
                file = index.find(line.get(image, ""), str(path))
                if file is not None and line.get(group):
                    found[file] = line[group]
    return found


@dataclass(frozen=True)
class _Index:
    folder: Path
    by_path: dict[str, Path]  # relative, with suffix
    by_stem: dict[str, list[Path]]

    def find(self, name: str, where: str) -> Path | None:
        """Return the file of a row: by its path in the folder, else by its name alone."""
        if name in self.by_path:
            return self.by_path[name]
        last = Path(name).name
        stem = Path(last).stem if Path(last).suffix.lower() in SUFFIXES else last
        files = self.by_stem.get(stem, [])
        if len(files) > 1:
            raise RequestError(
                f"{where}: image {name!r} must be one file, got "
                f"{', '.join(str(f.relative_to(self.folder)) for f in files[:3])}; "
                "write the path inside the folder into the CSV"
            )
        return files[0] if files else None


def _index(folder: Path) -> _Index:
    by_path: dict[str, Path] = {}
    by_stem: dict[str, list[Path]] = {}
    for file in sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES):
        by_path[file.relative_to(folder).as_posix()] = file
        by_stem.setdefault(file.stem, []).append(file)
    return _Index(folder, by_path, by_stem)


def _table_rows(
    table: Path, index: _Index, split: str, groups: Mapping[Path, str]
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
            f"{missing[0]!r} ({len(missing)} of {len(lines)} rows); "
            "add the images or remove the rows"
        )
    labels, names = _table_labels(table, header, lines)
    rows = [
        Row(ImageFile(file), label, split or _split_of(table, line), groups.get(file, ""))
        for (_, file), label, line in zip(files, labels, lines, strict=True)
        if file is not None
    ]
    return rows, names


def _split_of(table: Path, line: Mapping[str, str]) -> str:
    if "split" not in line:
        return ""
    try:
        return SPLIT_NAMES[line["split"].lower()]
    except KeyError:
        raise RequestError(
            f"{table}: split must be train, val or test, got {line['split']!r}; mend the column"
        ) from None


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
