"""PH2: 200 dermoscopy images with a mask of the lesion, RGB, of sizes that differ by some pixels.

The layout as published, ``IMD002/IMD002_Dermoscopic_Image/IMD002.bmp`` with
``IMD002/IMD002_lesion/IMD002_lesion.bmp``, at any depth under ``ph2/``. The sizes differ, so
``--image-size`` is needed.

Source: Mendonça et al. 2013, https://doi.org/10.1109/EMBC.2013.6610779.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.image_files import ImageFile
from sdq.image_rows import Row, build
from sdq.mask_folder import paired

CLASS_NAMES = ("lesion",)


def load(options: DataOptions) -> Splits:
    """Return PH2 from ``ph2/`` under the data root, divided by the options' shares and seed.

    Raises:
        RequestError: no such folder, no image in it, or an image without its mask.
    """
    folder = options.rooted("ph2") / "ph2"
    images = sorted(folder.rglob("*_Dermoscopic_Image/*.bmp"))
    masks = sorted(folder.rglob("*_lesion/*.bmp"))
    if not images:
        raise RequestError(
            f"ph2: no image IMD002_Dermoscopic_Image/IMD002.bmp under {str(folder)!r}; put the "
            "unpacked PH2Dataset there"
        )
    rows = [Row(ImageFile(i), "", masks=(m,)) for i, m in paired("ph2", images, masks)]
    splits = build(folder, rows, (), options, foreground=CLASS_NAMES)
    return replace(splits, vertical_flip=True)
