"""CIFAR-10 as image files: 32 x 32 RGB, ten classes, 50,000 to train and 10,000 to test.

The class names sort into their usual order, airplane to truck. The set has no validation part:
a fixed tenth of train is held out, the same for every ``options.seed``.

Source: Krizhevsky 2009, Learning multiple layers of features from tiny images,
https://www.cs.toronto.edu/~kriz/cifar.html. Licence: none stated; free to use with citation.
"""

import tarfile
import zlib
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sdq.data import DataOptions, Splits, divide
from sdq.errors import RequestError
from sdq.image_files import SUFFIXES, ImageFile
from sdq.image_folder import read_folder
from sdq.image_rows import Row, build, sorted_names

PLACES = ("cifar10", "cifar10_jpg", "cifar10_jpg.tar.gz", "cifar10.tar.gz")
VAL_SHARE = 0.1
VAL_SEED = 0  # fixed: results with different seeds are chosen on the same images


def load(options: DataOptions) -> Splits:
    """Return CIFAR-10 from a folder, or from an archive that is read without unpacking it.

    Raises:
        RequestError: neither is under the data root, or an image cannot be read.
    """
    root = options.rooted("cifar10")
    path = next((root / p for p in PLACES if (root / p).exists()), None)
    if path is None:
        raise RequestError(
            f"cifar10: nothing of {', '.join(PLACES)} in {str(root)!r}; put the images there as "
            "train/CLASS/*.jpg and test/CLASS/*.jpg, or as a .tar.gz of the two folders"
        )
    splits = read_folder(path, options) if path.is_dir() else _read_tar(path, options)
    if splits.val is not None:
        return splits
    train, val = divide(splits.train.labels, (1 - VAL_SHARE, VAL_SHARE), VAL_SEED)
    return replace(splits, train=splits.train.subset(train), val=splits.train.subset(val))


def _read_tar(path: Path, options: DataOptions) -> Splits:
    """Keep the encoded members in memory (20 MB); they are decoded like files."""
    rows = []
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                row = _row(PurePosixPath(member.name))
                stream = archive.extractfile(member) if row is not None else None
                if row is not None and stream is not None:
                    rows.append(replace(row, file=ImageFile(path / row.file.path, stream.read())))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise RequestError(
            f"{path}: must be a complete .tar.gz archive, got {type(error).__name__}: {error}; "
            "copy it again"
        ) from error
    rows.sort(key=lambda r: (r.split, r.label, r.file.path.name))  # as the folder is read
    return build(path, rows, sorted_names(r.label for r in rows), options)


def _row(name: PurePosixPath) -> Row | None:
    """``…/train/CLASS/NNNN.jpg`` as a row; None for folders and other files."""
    if len(name.parts) < 3 or name.suffix.lower() not in SUFFIXES or name.name.startswith("."):
        return None
    split, label = name.parts[-3:-1]
    return (
        Row(ImageFile(Path(*name.parts[-3:])), label, split) if split in ("train", "test") else None
    )
