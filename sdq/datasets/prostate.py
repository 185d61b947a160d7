"""Prostate MRI of several hospitals: T2 slices with a mask of the prostate, one channel.

The multi-site collection of SAML: NIfTI files ``prostate/SITE/Case00.nii.gz`` with
``Case00_segmentation.nii.gz`` beside them (in any case). Sites whose masks tell zones apart count
them as one. Slices without prostate are left out; all slices of a volume stay in one part.

Source: Liu et al., "Shape-aware Meta-learning", MICCAI 2020, https://arxiv.org/abs/2007.02035,
data at https://liuquande.github.io/SAML/. Reading needs nibabel.
"""

from pathlib import Path

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.volume_files import Volume, volume_splits

CLASS_NAMES = ("prostate",)
ENDING = "_segmentation"
SUFFIXES = (".nii", ".nii.gz")


def load(options: DataOptions) -> Splits:
    """Return the slices from ``prostate/`` under the data root; centres are the sites.

    Raises:
        RequestError: no such folder, no volume in it, or one without a mask.
    """
    folder = options.rooted("prostate") / "prostate"
    files = sorted(f for f in folder.glob("*/*") if f.name.lower().endswith(SUFFIXES))
    masks = {_stem(f): f for f in files if _stem(f).endswith(ENDING)}
    volumes = []
    for path in files:
        if (key := _stem(path)) in masks:
            continue
        if key + ENDING not in masks:
            raise RequestError(
                f"prostate: {path} must have a mask beside it, got no "
                f"'{path.name.partition('.')[0]}{ENDING}.nii.gz'; copy it there"
            )
        volumes.append(Volume(path, masks[key + ENDING], path.parent.name))
    if not volumes:
        raise RequestError(
            f"prostate: no volume SITE/Case00.nii.gz under {str(folder)!r}; put the sites' folders "
            "there"
        )
    return volume_splits("prostate", volumes, CLASS_NAMES, options, united=True)


def _stem(path: Path) -> str:
    """Return site and name without suffix, in lower case: the sites write it differently."""
    return f"{path.parent.name}/{path.name.partition('.')[0].lower()}"
