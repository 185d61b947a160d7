"""HAM10000: 10,015 dermoscopy images, 600 x 450 RGB, seven long-tailed classes.

Several images show one lesion; the division keeps them in one part.

Source: Tschandl et al. 2018, https://doi.org/10.1038/sdata.2018.161, data at
https://doi.org/10.7910/DVN/DBW86T. Licence: CC BY-NC 4.0.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.image_folder import find_table, read_tables

TABLES = ("HAM10000_metadata.csv", "HAM10000_metadata", "HAM10000_metadata.tab")


def load(options: DataOptions) -> Splits:
    """Return HAM10000 from ``ham10000/`` under the data root: the images and the metadata.

    Raises:
        RequestError: no such folder, no metadata in it, or an image is missing.
    """
    folder = options.rooted("ham10000") / "ham10000"
    table = find_table("ham10000", folder, TABLES)
    return replace(read_tables(folder, {"": table}, options), vertical_flip=True)
