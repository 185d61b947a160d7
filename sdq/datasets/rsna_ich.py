"""RSNA 2019: CT slices of the head with exactly one of five kinds of bleeding, one channel.

Put ``stage_2_train.csv`` and the slices into the folder: the DICOM files of the challenge, read
through the brain window (pydicom must be installed), or PNG or npy files of the same names made
of them. Slices with no bleeding, or with several kinds, are left out, as are those whose file is
not there: a part of the set will do. Of DICOM files, all slices of a patient stay in one part.

The federations of FCA are ``--partition counts:ich10`` and ``counts:ich5``, or, with the list of
which slice is whose, ``--clients SPLIT.csv``.

Source: Flanders et al. 2020, https://doi.org/10.1148/ryai.2020190211,
https://www.kaggle.com/c/rsna-intracranial-hemorrhage-detection. Licence: the challenge's rules,
for non-commercial use.
"""

from pathlib import Path

import torch

from sdq.csv_file import read_rows
from sdq.ct_files import SUFFIXES, patient, slices
from sdq.data import DataOptions, ImageSet, Splits
from sdq.errors import RequestError
from sdq.image_folder import find_table
from sdq.image_rows import divided

TABLES = ("stage_2_train.csv", "stage_1_train.csv")
CLASS_NAMES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
SIDE = 128  # pixels, as in FCA


def load(options: DataOptions) -> Splits:
    """Return the slices of one kind from ``rsna_ich/`` under the data root.

    Raises:
        RequestError: no such folder, no table in it, no slice that it names, or DICOM without
            pydicom.
    """
    folder = options.rooted("rsna_ich") / "rsna_ich"
    table = find_table("rsna_ich", folder, TABLES)
    files = {f.stem: f for f in sorted(folder.rglob("*")) if f.suffix in SUFFIXES}
    labels = {name: c for name, c in _labels(table).items() if name in files}
    if not labels:
        raise RequestError(
            f"rsna_ich: {folder} must hold slices that {table.name} names, got none; put ID_….dcm, "
            ".png or .npy there"
        )
    found = [files[name] for name in labels]
    whole = ImageSet(
        slices(found, options.image_size or SIDE),
        torch.tensor(list(labels.values())),
        names=tuple(f.name for f in found),
    )
    return divided(whole, CLASS_NAMES, options, [patient(f) for f in found])


def _labels(table: Path) -> dict[str, int]:
    """Return the kind of each slice that has exactly one; a row is ``ID_xxx_KIND,0 or 1``."""
    kinds: dict[str, set[int]] = {}
    try:
        for row in read_rows(table):
            name, _, kind = row["id"].rpartition("_")
            if kind in CLASS_NAMES and row["label"] in ("1", "1.0"):
                kinds.setdefault(name, set()).add(CLASS_NAMES.index(kind))
    except KeyError as error:
        raise RequestError(
            f"{table}: every row must have an ID and a Label, but: {error!r}; take the challenge's"
        ) from error
    return {name: kind.pop() for name, kind in kinds.items() if len(kind) == 1}
