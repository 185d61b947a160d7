"""Image sets of every kind that is read: sound files, and what reads each of them."""

import io
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _reader import Reader
from PIL import Image

from sdq import image_folder, npz_file
from sdq.ct_files import BRAIN, patient, read_slice
from sdq.data import ArrayImages, DataOptions, ImageSet, Splits
from sdq.datasets import (
    busi,
    cifar10,
    ct_ich,
    dermoscopic4,
    ham10000_seg,
    isic2018,
    isic2019,
    prostate,
    retouch,
    rsna_ich,
)
from sdq.mask_folder import read_mask_folder
from sdq.split_file import apply_split_file
from sdq.weak_labels import read_coco, read_voc

SIDE = 8


def image_array(count: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SIDE, SIDE, channels), dtype=np.uint8)


def write_npz(folder: Path) -> None:
    parts = {f"{p}_images": image_array(12) for p in ("train", "val", "test")}
    labels = {f"{p}_labels": np.arange(12)[:, None] % 3 for p in ("train", "val", "test")}
    np.savez(folder / "set.npz", **parts, **labels, class_names=np.array(["a", "b", "c"]))
    np.savez(folder / "whole.npz", images=image_array(20)[..., 0], labels=np.arange(20) % 2)


def _write_csv(folder: Path) -> None:
    rows = ["image,label,split,patient_id,centre"]
    for i, pixels in enumerate(image_array(12)):
        name = f"im{i}" + (".png" if i % 2 else ".jpg")
        Image.fromarray(pixels).save(folder / name)
        part = ("train", "train", "val", "test")[i // 3]
        rows.append(f"{name},{'abc'[i % 3]},{part},p{i // 2},{'xy'[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


def _write_class_folders(folder: Path) -> None:
    for part in ("train", "test"):
        for label in "ab":
            place = folder / part / label
            place.mkdir(parents=True)
            for i, pixels in enumerate(image_array(3)):
                Image.fromarray(pixels).save(place / f"{i}.{('png', 'jpg', 'bmp')[i]}")


def _write_isic2019(folder: Path) -> None:
    home = folder / "isic2019"
    home.mkdir()
    names = [f"ISIC_{i:07d}" for i in range(16)]
    kinds = image_folder.ISIC_CLASSES[:2]
    for name, pixels in zip(names, image_array(16), strict=True):
        Image.fromarray(pixels).save(home / f"{name}.png")
    hot = [f"{n},{1 - i % 2}.0,{i % 2}.0" for i, n in enumerate(names)]
    tables = {
        "ISIC_2019_Training_GroundTruth.csv": [f"image,{','.join(kinds)}", *hot],
        "ISIC_2019_Training_Metadata.csv": ["image,lesion_id", *(f"{n},BCN_{n}" for n in names)],
        "train_test_split": [
            "image,center,fold", *(f"{n},{i % 6},{'test' if i > 12 else 'train'}"
                                   for i, n in enumerate(names)),
        ],
    }  # fmt: skip
    for name, lines in tables.items():
        (home / name).write_text("\n".join(lines) + "\n")


def _write_ct_ich(folder: Path) -> None:
    home = folder / "ct_ich"
    rows = ["PatientNumber,SliceNumber," + ",".join(ct_ich.KINDS)]
    for i in range(18):
        place = home / "Patients_CT" / f"{i:03d}" / "brain"
        place.mkdir(parents=True)
        Image.fromarray(image_array(1, i)[0, :, :, 0]).save(place / "1.jpg")
        rows.append(f"{i},1," + ",".join(str(int(i % 6 == c)) for c in range(5)))
    (home / "hemorrhage_diagnosis.csv").write_text("\n".join(rows) + "\n")


def _write_rsna(folder: Path) -> None:
    home = folder / "rsna_ich"
    home.mkdir()
    rows = ["ID,Label"]
    for i in range(15):
        np.save(home / f"ID_{i}.npy", image_array(1, i)[0, :, :, 0].astype(np.int16))
        rows += [f"ID_{i}_{k},{int(i % 5 == c)}" for c, k in enumerate(rsna_ich.CLASS_NAMES)]
    (home / "stage_2_train.csv").write_text("\n".join(rows) + "\n")


def _write_slices(folder: Path) -> None:
    np.save(folder / "units.npy", np.full((SIDE, SIDE), 40, np.int16))
    Image.fromarray(image_array(1)[0, :, :, 0]).save(folder / "slice.png")


def _write_dicom(folder: Path) -> None:
    import pydicom

    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    path = folder / "slice.dcm"
    data = pydicom.dataset.FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID, data.SOPClassUID = "p1", meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.Rows = data.Columns = SIDE
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 1
    data.RescaleSlope, data.RescaleIntercept = "1", "-1000"
    data.PixelData = np.full((SIDE, SIDE), 1040, np.int16).tobytes()
    data.save_as(path)


def _write_cifar(folder: Path) -> None:
    import tarfile

    with tarfile.open(folder / "cifar10.tar.gz", "w:gz") as archive:
        for part in ("train", "test"):
            for label in ("airplane", "bird"):
                for i, pixels in enumerate(image_array(10 if part == "train" else 2)):
                    stream = io.BytesIO()
                    Image.fromarray(pixels).save(stream, "JPEG")
                    member = tarfile.TarInfo(f"cifar10/{part}/{label}/{i}.jpg")
                    member.size = stream.tell()
                    stream.seek(0)
                    archive.addfile(member, stream)


def _write_split(folder: Path) -> None:
    rows = [f"{i},{'xyz'[i % 3]},{'train' if i < 20 else 'test'}" for i in range(24)]
    (folder / "SPLIT.csv").write_text("\n".join(["index,client,split", *rows]) + "\n")


def _masks(count: int, classes: int = 1) -> np.ndarray:
    found = np.zeros((count, SIDE, SIDE), np.uint8)
    for i in range(count):
        found[i, 1 : 3 + i % 4, 2:6] = 1 + i % classes
    return found


def _save_masked(image: Path, mask: Path, number: int, values: np.ndarray) -> None:
    for path, pixels in ((image, image_array(1, number)[0]), (mask, values)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def _write_masks_npz(folder: Path) -> None:
    part = {"images": image_array(12), "masks": _masks(12, 2), "labels": np.arange(12) % 3}
    parts = {f"{name}_{key}": array for name in ("train", "test") for key, array in part.items()}
    names = {"mask_names": np.array(["a", "b"]), "class_names": np.array(["x", "y", "z"])}
    np.savez(folder / "set.npz", **parts, **names)
    np.savez(folder / "whole.npz", images=image_array(20)[..., 0], masks=_masks(20) * 255)


def _write_mask_folder(folder: Path) -> None:
    rows = ["image,label,split,patient_id,centre"]
    for i, mask in enumerate(_masks(12, 2)):
        _save_masked(folder / f"images/im{i}.png", folder / f"masks/im{i}_mask.png", i, mask)
        part = ("train", "train", "val", "test")[i // 3]
        rows.append(f"im{i}.png,{'abc'[i % 3]},{part},p{i // 2},{'xy'[i % 2]}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    (folder / "classes.txt").write_text("vessel\nlesion\n")


def _write_busi(folder: Path) -> None:
    for i, mask in enumerate(_masks(12) * 255):
        place = folder / busi.FOLDER / busi.LABEL_NAMES[i % 3]
        _save_masked(place / f"n ({i}).png", place / f"n ({i})_mask.png", i, mask)
    Image.fromarray(_masks(1)[0]).save(place / "n (11)_mask_1.png")


def _write_ham10000(folder: Path) -> None:
    rows = ["lesion_id\timage_id\tdx\tdataset"]
    for i, mask in enumerate(_masks(12) * 255):
        name = f"ISIC_{i:07d}"
        image = folder / f"ham10000/images/{name}.jpg"
        _save_masked(image, folder / f"ham10000/masks/{name}_segmentation.png", i, mask)
        rows.append(f"L{i // 2}\t{name}\t{('nv', 'mel')[i % 2]}\t{('x', 'y')[i % 2]}")
    (folder / "ham10000/HAM10000_metadata.tab").write_text("\n".join(rows) + "\n")


def _write_isic2018(folder: Path) -> None:
    home = folder / "isic2018"
    home.mkdir()
    for n, part in enumerate(("Training", "Validation", "Test")):
        rows = ["image,MEL,NV,BCC,AKIEC,BKL,DF,VASC"]
        for i, pixels in enumerate(image_array(7, n)):
            Image.fromarray(pixels).save(home / f"ISIC_{n}{i}.jpg")
            rows.append(f"ISIC_{n}{i}," + ",".join(f"{int(i == c)}.0" for c in range(7)))
        (home / isic2018.TABLE.format(part)).write_text("\n".join(rows) + "\n")


def _write_dermoscopic4(folder: Path) -> None:
    home = folder / "dermoscopic4"
    home.mkdir()
    rows = ["image,label,client,split"]
    for i, pixels in enumerate(image_array(12)):
        Image.fromarray(pixels).save(home / f"im{i}.jpg")
        part = ("train", "train", "val", "test")[i // 3]
        rows.append(f"im{i},{dermoscopic4.CLASS_NAMES[i % 3]},{'xy'[i % 2]},{part}")
    (home / "dermoscopic4.csv").write_text("\n".join(rows) + "\n")


def _write_nifti(folder: Path) -> None:
    import nibabel

    for i in range(4):
        place = folder / f"prostate/site{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        ends = (".nii", ".nii.gz")[i // 2]
        scan = image_array(3, i)[..., 0].transpose(2, 1, 0).astype(np.int16)
        mask = _masks(3).transpose(2, 1, 0)
        for name, values in (("Case", scan), ("Case", mask)):
            end = ends if values is scan else f"_segmentation{ends}"
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), place / f"{name}{i}{end}")


META_IMAGE = """ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
CompressedData = {compressed}
DimSize = {side} {side} 3
ElementType = {kind}
ElementDataFile = {data}
"""


def _write_meta_image(folder: Path) -> None:
    for i, vendor in enumerate(retouch.VENDORS):
        place = folder / f"retouch/{vendor}/TRAIN{i}"
        place.mkdir(parents=True)
        scan, mask = image_array(3, i)[..., 0].astype("<u2").tobytes(), _masks(3, 3).tobytes()
        header = META_IMAGE.format(compressed=i == 1, side=SIDE, kind="MET_USHORT", data="oct.raw")
        (place / "oct.mhd").write_text(header)
        (place / "oct.raw").write_bytes(zlib.compress(scan) if i == 1 else scan)
        header = META_IMAGE.format(compressed=False, side=SIDE, kind="MET_UCHAR", data="LOCAL")
        (place / "reference.mhd").write_bytes(header.encode() + mask)


def _write_boxes(folder: Path) -> None:
    document = {
        "categories": [{"id": 1, "name": "lesion"}, {"id": 2, "name": "vessel"}],
        "images": [{"id": i, "file_name": f"im{i}.png", "height": 20, "width": 30}
                   for i in range(3)],
        "annotations": [{"image_id": i % 3, "category_id": 1 + i % 2, "bbox": [2, 3, 5.5, 6 + i]}
                        for i in range(5)],
    }  # fmt: skip
    (folder / "boxes.json").write_text(json.dumps(document))
    sides = zip(("xmin", "ymin", "xmax", "ymax"), (2, 3, 9, 12), strict=True)
    box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
    objects = "".join(
        f"<object><name>{name}</name><bndbox>{box}</bndbox></object>"
        for name in ("lesion", "vessel")
    )
    size = "<size><width>30</width><height>20</height><depth>3</depth></size>"
    (folder / "boxes.xml").write_text(
        f"<annotation><filename>im0.png</filename>{size}{objects}</annotation>"
    )


WRITERS: dict[str, Callable[[Path], object]] = {
    "npz": write_npz, "csv": _write_csv, "isic2019": _write_isic2019,
    "class_folders": _write_class_folders, "ct_ich": _write_ct_ich, "rsna": _write_rsna,
    "slices": _write_slices, "dicom": _write_dicom, "cifar10": _write_cifar,
    "split": _write_split, "masks_npz": _write_masks_npz, "mask_folder": _write_mask_folder,
    "busi": _write_busi, "ham10000": _write_ham10000, "isic2018": _write_isic2018,
    "dermoscopic4": _write_dermoscopic4, "nifti": _write_nifti, "meta_image": _write_meta_image,
    "boxes": _write_boxes,
}  # fmt: skip


# ----------------------------------------------------------------------------------- what is read


def _read_whole(splits: Splits) -> None:
    """Read every image, as training does."""
    splits.checked("data")
    for part in (splits.train, splits.val, splits.test):
        if part is not None:
            part.images.take(torch.arange(len(part)))
            if part.masks is not None:
                part.masks.take(torch.arange(len(part)))


def _read_npz(folder: Path) -> None:
    for name in ("set.npz", "whole.npz"):
        _read_whole(npz_file.read_npz(folder / name, DataOptions()))
        _read_whole(npz_file.read_npz(folder / name, DataOptions(image_size=6)))


def _read_folder(folder: Path) -> None:
    for size in (None, 6):
        _read_whole(image_folder.read_folder(folder, DataOptions(image_size=size)))


def _read_slices(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        read_slice(path, BRAIN)
        patient(path)


def _read_split(folder: Path) -> None:
    images = ArrayImages(torch.zeros(24, 1, 2, 2, dtype=torch.uint8))
    whole = ImageSet(images, torch.arange(24) % 2)
    _read_whole(apply_split_file(folder / "SPLIT.csv", Splits(whole, None, None, ("a", "b"))))


def _read_mask_folder(folder: Path) -> None:
    for size in (None, 6):
        _read_whole(read_mask_folder(folder, DataOptions(image_size=size)))


def _read_boxes(folder: Path) -> None:
    for image in (*read_coco(folder / "boxes.json").values(), read_voc(folder / "boxes.xml")):
        image.masks(("lesion", "vessel"))
        image.masks(("lesion", "vessel"), 6)


def _published(load: Callable[[DataOptions], Splits]) -> Callable[[Path], None]:
    """Return what reads a published set under a data root."""
    return lambda folder: _read_whole(load(DataOptions(folder)))


READERS: dict[str, Reader] = {
    "npz": Reader(_read_npz, "npz", ("set.npz", "whole.npz")),
    "npz with masks": Reader(_read_npz, "masks_npz", ("set.npz", "whole.npz")),
    "csv": Reader(_read_folder, "csv", ("labels.csv",)),
    "images": Reader(_read_folder, "csv", ("im0.jpg", "im1.png")),
    "class folders": Reader(
        _read_folder, "class_folders", ("train/a/0.png", "train/a/1.jpg", "train/b/2.bmp")
    ),
    "mask folder": Reader(
        _read_mask_folder, "mask_folder",
        ("masks/im1_mask.png", "images/im1.png", "labels.csv", "classes.txt"),
    ),
    "boxes": Reader(_read_boxes, "boxes", ("boxes.json", "boxes.xml")),
    "slices": Reader(_read_slices, "slices", ("units.npy", "slice.png")),
    "dicom": Reader(_read_slices, "dicom", ("slice.dcm",), needs="pydicom"),
    "nifti": Reader(
        _published(prostate.load), "nifti",
        ("prostate/site0/Case0.nii", "prostate/site0/Case0_segmentation.nii",
         "prostate/site0/Case2.nii.gz", "prostate/site1/Case3_segmentation.nii.gz"),
        needs="nibabel",
    ),
    "meta image": Reader(
        _published(retouch.load), "meta_image",
        tuple(f"retouch/{vendor}/{file}" for vendor, file in (
            ("Cirrus/TRAIN0", "oct.mhd"), ("Cirrus/TRAIN0", "oct.raw"),
            ("Cirrus/TRAIN0", "reference.mhd"), ("Spectralis/TRAIN1", "oct.mhd"),
            ("Spectralis/TRAIN1", "oct.raw"),
        )),
    ),
    "isic2018": Reader(
        _published(isic2018.load), "isic2018",
        tuple(f"isic2018/{isic2018.TABLE.format(part)}" for part in ("Training", "Test")),
    ),
    "isic2019": Reader(
        _published(isic2019.load), "isic2019",
        ("isic2019/ISIC_2019_Training_GroundTruth.csv",
         "isic2019/ISIC_2019_Training_Metadata.csv", "isic2019/train_test_split"),
    ),
    "ham10000_seg": Reader(
        _published(ham10000_seg.load), "ham10000",
        ("ham10000/HAM10000_metadata.tab", "ham10000/masks/ISIC_0000001_segmentation.png"),
    ),
    "dermoscopic4": Reader(
        _published(dermoscopic4.load), "dermoscopic4", ("dermoscopic4/dermoscopic4.csv",)
    ),
    "busi": Reader(
        _published(busi.load), "busi",
        (f"{busi.FOLDER}/normal/n (11)_mask_1.png", f"{busi.FOLDER}/benign/n (0)_mask.png"),
    ),
    "ct_ich": Reader(
        _published(ct_ich.load), "ct_ich",
        ("ct_ich/hemorrhage_diagnosis.csv", "ct_ich/Patients_CT/001/brain/1.jpg"),
    ),
    "rsna_ich": Reader(
        _published(rsna_ich.load), "rsna",
        ("rsna_ich/stage_2_train.csv", "rsna_ich/ID_3.npy"),
    ),
    "cifar10": Reader(_published(cifar10.load), "cifar10", ("cifar10.tar.gz",)),
    "split": Reader(_read_split, "split", ("SPLIT.csv",)),
}  # fmt: skip
"""Readers of images, of who has them, and of what is known of them."""
