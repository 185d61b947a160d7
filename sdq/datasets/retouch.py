"""RETOUCH: OCT slices of the retina with three kinds of fluid, from three vendors, one channel.

The training set as published, ``oct.mhd`` and ``reference.mhd`` in a folder for each volume; the
vendor is the folder above it or its archive's name: ``retouch/Cirrus/TRAIN001/oct.mhd``. Slices
without fluid are left out; all slices of a volume stay in one part. The vendors' sizes differ, so
``--image-size`` is needed.

Source: Bogunović et al. 2019, https://doi.org/10.1109/TMI.2019.2901398.
"""

from sdq.data import DataOptions, Splits
from sdq.errors import RequestError
from sdq.volume_files import Volume, volume_splits

CLASS_NAMES = ("intraretinal fluid", "subretinal fluid", "pigment epithelial detachment")
VENDORS = ("Cirrus", "Spectralis", "Topcon")


def load(options: DataOptions) -> Splits:
    """Return RETOUCH from ``retouch/`` under the data root; centres are the vendors.

    Raises:
        RequestError: no such folder, no volume in it, or one whose reference is missing.
    """
    folder = options.rooted("retouch") / "retouch"
    volumes = []
    for path in sorted(folder.rglob("oct.mhd")):
        place = path.parent.relative_to(folder).as_posix().lower()
        vendor = next((v for v in VENDORS if v.lower() in place), None)
        if vendor is None:
            raise RequestError(
                f"retouch: {path} must be in a folder of its vendor, {', '.join(VENDORS)}; move it"
            )
        volumes.append(Volume(path, path.with_name("reference.mhd"), vendor))
    if not volumes:
        raise RequestError(
            f"retouch: no volume Cirrus/TRAIN001/oct.mhd under {str(folder)!r}; put the unpacked "
            "training set there"
        )
    return volume_splits("retouch", volumes, CLASS_NAMES, options)
