"""ISIC 2018 task 3: dermoscopy, 600 x 450 RGB, seven classes; train is HAM10000.

The official validation and test parts are used where both are there; else the training part is
divided, and ``ISIC2018_Task3_Training_LesionGroupings.csv`` in the folder keeps the images of a
lesion together.

Source: Codella et al. 2019, https://arxiv.org/abs/1902.03368, and Tschandl et al. 2018,
https://doi.org/10.1038/sdata.2018.161; https://challenge.isic-archive.com/data/#2018.
Licence: CC BY-NC 4.0.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.image_folder import find_table, has_table, read_tables

TABLE = "ISIC2018_Task3_{}_GroundTruth.csv"


def load(options: DataOptions) -> Splits:
    """Return ISIC 2018 task 3 from ``isic2018/`` under the data root, the archives unpacked.

    Raises:
        RequestError: no such folder, no ground truth in it, or an image is missing.
    """
    folder = options.rooted("isic2018") / "isic2018"
    official = {"train": "Training", "val": "Validation", "test": "Test"}
    complete = all(has_table(folder, TABLE.format(name)) for name in official.values())
    wanted = official if complete else {"": "Training"}
    tables = {
        split: find_table("isic2018", folder, (TABLE.format(name),))
        for split, name in wanted.items()
    }
    return replace(read_tables(folder, tables, options), vertical_flip=True)
