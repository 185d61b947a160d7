"""Dermoscopic-4: nevi, benign keratoses and melanomas of four sources, 7 to 1 to 2.

The federation of PRR-Imbalance: HAM10000's vidir_modern (2,091 images to train on), vidir_molemax
(2,708) and rosendahl (1,144), and MSK's of ISIC 2017 (1,400). Put the images, at any depth, and
``dermoscopic4.csv`` with the columns ``image``, ``label`` (nv, bkl or mel), ``client`` and
``split`` (train, val or test) into the folder.

Source: Chen et al. 2022, https://doi.org/10.1109/TMI.2022.3192483; images of HAM10000 (Tschandl et
al. 2018, https://doi.org/10.1038/sdata.2018.161) and ISIC 2017 (Codella et al. 2018,
https://arxiv.org/abs/1710.05006). Licence: CC BY-NC 4.0 and CC-0.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.image_folder import find_table, read_tables

TABLES = ("dermoscopic4.csv",)
CLASS_NAMES = ("nv", "bkl", "mel")


def load(options: DataOptions) -> Splits:
    """Return Dermoscopic-4 from ``dermoscopic4/`` under the data root.

    Raises:
        RequestError: no such folder, no table in it, an image is missing, or another class.
    """
    folder = options.rooted("dermoscopic4") / "dermoscopic4"
    table = find_table("dermoscopic4", folder, TABLES)
    splits = read_tables(folder, {"": table}, options, class_names=CLASS_NAMES)
    if not splits.centre_names:
        raise RequestError(f"dermoscopic4: {table} must have a column client; add it")
    return replace(splits, vertical_flip=True)
