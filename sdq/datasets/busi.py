"""BUSI: 780 breast ultrasound images with a mask of the lesion, one channel.

437 benign and 210 malignant lesions; the masks of 133 normal images are empty. From
``busi_128.npz`` or ``busi.npz`` (arrays ``images``, ``masks`` and ``labels``), or from the folders
as published, ``Dataset_BUSI_with_GT/benign/benign (1).png`` with ``benign (1)_mask.png`` beside it
and, of several lesions, ``benign (1)_mask_1.png``.

Source: Al-Dhabyani et al. 2020, https://doi.org/10.1016/j.dib.2019.104863.
"""

from dataclasses import replace
from pathlib import Path

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.image_files import ImageFile
from sdq.image_rows import Row, build
from sdq.npz_file import read_npz

CLASS_NAMES = ("lesion",)
LABEL_NAMES = ("benign", "malignant", "normal")
FOLDER = "Dataset_BUSI_with_GT"


def load(options: DataOptions) -> Splits:
    """Return BUSI from the data root, divided by the options' shares and seed.

    Raises:
        RequestError: none of these files is there, or an image or mask is missing.
    """
    root = options.rooted("busi")
    for name in ("busi_128.npz", "busi.npz"):
        if (root / name).is_file():
            splits = read_npz(root / name, options)
            return replace(splits, class_names=CLASS_NAMES, label_names=LABEL_NAMES)
    folder = root / FOLDER
    if not folder.is_dir():
        raise RequestError(
            f"busi: no 'busi_128.npz', 'busi.npz' or folder {FOLDER!r} in {str(root)!r}; put one "
            "of them there"
        )
    return build(folder, _rows(folder), LABEL_NAMES, options, foreground=CLASS_NAMES)


def _rows(folder: Path) -> list[Row]:
    rows = []
    for label in LABEL_NAMES:
        for path in sorted((folder / label).glob("*.png")):
            if "_mask" in path.stem:
                continue
            masks = tuple(sorted(path.parent.glob(f"{path.stem}_mask*.png")))
            if not masks:
                raise RequestError(
                    f"busi: {path} must have a mask beside it, got no '{path.stem}_mask.png'; copy "
                    "it there, or remove the image"
                )
            rows.append(Row(ImageFile(path), label, masks=masks))
    return rows
