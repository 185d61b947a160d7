"""CT slices: windows, the three kinds of files, and the sets made of them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdq.ct_files import BRAIN, CtSlices, Window, read_slice
from sdq.data import DataOptions
from sdq.datasets import ct_ich, rsna_ich
from sdq.errors import RequestError

KINDS = rsna_ich.CLASS_NAMES


def test_a_window_maps_its_units_to_bytes() -> None:
    units = np.array([[-1000, 0, 20, 40, 60, 80, 3000]], np.int16)
    # 80 units around 40: 0 is black, 80 white, and a quarter is 63.75
    assert BRAIN(units).tolist() == [[0, 0, 64, 128, 191, 255, 255]]
    assert Window(50, 100)(np.array([[0, 50, 100]])).tolist() == [[0, 128, 255]]


def test_npy_holds_bytes_or_units(tmp_path: Path) -> None:
    units = np.full((4, 4), 60, np.int16)
    np.save(tmp_path / "units.npy", units)
    np.save(tmp_path / "bytes.npy", units.astype(np.uint8))
    assert read_slice(tmp_path / "units.npy", BRAIN).tolist() == [[191] * 4] * 4
    assert read_slice(tmp_path / "bytes.npy", BRAIN).tolist() == [[60] * 4] * 4


def test_slices_are_read_when_asked_for_and_resized(tmp_path: Path) -> None:
    files = []
    for i in range(5):
        Image.new("L", (12 + i, 9), 10 * i).save(tmp_path / f"{i}.png")
        files.append(tmp_path / f"{i}.png")
    found = CtSlices(tuple(files), 6).take(torch.tensor([4, 0, 4]))
    assert found.shape == (3, 1, 6, 6)
    assert found.unique(dim=0).shape[0] == 2
    assert found[0].unique().tolist() == [40]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"no image", "must be a CT slice"),
        ("x.npy", b"no array", "must be a CT slice"),
        ("x.dcm", b"no slice", "DICOM: pydicom must be installed|must be a CT slice"),
    ],
)
def test_what_is_no_slice_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((RequestError,), match=message):
        read_slice(tmp_path / name, BRAIN)


def test_a_volume_is_no_slice(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.zeros((2, 4, 4), np.uint8))
    with pytest.raises(RequestError, match=r"one slice \(H, W\), got shape \(2, 4, 4\)"):
        read_slice(tmp_path / "v.npy", BRAIN)


def write_dicom(path: Path, value: int, patient: str) -> None:
    pydicom = pytest.importorskip("pydicom")
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID = patient
    data.Rows, data.Columns = 8, 8
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.RescaleSlope, data.RescaleIntercept = "2", "-1024"
    data.PixelData = np.full((8, 8), value, np.uint16).tobytes()
    data.save_as(path, enforce_file_format=True)


def test_dicom_has_a_slope_and_an_intercept(tmp_path: Path) -> None:
    write_dicom(tmp_path / "x.dcm", 542, "p")
    # 542 x 2 - 1024 = 60 units
    assert read_slice(tmp_path / "x.dcm", BRAIN).tolist() == [[191] * 8] * 8


def rsna(root: Path, kinds: list[tuple[int, ...]]) -> Path:
    folder = root / "rsna_ich"
    (folder / "slices").mkdir(parents=True)
    rows = ["ID,Label"]
    for i, own in enumerate(kinds):
        rows += [f"ID_{i:03d}_{kind},{int(c in own)}" for c, kind in enumerate(KINDS)]
        rows.append(f"ID_{i:03d}_any,{int(bool(own))}")
    (folder / "stage_2_train.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_rsna_keeps_slices_of_one_kind(tmp_path: Path) -> None:
    kinds = [(c,) for c in range(5)] * 4 + [(), (0, 1)]
    folder = rsna(tmp_path, kinds)
    for i, own in enumerate(kinds):
        Image.new("L", (16, 16), 10 * sum(own)).save(folder / "slices" / f"ID_{i:03d}.png")
    (folder / "slices" / "ID_000.png").unlink()  # a part of the set will do
    splits = rsna_ich.load(DataOptions(root=tmp_path, image_size=8, split=(1, 0, 0)))
    assert splits.class_names == KINDS
    assert splits.train.labels.bincount().tolist() == [3, 4, 4, 4, 4]
    assert splits.image_shape == (1, 8, 8)
    pixels = splits.train.images.take(torch.arange(len(splits.train)))
    assert torch.equal(pixels[:, 0, 0, 0].long(), 10 * splits.train.labels)
    assert splits.train.names[0] == "ID_001.png"


def test_rsna_keeps_a_patient_in_one_part(tmp_path: Path) -> None:
    folder = rsna(tmp_path, [(c % 5,) for c in range(40)])
    for i in range(40):
        write_dicom(folder / "slices" / f"ID_{i:03d}.dcm", 500 + i, f"p{i % 20}")
    splits = rsna_ich.load(DataOptions(root=tmp_path, image_size=8, split=(0.5, 0.0, 0.5)))
    assert splits.test is not None
    of = [{int(name[3:6]) % 20 for name in part.names} for part in (splits.train, splits.test)]
    assert not of[0] & of[1]
    assert of[0] | of[1] == set(range(20))


def test_rsna_without_slices_says_what_belongs_there(tmp_path: Path) -> None:
    rsna(tmp_path, [(0,)])
    with pytest.raises(RequestError, match=r"must hold slices that stage_2_train\.csv names"):
        rsna_ich.load(DataOptions(root=tmp_path))
    for text in ("a,b\n1,2\n", "ID,Label\nID_0000000_epidural\n"):  # a line that was cut off
        (tmp_path / "rsna_ich" / "stage_2_train.csv").write_text(text)
        with pytest.raises(RequestError, match="every row must have an ID and a Label"):
            rsna_ich.load(DataOptions(root=tmp_path))


def ct(root: Path, patients: int) -> None:
    folder = root / "ct_ich"
    header = "PatientNumber,SliceNumber,Intraventricular,Intraparenchymal,Subarachnoid,Epidural,"
    rows = [header + "Subdural,No_Hemorrhage,Fracture_Yes_No"]
    for p in range(patients):
        (folder / "Patients_CT" / f"{p:03d}" / "brain").mkdir(parents=True)
        for s in range(1, 8):  # the five kinds, none, and two at once
            flags = [int(s in (k, 7) and not (s == 7 and k > 2)) for k in range(1, 6)]
            rows.append(f"{p},{s},{','.join(map(str, flags))},{int(s == 6)},")
            path = folder / "Patients_CT" / f"{p:03d}" / "brain" / f"{s}.jpg"
            Image.new("L", (20, 16), 30 * s).save(path)
    (folder / "hemorrhage_diagnosis.csv").write_text("\n".join(rows) + "\n")


def test_ct_ich_has_five_kinds_and_none(tmp_path: Path) -> None:
    ct(tmp_path, 6)
    splits = ct_ich.load(DataOptions(root=tmp_path, image_size=8, split=(0.5, 0.0, 0.5)))
    assert splits.test is not None
    assert splits.class_names[-1] == "none"
    for part in (splits.train, splits.test):
        assert part.labels.bincount(minlength=6).tolist() == [3] * 6
        pixels = part.images.take(torch.arange(len(part))).float().mean((1, 2, 3))
        # slice 1 is intraventricular, 2 intraparenchymal, 3 subarachnoid, 4 epidural, 5 subdural
        shade = torch.tensor([120.0, 60.0, 30.0, 90.0, 150.0, 180.0])[part.labels]
        assert (pixels - shade).abs().max() <= 2  # JPEG
    of = [{name[:3] for name in part.names} for part in (splits.train, splits.test)]
    assert not of[0] & of[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"PatientNumber,SliceNumber\n1,2\n", "must have the columns PatientNumber, SliceNumber"),
        (b"PatientNumber,Slice\xe9\n", r"_diagnosis\.csv: must be a CSV in UTF-8, got .*save it"),
    ],
)
def test_ct_ich_refuses_another_table(text: bytes, message: str, tmp_path: Path) -> None:
    ct(tmp_path, 1)
    (tmp_path / "ct_ich" / "hemorrhage_diagnosis.csv").write_bytes(text)
    with pytest.raises(RequestError, match=f"^(?!.*RequestError).*{message}"):
        ct_ich.load(DataOptions(root=tmp_path))
