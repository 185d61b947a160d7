"""DermaMNIST: dermoscopy, 28 x 28 RGB, seven long-tailed classes, the official split.

Source: Yang et al. 2023, MedMNIST v2, https://doi.org/10.1038/s41597-022-01721-8, from Tschandl
et al. 2018, HAM10000, https://doi.org/10.1038/sdata.2018.161. Licence: CC BY-NC 4.0.
"""

from dataclasses import replace

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.npz_file import read_npz

CLASS_NAMES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")


def load(options: DataOptions) -> Splits:
    """Return DermaMNIST from ``dermamnist.npz`` under the data root.

    Raises:
        RequestError: no such file.
    """
    path = options.rooted("dermamnist") / "dermamnist.npz"
    if not path.is_file():
        raise RequestError(
            f"dermamnist: no file {str(path)!r}; put the .npz of MedMNIST there "
            "(train_images, train_labels, val_…, test_…)"
        )
    # a dermoscope has no up and down
    return replace(read_npz(path, options), class_names=CLASS_NAMES, vertical_flip=True)
