"""Sets with masks: what is kept, what moves together, what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdq.batches import Augmentation, Batches, Normalization
from sdq.data import ArrayImages, DataOptions, ImageSet, Splits, open_data
from sdq.run_folder import fingerprint
from sdq.volume_files import read_volume

OPTIONS = DataOptions()
Refuses = Callable[..., Any]


def pixels(*shape: int, seed: int = 0, top: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, top, shape, dtype=np.uint8)


def a_set(count: int = 4, side: int = 6) -> ImageSet:
    """Images that are their own masks, so that both can be told to have moved together."""
    masks = torch.from_numpy(pixels(count, 1, side, side, top=3))
    return ImageSet(
        ArrayImages(masks), torch.arange(count) % 2, names=tuple("abcd"[:count]),
        masks=ArrayImages(masks),
    )  # fmt: skip


def the_masks(part: ImageSet | None) -> Tensor:
    assert part is not None
    assert part.masks is not None
    return part.masks.take(torch.arange(len(part)))


def test_subset_plain_and_joined_keep_the_masks() -> None:
    whole = a_set()
    wanted = the_masks(whole)
    assert torch.equal(the_masks(whole.subset(torch.tensor([2, 0]))), wanted[[2, 0]])
    assert torch.equal(the_masks(whole.plain()), wanted)
    both = ImageSet.joined([whole.subset(torch.tensor([3])), whole])
    assert torch.equal(the_masks(both), torch.cat((wanted[3:], wanted)))


def test_sets_with_and_without_masks_are_not_joined(refuses: Refuses) -> None:
    with refuses("must all have masks or none, got 1 with masks of 2"):
        ImageSet.joined([a_set(), replace(a_set(), masks=None)])


def test_masks_move_with_their_images() -> None:
    zero = Normalization((0.0,), (1 / 255,))
    moving = Augmentation(vertical_flip=True, shift=0.4)
    batches = Batches(a_set(), zero, batch_size=3, shuffle=True, augment=moving)
    moved = 0
    for x, y in batches:
        assert y.dtype == torch.int64
        assert y.shape == (len(x), 6, 6)
        torch.testing.assert_close(x[:, 0], y.float())
        moved += int(not any(torch.equal(y[0], mask[0].long()) for mask in the_masks(a_set())))
    assert moved


def splits_of(part: ImageSet, classes: int = 2) -> Splits:
    names = tuple(map(str, range(1, classes + 1)))
    return Splits(part, None, None, names, task="segmentation", label_names=("x", "y"))


def test_what_does_not_hold_together_is_refused(refuses: Refuses) -> None:
    whole = a_set()
    assert splits_of(whole).checked("here").task == "segmentation"
    with refuses("here: train must have a mask an image, got none; add masks"):
        splits_of(replace(whole, masks=None)).checked("here")
    with refuses("masks must be (4, 1, 6, 6)", "got (4, 1, 6, 5)", "save both at one size"):
        smaller = ArrayImages(the_masks(whole)[..., :5])
        splits_of(replace(whole, masks=smaller)).checked("here")
    with refuses("values in 0..1, got 2 in mask 0 (a)", "0 is background"):
        splits_of(whole, classes=1).checked("here")
    with refuses("every class must have a training image, got none of 3"):
        splits_of(whole, classes=3).checked("here")
    splits_of(whole, classes=3).checked("here", every_class=False)
    with refuses("labels must be in 0..1, got 0..2"):
        splits_of(replace(whole, labels=torch.tensor([0, 1, 2, 0]))).checked("here")


def test_the_labels_of_images_with_masks_can_be_classified() -> None:
    splits = splits_of(a_set()).classifying()
    assert splits.task == "classification"
    assert splits.class_names == ("x", "y")
    assert splits.train.masks is None
    assert splits.checked("here") is splits


def test_the_fingerprint_is_of_the_masks_too() -> None:
    whole = a_set()
    other = replace(whole, masks=ArrayImages(2 - the_masks(whole)))
    assert fingerprint(splits_of(whole)) != fingerprint(splits_of(other))


def save(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "set.npz", **arrays)  # type: ignore[arg-type]
    return str(path / "set.npz")


def test_npz_of_images_and_masks_is_divided_alike(tmp_path: Path) -> None:
    images = pixels(10, 5, 4)
    file = save(tmp_path, images=images, masks=(images > 99) * 255)
    splits = open_data(file, OPTIONS)
    assert splits.task == "segmentation"
    assert splits.class_names == ("foreground",)
    assert splits.label_names == ()
    for part in (splits.train, splits.val, splits.test):
        assert part is not None
        shown = part.images.take(torch.arange(len(part))) > 99
        assert torch.equal(the_masks(part), shown.to(torch.uint8))


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1)])
def test_npz_with_parts_labels_and_names(tmp_path: Path, shape: tuple[int, ...]) -> None:
    arrays = {}
    for part in ("train", "val", "test"):
        masks = pixels(6, *shape, top=4)
        masks.reshape(-1)[:4] = [0, 1, 2, 3]
        arrays |= {f"{part}_images": pixels(6, 5, 4), f"{part}_masks": masks,
                   f"{part}_labels": np.arange(6) % 2}  # fmt: skip
    names = {"class_names": np.array(["sick", "well"]), "mask_names": np.array(["a", "b", "c"])}
    splits = open_data(save(tmp_path, **arrays, **names), OPTIONS)
    assert splits.class_names == ("a", "b", "c")
    assert splits.label_names == ("sick", "well")
    assert splits.train.labels.tolist() == [0, 1] * 3
    expected = torch.from_numpy(arrays["test_masks"].reshape(6, 1, 5, 4))
    assert torch.equal(the_masks(splits.test), expected)
    # without labels class_names are those of the masks
    bare = {k: v for k, v in arrays.items() if not k.endswith("labels")}
    file = save(tmp_path, **bare, class_names=np.array(["a", "b", "c"]))
    assert open_data(file, OPTIONS).class_names == ("a", "b", "c")


def test_npz_masks_are_resized_to_the_nearest_pixel(tmp_path: Path) -> None:
    masks = np.zeros((1, 4, 8), np.uint8)
    masks[:, :, 2:4] = 1  # the left half of the centre square
    masks[:, :, 4:6] = 2
    file = save(tmp_path, train_images=masks, train_masks=masks)
    splits = open_data(file, DataOptions(image_size=8))
    expected = torch.tensor([1, 1, 1, 1, 2, 2, 2, 2], dtype=torch.uint8).expand(1, 1, 8, 8)
    assert torch.equal(the_masks(splits.train), expected)


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"masks": pixels(3, 4, 5, top=2)}, ("masks must be 3 x 4 x 4", "like the images")),
        ({"masks": pixels(3, 4, 4, top=2) * 0.5}, ("masks must be integers, got float64",)),
        (
            {"masks": pixels(3, 4, 4, top=3), "mask_names": np.array(["one"])},
            ("masks must have values 0 and 1, or 0 and 255, got 2",),
        ),
        (
            {"masks": pixels(3, 4, 4, top=3) * 2, "mask_names": np.array(["a", "b"])},
            ("masks must have values in 0..2, got 4",),
        ),
        (
            {"masks": pixels(3, 4, 4, top=2) * 254},
            ("masks without names must have values in 0..32, or 0 and 255 alone, got 254",),
        ),
        ({"masks": np.zeros((3, 4, 4), np.uint8)}, ("every class must have a training image",)),
        ({"train_images": pixels(3, 4, 4)}, ("no array 'train_masks'",)),
    ],
)
def test_npz_masks_that_do_not_fit(
    tmp_path: Path, refuses: Refuses, changed: dict[str, np.ndarray], fragments: tuple[str, ...]
) -> None:
    arrays = {"images": pixels(3, 4, 4), "masks": pixels(3, 4, 4, top=2), **changed}
    with refuses(*fragments):
        open_data(save(tmp_path, **arrays), OPTIONS)


def write_image(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def mask_folder(path: Path, count: int = 6, prefix: str = "", ending: str = "") -> None:
    for i in range(count):
        image = pixels(6, 5, seed=i)
        write_image(path / prefix / "images" / f"im{i}.png", image)
        mask = ((image > 99) * 255).astype(np.uint8)
        write_image(path / prefix / "masks" / f"im{i}{ending}.png", mask)


@pytest.mark.parametrize("ending", ["", "_mask", "_segmentation"])
def test_a_folder_of_images_and_masks(tmp_path: Path, ending: str) -> None:
    mask_folder(tmp_path, ending=ending)
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("foreground",)
    train = splits.train
    shown = train.images.take(torch.arange(len(train))) > 99
    assert torch.equal(the_masks(train), shown.to(torch.uint8))
    assert sum(len(p) for p in (splits.train, splits.val, splits.test) if p) == 6


def test_a_folder_with_parts_classes_and_a_table(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("test", 2)):
        for i in range(count):
            write_image(tmp_path / part / "images" / f"{part}{i}.png", pixels(4, 4, seed=i))
            mask = np.arange(16, dtype=np.uint8).reshape(4, 4) % 3
            write_image(tmp_path / part / "masks" / f"{part}{i}.png", mask)
    (tmp_path / "classes.txt").write_text("first\nsecond\n")
    rows = ["image,label,centre", "train0.png,x,here", "train1.png,y,there", "train2.png,x,here"]
    rows += ["test0.png,y,here", "test1.png,x,there"]
    (tmp_path / "about.csv").write_text("\n".join(rows))
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("first", "second")
    assert splits.label_names == ("x", "y")
    assert splits.centre_names == ("here", "there")
    assert splits.train.names == tuple(f"train/images/train{i}.png" for i in range(3))
    assert splits.train.labels.tolist() == [0, 1, 0]
    assert splits.test is not None
    assert splits.test.centres is not None
    assert splits.test.centres.tolist() == [0, 1]
    assert the_masks(splits.test)[0, 0].tolist() == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2],
                                                     [0, 1, 2, 0]]  # fmt: skip


def test_a_folder_that_does_not_fit(tmp_path: Path, refuses: Refuses) -> None:
    mask_folder(tmp_path)
    mask = tmp_path / "masks" / "im2.png"
    write_image(mask, np.zeros((5, 5), np.uint8))
    with refuses("im2.png: must be as large as its image, (6, 5)", "got (5, 5)"):
        open_data(str(tmp_path), OPTIONS)
    write_image(mask, np.full((6, 5), 3, np.uint8))
    with refuses("im2.png: masks must have values 0 and 1, or 0 and 255, got 3", "save PNG"):
        open_data(str(tmp_path), OPTIONS)
    mask.write_bytes(b"no image")
    with refuses("im2.png: must be an image", "replace the file"):
        open_data(str(tmp_path), OPTIONS)
    mask.unlink()
    with refuses("im2.png must have one mask of its name, got none", "empty (black) mask"):
        open_data(str(tmp_path), OPTIONS)


def test_names_of_classes_that_are_no_text_are_refused(tmp_path: Path, refuses: Refuses) -> None:
    mask_folder(tmp_path)
    (tmp_path / "classes.txt").write_bytes(b"mass\xff\n")
    with refuses("classes.txt: must be text in UTF-8", "save it again"):
        open_data(str(tmp_path), OPTIONS)
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfmass\n")  # of an editor that marks UTF-8
    assert open_data(str(tmp_path), OPTIONS).class_names == ("mass",)


def test_large_sets_are_read_when_asked_for(
    tmp_path: Path, refuses: Refuses, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask_folder(tmp_path)
    monkeypatch.setattr("sdq.image_rows.EAGER_BYTES", 1)
    write_image(tmp_path / "masks" / "im2.png", np.full((6, 5), 3, np.uint8))
    splits = open_data(str(tmp_path), DataOptions(split=(1, 0, 0)))
    assert not isinstance(splits.train.masks, ArrayImages)
    assert splits.train.masks is not None
    assert splits.train.masks.take(torch.tensor([0, 5])).shape == (2, 1, 6, 5)
    with refuses("im2.png: masks must have values 0 and 1"):
        the_masks(splits.train)


def test_busi_as_published_unites_several_lesions(tmp_path: Path) -> None:
    root = tmp_path / "Dataset_BUSI_with_GT"
    left, right = np.zeros((2, 4, 4), np.uint8)
    left[:, 0], right[:, 3] = 255, 255
    for label, masks in (
        ("benign", (left, right)),
        ("malignant", (left,)),
        ("normal", (0 * left,)),
    ):
        for i in range(1, 4):
            write_image(root / label / f"{label} ({i}).png", pixels(4, 4))
            for number, mask in enumerate(masks):
                ending = f"_{number}" if number else ""
                write_image(root / label / f"{label} ({i})_mask{ending}.png", mask)
    splits = open_data("busi", DataOptions(root=tmp_path, split=(1, 0, 0)))
    assert splits.label_names == ("benign", "malignant", "normal")
    assert torch.bincount(splits.train.labels).tolist() == [3, 3, 3]
    found = the_masks(splits.train)
    assert found[0, 0].tolist() == [[1, 0, 0, 1]] * 4
    assert found[splits.train.labels == 1][0, 0].tolist() == [[1, 0, 0, 0]] * 4
    assert not found[splits.train.labels == 2].any()
    (root / "normal" / "normal (3)_mask.png").unlink()
    with pytest.raises(ValueError, match=r"normal \(3\).png must have a mask beside it"):
        open_data("busi", DataOptions(root=tmp_path))


def test_busi_itself(real_root: Path) -> None:
    if not (real_root / "busi_128.npz").is_file():
        pytest.skip("BUSI is not in the data root")
    splits = open_data("busi", DataOptions(root=real_root, seed=1))
    counts = sum(
        torch.bincount(p.labels, minlength=3) for p in (splits.train, splits.val, splits.test) if p
    )
    assert torch.as_tensor(counts).tolist() == [437, 210, 133]
    assert splits.image_shape == (1, 128, 128)
    empty = the_masks(splits.test).flatten(1).any(1) == 0
    assert splits.test is not None
    assert torch.equal(empty, splits.test.labels == 2)


def test_ham10000_seg(tmp_path: Path) -> None:
    folder = tmp_path / "ham10000"
    rows = ["lesion_id,image_id,dx,dataset"]
    for i in range(8):
        image = pixels(6, 8, 3, seed=i)
        write_image(folder / "part_1" / f"ISIC_{i}.jpg", image)
        write_image(
            folder / "masks" / f"ISIC_{i}_segmentation.png",
            ((image[..., 0] > 99) * 255).astype(np.uint8),
        )
        rows.append(f"HAM_{i // 2},ISIC_{i},{'nv' if i % 2 else 'mel'},{'a' if i < 4 else 'b'}")
    (folder / "HAM10000_metadata.csv").write_text("\n".join(rows))
    splits = open_data("ham10000_seg", DataOptions(root=tmp_path, split=(0.5, 0, 0.5)))
    assert splits.class_names == ("lesion",)
    assert splits.label_names == ("mel", "nv")
    assert splits.centre_names == ("a", "b")
    lesions = [
        {int(Path(n).stem[5]) // 2 for n in p.names} for p in (splits.train, splits.test) if p
    ]
    assert not lesions[0] & lesions[1]
    first = Path(splits.train.names[0]).stem
    with Image.open(folder / "masks" / f"{first}_segmentation.png") as mask:
        expected = torch.from_numpy(np.asarray(mask) // 255)
    assert torch.equal(the_masks(splits.train)[0, 0], expected)


def test_ph2(tmp_path: Path) -> None:
    for i in range(3):
        case = tmp_path / "ph2" / "PH2 Dataset images" / f"IMD{i}"
        write_image(case / f"IMD{i}_Dermoscopic_Image" / f"IMD{i}.bmp", pixels(8 + i, 10, 3))
        mask = np.zeros((8 + i, 10), bool)
        mask[:, 5:] = True
        write_image(case / f"IMD{i}_lesion" / f"IMD{i}_lesion.bmp", mask)
        write_image(case / f"IMD{i}_roi" / f"IMD{i}_R1.bmp", mask)
    splits = open_data("ph2", DataOptions(root=tmp_path, image_size=8, split=(1, 0, 0)))
    assert splits.image_shape == (3, 8, 8)
    assert the_masks(splits.train)[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def meta_image(path: Path, values: np.ndarray, element: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = " ".join(map(str, values.shape[::-1]))
    path.write_text(
        f"ObjectType = Image\nNDims = 3\nDimSize = {size}\nElementType = {element}\n"
        f"ElementDataFile = {path.stem}.raw\n"
    )
    path.with_suffix(".raw").write_bytes(values.tobytes())


def test_retouch_slices_with_fluid(tmp_path: Path, refuses: Refuses) -> None:
    for vendor, side, element in (
        ("Cirrus", 8, "MET_UCHAR"), ("Spectralis", 6, "MET_USHORT"), ("Topcon", 8, "MET_UCHAR")
    ):  # fmt: skip
        case = tmp_path / "retouch" / vendor / "TRAIN001"
        kind = np.uint8 if element == "MET_UCHAR" else np.uint16
        volume = pixels(5, side, side).astype(kind) * (1 if kind == np.uint8 else 200)
        mask = np.zeros((5, side, side), np.uint8)
        mask[1:4, 2:4, :] = np.array([1, 2, 3], np.uint8)[:, None, None]
        meta_image(case / "oct.mhd", volume, element)
        meta_image(case / "reference.mhd", mask, "MET_UCHAR")
    splits = open_data(
        "retouch", DataOptions(root=tmp_path, image_size=8, split=(1, 0, 0))
    )  # fmt: skip
    assert splits.centre_names == ("Cirrus", "Spectralis", "Topcon")
    assert splits.train.names[:3] == tuple(f"Cirrus-TRAIN001-oct-{i}" for i in (1, 2, 3))
    cirrus = np.fromfile(tmp_path / "retouch/Cirrus/TRAIN001/oct.raw", np.uint8).reshape(5, 8, 8)
    assert torch.equal(splits.train.images.take(torch.tensor([0]))[0, 0], torch.tensor(cirrus[1]))
    assert [int(m.max()) for m in the_masks(splits.train)] == [1, 2, 3] * 3
    # 16 bits are scaled by the volume
    spectralis = splits.train.images.take(torch.tensor([3, 4, 5]))
    assert int(spectralis.max()) > 240
    with refuses("slices must be of one size", "pass --image-size S"):
        open_data("retouch", DataOptions(root=tmp_path))
    reference = tmp_path / "retouch/Cirrus/TRAIN001/reference.mhd"
    meta_image(reference, np.full((5, 8, 8), 4, np.uint8), "MET_UCHAR")
    with refuses("reference.mhd: masks must have values in 0..3, got 4"):
        open_data("retouch", DataOptions(root=tmp_path, image_size=8))
    reference.write_text("nothing")
    with refuses("reference.mhd: must be a volume (NIfTI or MetaImage)", "no ElementDataFile"):
        open_data("retouch", DataOptions(root=tmp_path, image_size=8))


def test_prostate_volumes(tmp_path: Path, refuses: Refuses) -> None:
    nibabel = pytest.importorskip("nibabel")
    for site, name in (("BIDMC", "_segmentation"), ("ISBI", "_Segmentation")):
        folder = tmp_path / "prostate" / site
        folder.mkdir(parents=True)
        volume = pixels(7, 6, 4).astype(np.float32)  # (x, y, z)
        mask = np.zeros((7, 6, 4), np.float32)
        mask[1:3, 2, 1], mask[4, 2, 2] = 1, 2
        nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "Case00.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), folder / f"Case00{name}.nii.gz")
    splits = open_data("prostate", DataOptions(root=tmp_path, split=(1, 0, 0)))
    assert splits.centre_names == ("BIDMC", "ISBI")
    assert splits.image_shape == (1, 6, 7)
    found = the_masks(splits.train)
    assert found.shape == (4, 1, 6, 7)
    assert found[0, 0, 2].tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert found[1, 0, 2].tolist() == [0, 0, 0, 0, 1, 0, 0]  # zones count as one
    (tmp_path / "prostate/ISBI/Case00_Segmentation.nii.gz").unlink()
    with refuses("Case00.nii.gz must have a mask beside it", "Case00_segmentation.nii.gz"):
        open_data("prostate", DataOptions(root=tmp_path))
    (tmp_path / "prostate/ISBI/Case00_segmentation.nii.gz").write_bytes(b"x")
    with refuses("must be a volume (NIfTI or MetaImage)"):
        open_data("prostate", DataOptions(root=tmp_path))


def test_built_in_images_without_a_lesion_are_the_normal_ones() -> None:
    splits = open_data("synthetic_lesions_seg", DataOptions(image_size=16))
    normal = splits.train.labels == splits.label_names.index("normal")
    assert torch.equal(the_masks(splits.train).flatten(1).any(1), ~normal)


@pytest.mark.parametrize(
    ("at", "value"),
    [(70, b"\x00\x06"), (108, b"\0\0\x80\xc0"), (116, b"\0\0\x80\x7f"), (42, b"\0\0"),
     (42, b"\xff\xff")],
)  # fmt: skip
def test_nifti_headers_that_say_nonsense_are_refused(
    tmp_path: Path, refuses: Refuses, at: int, value: bytes
) -> None:
    nibabel = pytest.importorskip("nibabel")
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(pixels(7, 6, 4).astype(np.int16), np.eye(4)), path)
    assert read_volume(path).shape == (4, 6, 7)
    data = bytearray(path.read_bytes())
    # data type, voxels that begin at -4, an intercept of infinity, the first size: 0, -1
    data[112:116] = b"\0\0\x80\x3f"  # a slope of 1, without which no intercept is read
    data[at : at + len(value)] = value
    path.write_bytes(data)
    with refuses("a.nii: must"):
        read_volume(path)


@pytest.mark.parametrize(
    "size", ["0 4 4", "-1 4 4", "9 9 9", "1e3 4 4", "4 4", "100000 100000 100000"]
)
def test_meta_image_sizes_that_say_nonsense_are_refused(
    tmp_path: Path, refuses: Refuses, size: str
) -> None:
    meta_image(tmp_path / "a.mhd", pixels(3, 4, 5), "MET_UCHAR")
    assert read_volume(tmp_path / "a.mhd").shape == (3, 4, 5)
    text = (tmp_path / "a.mhd").read_text()
    (tmp_path / "a.mhd").write_text(text.replace("5 4 3", size))
    with refuses("a.mhd: must"):
        read_volume(tmp_path / "a.mhd")
