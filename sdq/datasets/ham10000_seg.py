"""HAM10000 with masks of the lesion: 10,015 dermoscopy images, 600 x 450 RGB.

The images and the metadata as ``ham10000`` reads them, and the masks
``ISIC_0024306_segmentation.png`` (``HAM10000_segmentations_lesion_tschandl``), at any depth in the
same folder. Centres are the metadata's column ``dataset``: rosendahl, vidir_modern, vidir_molemax
and vienna_dias. Images of one lesion stay in one part.

Source: Tschandl et al. 2018, https://doi.org/10.1038/sdata.2018.161; masks: Tschandl et al. 2020,
https://doi.org/10.1038/s41591-020-0942-0, both at https://doi.org/10.7910/DVN/DBW86T.
Licence: CC BY-NC 4.0.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.datasets.ham10000 import TABLES
from sdq.errors import RequestError
from sdq.image_files import SUFFIXES, ImageFile
from sdq.image_folder import FileIndex, by_image, column_by_file, find_table
from sdq.image_rows import CENTRE_COLUMNS, Row, build, sorted_names
from sdq.mask_folder import paired

CLASS_NAMES = ("lesion",)
ENDING = "_segmentation"


def load(options: DataOptions) -> Splits:
    """Return HAM10000 with masks from ``ham10000/`` under the data root.

    Raises:
        RequestError: no such folder, no metadata in it, or an image or mask is missing.
    """
    folder = options.rooted("ham10000_seg") / "ham10000"
    table = find_table("ham10000_seg", folder, TABLES)
    labels, groups = by_image(table, "dx"), by_image(table, "lesion_id")
    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    images = [f for f in files if f.stem in labels]
    centres = column_by_file(FileIndex(folder, images), CENTRE_COLUMNS)
    masks = [f for f in files if f.stem.endswith(ENDING)]
    if len(images) < len(labels):
        missing = sorted(set(labels) - {f.stem for f in images})[0]
        raise RequestError(
            f"ham10000_seg: every row of {table} must have an image under {folder}, got none for "
            f"{missing!r}; add the images or remove the rows"
        )
    rows = [
        Row(ImageFile(image), labels[image.stem], "", groups.get(image.stem, ""),
            centres.get(image, ""), (mask,))
        for image, mask in paired("ham10000_seg", images, masks)
    ]  # fmt: skip
    names = sorted_names(labels.values())
    splits = build(folder, rows, names, options, foreground=CLASS_NAMES)
    return replace(splits, vertical_flip=True)
