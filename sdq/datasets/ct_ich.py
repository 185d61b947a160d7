"""CT-ICH of PhysioNet: CT slices of 82 patients, without bleeding or with one of five kinds.

The layout of version 1.0.0: ``Patients_CT/049/brain/1.jpg``, already windowed, and
``hemorrhage_diagnosis.csv`` with a row a slice. Slices with several kinds are left out, as are
those without a file. All slices of a patient stay in one part. Few slices have a bleeding, and
every kind must reach the training part: another ``--seed`` divides the patients anew.

Source: Hssayeni et al. 2020, https://doi.org/10.3390/data5010014,
https://physionet.org/content/ct-ich/1.0.0/. Licence: PhysioNet Restricted Health Data 1.5.0.
"""

from pathlib import Path

import torch

from sdq.csv_file import read_rows
from sdq.ct_files import slices
from sdq.data import DataOptions, ImageSet, Splits
from sdq.errors import RequestError
from sdq.image_folder import find_table
from sdq.image_rows import divided

TABLES = ("hemorrhage_diagnosis.csv", "hemorrhage_diagnosis_raw_ct.csv")
KINDS = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
CLASS_NAMES = (*KINDS, "none")
SIDE = 128


def load(options: DataOptions) -> Splits:
    """Return the slices from ``ct_ich/`` under the data root.

    Raises:
        RequestError: no such folder, no table in it, or no slice that it names.
    """
    folder = options.rooted("ct_ich") / "ct_ich"
    table = find_table("ct_ich", folder, TABLES)
    files: list[Path] = []
    labels: list[int] = []
    patients: list[str] = []
    for number, slice_, label in _rows(table):
        path = table.parent / "Patients_CT" / f"{number:03d}" / "brain" / f"{slice_}.jpg"
        if path.is_file():
            files.append(path)
            labels.append(label)
            patients.append(str(number))
    if not files:
        raise RequestError(
            f"ct_ich: {table.parent} must hold slices that {table.name} names, got none; put "
            "Patients_CT/049/brain/1.jpg and the others there"
        )
    whole = ImageSet(
        slices(files, options.image_size or SIDE),
        torch.tensor(labels),
        names=tuple(f"{f.parts[-3]}-{f.name}" for f in files),
    )
    return divided(whole, CLASS_NAMES, options, patients)


def _rows(table: Path) -> list[tuple[int, int, int]]:
    """Return patient, slice and class of the slices with at most one kind."""
    found, rows = [], list(read_rows(table))
    try:
        for row in rows:
            kinds = [c for c, kind in enumerate(KINDS) if row[kind] == "1"]
            if len(kinds) <= 1:
                label = kinds[0] if kinds else CLASS_NAMES.index("none")
                found.append((int(row["patientnumber"]), int(row["slicenumber"]), label))
    except (KeyError, ValueError) as error:
        raise RequestError(
            f"{table}: must have the columns PatientNumber, SliceNumber and the five kinds, but: "
            f"{error!r}; take the one of PhysioNet"
        ) from error
    return found
