"""ISIC 2019: 25,331 dermoscopy images of many sizes, eight classes (UNK has no image).

The sizes differ, so that ``image_size`` is needed. ``ISIC_2019_Training_Metadata.csv`` in the
folder keeps the images of a lesion together in the division.

Centres, as in Fed-ISIC2019 of FLamby: the first part of ``lesion_id`` (BCN, MSK4, HAM), and the
source of HAM's images where ``HAM10000_metadata.csv`` is in the folder as well: six centres then.
Images without a lesion have none. With FLamby's file ``train_test_split`` in the folder the parts
are those of that file: 18,597 images to train on and 4,650 to test on.

Source: Tschandl et al. 2018, https://doi.org/10.1038/sdata.2018.161, Codella et al. 2018,
https://arxiv.org/abs/1710.05006, and Hernández-Pérez et al. 2024, BCN20000,
https://doi.org/10.1038/s41597-024-03387-w; https://challenge.isic-archive.com/data/#2019. Centres:
Ogier du Terrail et al. 2022, https://arxiv.org/abs/2210.04620.
Licence: CC BY-NC 4.0.
"""

from dataclasses import replace
from pathlib import Path

from sdq.data import DataOptions, Splits
from sdq.datasets.ham10000 import TABLES as HAM_TABLES
from sdq.errors import RequestError
from sdq.image_folder import by_image, find_table, has_table, read_tables

TABLES = ("ISIC_2019_Training_GroundTruth.csv",)
METADATA = "ISIC_2019_Training_Metadata.csv"
SPLIT = "train_test_split"
CENTRES = ("BCN", "vidir_molemax", "vidir_modern", "rosendahl", "MSK4", "vienna_dias")
"""As ``train_test_split`` numbers them."""


def load(options: DataOptions) -> Splits:
    """Return ISIC 2019 from ``isic2019/`` under the data root: the images and the ground truth.

    Raises:
        RequestError: no such folder, no ground truth in it, or an image is missing.
    """
    folder = options.rooted("isic2019") / "isic2019"
    table = find_table("isic2019", folder, TABLES)
    centres, parts = _centres(folder), None
    if has_table(folder, SPLIT):
        path = find_table("isic2019", folder, (SPLIT,))
        centres = {
            image: _named(path, number) for image, number in by_image(path, "center").items()
        }
        parts = by_image(path, "fold")
    splits = read_tables(folder, {"": table}, options, centres=centres, parts=parts)
    return replace(splits, vertical_flip=True)


def _centres(folder: Path) -> dict[str, str]:
    if not has_table(folder, METADATA):
        return {}
    lesions = by_image(find_table("isic2019", folder, (METADATA,)), "lesion_id")
    centres = {image: lesion.partition("_")[0] for image, lesion in lesions.items()}
    source = next((name for name in HAM_TABLES if has_table(folder, name)), None)
    if source is not None:
        sources = by_image(find_table("isic2019", folder, (source,)), "dataset")
        centres |= {
            i: sources[i] for i, centre in centres.items() if centre == "HAM" and i in sources
        }
    return centres


def _named(path: Path, number: str) -> str:
    if number not in map(str, range(len(CENTRES))):
        raise RequestError(
            f"{path}: center must be from 0 to {len(CENTRES) - 1}, got {number!r:.100}"
        )
    return CENTRES[int(number)]
