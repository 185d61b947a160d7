"""ISIC 2019: 25,331 dermoscopy images of many sizes, eight classes (UNK has no image).

The sizes differ, so that ``image_size`` is needed. ``ISIC_2019_Training_Metadata.csv`` in the
folder keeps the images of a lesion together in the division.

Source: Tschandl et al. 2018, https://doi.org/10.1038/sdata.2018.161, Codella et al. 2018,
https://arxiv.org/abs/1710.05006, and Hernández-Pérez et al. 2024, BCN20000,
https://doi.org/10.1038/s41597-024-03387-w; https://challenge.isic-archive.com/data/#2019.
Licence: CC BY-NC 4.0.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.image_folder import find_table, read_tables

TABLES = ("ISIC_2019_Training_GroundTruth.csv",)


def load(options: DataOptions) -> Splits:
    """Return ISIC 2019 from ``isic2019/`` under the data root: the images and the ground truth.

    Raises:
        RequestError: no such folder, no ground truth in it, or an image is missing.
    """
    folder = options.rooted("isic2019") / "isic2019"
    table = find_table("isic2019", folder, TABLES)
    return replace(read_tables(folder, {"": table}, options), vertical_flip=True)
