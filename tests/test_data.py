"""Image sets: arrays, folders, tables, the built-in set, and the division into parts."""

import io
import os
import re
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdq import image_rows
from sdq.data import ArrayImages, DataOptions, Splits, divide, open_data
from sdq.datasets import (
    cifar10,
    dermamnist,
    ham10000,
    isic2018,
    isic2019,
    synthetic_derm,
)
from sdq.errors import RequestError
from sdq.image_files import FileImages
from sdq.image_folder import read_folder
from sdq.npz_file import read_npz

OPTIONS = DataOptions()
RNG = np.random.default_rng(0)


def _real_root() -> Path | None:
    root = Path(os.environ.get("SDQ_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    return root if root.is_dir() else None


needs_real = pytest.mark.skipif(_real_root() is None, reason="no SDQ_DATA and no ../shared/data")


def pixels(n: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def refuses(*fragments: str) -> "pytest.RaisesExc[RequestError]":
    """RequestError whose message has the fragments in this order."""
    return pytest.raises(RequestError, match=".*".join(re.escape(f) for f in fragments))


def all_of(splits: Splits, part: str) -> torch.Tensor:
    images = getattr(splits, part)
    return torch.as_tensor(images.images.take(torch.arange(len(images))))


# --------------------------------------------------------------------------------------- divide


@settings(deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), max_size=60),
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_divide_is_a_partition_whose_first_part_has_every_class(
    labels: list[int], shares: list[float], seed: int
) -> None:
    tensor = torch.tensor(labels, dtype=torch.int64)
    parts = divide(tensor, shares, seed)
    assert len(parts) == len(shares)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    assert set(tensor[parts[0]].tolist()) == set(labels)
    for part in parts:
        assert part.dtype == torch.int64
        assert part.tolist() == sorted(part.tolist())
    for c in set(labels):  # sizes are the quotas rounded up or down, but for the first one's claim
        count = labels.count(c)
        for part, share in zip(parts[1:], shares[1:], strict=True):
            assert abs((tensor[part] == c).sum() - count * share / sum(shares)) <= 2


@pytest.mark.parametrize(
    ("count", "shares", "sizes"),
    [
        (1, (0.7, 0.1, 0.2), [1, 0, 0]),
        (1, (0.1, 0.9), [1, 0]),
        (2, (0.7, 0.1, 0.2), [1, 0, 1]),
        (2, (0.1, 0.9), [1, 1]),
        (3, (0.7, 0.1, 0.2), [2, 0, 1]),
        (5, (0.7, 0.1, 0.2), [3, 1, 1]),
        (10, (0.7, 0.1, 0.2), [7, 1, 2]),
        (10, (0.8, 0, 0.2), [8, 0, 2]),
        (10, (7, 1, 2), [7, 1, 2]),
        (0, (0.5, 0.5), [0, 0]),
    ],
)
def test_divide_sizes(count: int, shares: tuple[float, ...], sizes: list[int]) -> None:
    assert [len(p) for p in divide(torch.zeros(count).long(), shares, 3)] == sizes


def test_divide_depends_on_the_seed_alone() -> None:
    labels = torch.arange(100) % 3
    first, again, other = (divide(labels, (0.5, 0.5), s)[0].tolist() for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("shares", [(), (0, 1), (0.5, -0.1), (float("nan"), 1)])
def test_divide_refuses(shares: tuple[float, ...]) -> None:
    with refuses("divide: shares must be at least 0 and the first above 0, got", "--split"):
        divide(torch.zeros(3).long(), shares, 0)


# ------------------------------------------------------------------------------------------ npz


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path / "set.npz", **arrays)
    return path / "set.npz"


def medmnist(n: int = 6, **changed: Any) -> dict[str, Any]:
    labels = (np.arange(n) % 3).astype(np.uint8)[:, None]
    arrays = {f"{p}_images": pixels(n, 5, 4, 3) for p in ("train", "val", "test")}
    return arrays | {f"{p}_labels": labels for p in ("train", "val", "test")} | changed


def test_npz_medmnist(tmp_path: Path) -> None:
    arrays = medmnist()
    splits = open_data(str(save(tmp_path, **arrays)), OPTIONS)
    assert splits.class_names == ("0", "1", "2")
    assert splits.image_shape == (3, 5, 4)
    for part in ("train", "val", "test"):
        got = all_of(splits, part)
        assert got.dtype == torch.uint8
        np.testing.assert_array_equal(got.permute(0, 2, 3, 1), arrays[f"{part}_images"])
        assert getattr(splits, part).labels.tolist() == [0, 1, 2, 0, 1, 2]
        assert getattr(splits, part).labels.dtype == torch.int64


@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint16, np.uint64])
@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 1)])
def test_npz_train_alone_grey_and_any_integer(
    tmp_path: Path, dtype: type, shape: tuple[int, ...]
) -> None:
    labels: np.ndarray = np.array([0, 1, 1], dtype)
    path = save(tmp_path, train_images=pixels(3, *shape), train_labels=labels)
    splits = open_data(str(path), OPTIONS)
    assert splits.val is None
    assert splits.test is None
    assert splits.image_shape == (1, 5, 4)
    assert splits.train.labels.tolist() == [0, 1, 1]


def test_npz_without_splits_is_divided(tmp_path: Path) -> None:
    images = pixels(40, 4, 4)
    labels = np.arange(40) % 2
    path = save(tmp_path, images=images, labels=labels, masks=images)
    splits = open_data(str(path), DataOptions(split=(0.5, 0.25, 0.25), seed=4))
    expected = divide(torch.from_numpy(labels), (0.5, 0.25, 0.25), 4)
    for part, indices in zip(("train", "val", "test"), expected, strict=True):
        np.testing.assert_array_equal(all_of(splits, part)[:, 0], images[indices])
    assert open_data(str(path), DataOptions(split=(0.8, 0, 0.2))).val is None


def test_npz_class_names(tmp_path: Path) -> None:
    path = save(tmp_path, **medmnist(class_names=np.array(["a", "b", "ç"])))
    assert open_data(str(path), OPTIONS).class_names == ("a", "b", "ç")


def test_npz_resizes_shorter_side_then_cuts_the_centre(tmp_path: Path) -> None:
    image = np.zeros((1, 4, 12, 3), np.uint8)
    image[:, :, 4:8] = 200  # the centre square
    path = save(tmp_path, train_images=image, train_labels=np.array([0]))
    got = all_of(read_npz(path, DataOptions(image_size=8)), "train")
    assert got.shape == (1, 3, 8, 8)
    assert (got[..., 1:-1] == 200).all()  # bilinear mixes the outermost columns alone
    grey = save(tmp_path, train_images=image[..., 0], train_labels=np.array([0]))
    assert torch.equal(all_of(read_npz(grey, DataOptions(image_size=8)), "train"), got[:, :1])


@pytest.mark.parametrize(
    ("changed", "fragments"),
    [
        ({"train_images": np.zeros((6, 5, 4, 3))}, ["train_images must be uint8, got float64"]),
        ({"train_images": pixels(6, 4)}, ["must be N x H x W or N x H x W x C, got shape (6, 4)"]),
        ({"test_images": pixels(6, 5, 4, 4)}, ["test_images must have 1 or 3 channels", "got 4"]),
        ({"train_images": pixels(6, 5, 4, 3, 3)}, ["N x H x W x C, got shape (6, 5, 4, 3, 3)"]),
        ({"train_labels": np.zeros(6)}, ["train_labels must be integers, got float64"]),
        ({"train_labels": np.zeros((6, 14), int)}, ["one class", "14 columns (multi-label)"]),
        ({"train_labels": np.zeros((6, 1, 1), int)}, ["must be N or N x 1, got shape (6, 1, 1)"]),
        ({"val_labels": np.zeros(5, int)}, ["val_labels must have one entry", "5 for 6 images"]),
        ({"test_labels": np.array([{}] * 6)}, ["test_labels must be", "numbers or text, got"]),
        ({"train_labels": np.full(6, 10**9)}, ["numbered from 0 without gaps, got 1000000000"]),
        ({"class_names": np.array(["a"])}, ["class_names must be 3 or more texts, got", "(1,)"]),
        ({"class_names": np.arange(3)}, ["class_names must be 3 or more texts, got int64"]),
        ({"val_images": pixels(6, 5, 5, 3)}, ["val images must be (3, 5, 4) (C, H, W) like"]),
        ({"train_labels": np.array([0, 1, 3, 0, 1, 3])}, ["training image, got none of 2"]),
        ({"train_labels": np.array([-1, 1, 2, 0, 1, 2])}, ["must be in 0..2, got -1..2"]),
        ({"val_images": pixels(0, 5, 4, 3), "val_labels": np.zeros(0, int)}, ["val must have"]),
    ],
)
def test_npz_refuses(tmp_path: Path, changed: dict[str, Any], fragments: list[str]) -> None:
    with refuses("set.npz", *fragments):
        open_data(str(save(tmp_path, **medmnist(**changed))), OPTIONS)


def test_npz_missing_keys(tmp_path: Path) -> None:
    images, labels = pixels(3, 4, 4), np.arange(3)
    with refuses("no array 'train_images'", "did you mean 'train_image'?"):
        read_npz(save(tmp_path, train_image=images, train_labels=labels), OPTIONS)
    with refuses("no array 'train_images'", "Known: test_images, test_labels"):
        read_npz(save(tmp_path, test_images=images, test_labels=labels), OPTIONS)
    with refuses("no array 'val_labels'"):
        read_npz(
            save(tmp_path, train_images=images, train_labels=labels, val_images=images), OPTIONS
        )
    with refuses("no array 'images'", "Known: x", "give train_images and train_labels"):
        read_npz(save(tmp_path, x=images), OPTIONS)
    with refuses("no array 'labels'", "did you mean 'label'?"):
        read_npz(save(tmp_path, images=images, label=labels), OPTIONS)


@pytest.mark.parametrize("prefix", ["", "train_"])
def test_npz_masks_only(tmp_path: Path, prefix: str) -> None:
    arrays = {f"{prefix}images": pixels(3, 4, 4), f"{prefix}masks": pixels(3, 4, 4)}
    with refuses("classification needs labels, got masks only", f"array {prefix}labels"):
        read_npz(save(tmp_path, **arrays), OPTIONS)


def test_npz_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, **medmnist())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with refuses("must be a complete .npz (zip) archive, got a file that is damaged"):
        read_npz(path, OPTIONS)
    flipped = bytearray(whole)
    flipped[200] ^= 0xFF  # a pixel of the first array: the checksum of the member fails
    path.write_bytes(flipped)
    with refuses("must be a complete .npz (zip) archive, got BadZipFile"):
        read_npz(path, OPTIONS)
    np.save(tmp_path / "set.npy", pixels(3, 4, 4))
    (tmp_path / "set.npy").rename(path)
    with refuses("of another format"):
        read_npz(path, OPTIONS)
    with refuses("no such file; give an .npz"):
        read_npz(tmp_path / "absent.npz", OPTIONS)


# --------------------------------------------------------------------------------------- folder


def draw(path: Path, *shape: int, value: int | None = None) -> np.ndarray:
    """Write a lossless image and return its pixels."""
    array = pixels(1, *shape)[0] if value is None else np.full(shape, value, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def table(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return path


def test_class_folders(tmp_path: Path) -> None:
    kept = {}
    for part in ("train", "val", "test"):
        for name in ("b", "a"):
            for i, suffix in enumerate(("png", "bmp", "PNG")):
                kept[part, name, i] = draw(tmp_path / part / name / f"{i}.{suffix}", 6, 5, 3)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("a", "b")
    assert splits.image_shape == (3, 6, 5)
    for part in ("train", "val", "test"):
        assert getattr(splits, part).labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = np.stack([kept[part, n, i] for n in "ab" for i in range(3)])
        np.testing.assert_array_equal(all_of(splits, part).permute(0, 2, 3, 1), expected)


def test_class_folders_train_alone_numbers_and_grey(tmp_path: Path) -> None:
    for name in ("10", "9", "2"):
        draw(tmp_path / "train" / name / "x.png", 4, 4)
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("2", "9", "10")
    assert splits.image_shape == (1, 4, 4)
    assert splits.val is None
    assert splits.test is None


def test_one_colour_image_makes_all_rgb(tmp_path: Path) -> None:
    grey = draw(tmp_path / "train" / "a" / "0.png", 4, 4)
    draw(tmp_path / "train" / "a" / "1.png", 4, 4, 3)
    got = all_of(open_data(str(tmp_path), OPTIONS), "train")
    assert got.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(got[0], np.stack([grey] * 3))


def test_class_without_training_images(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a" / "0.png", 4, 4)
    draw(tmp_path / "test" / "b" / "0.png", 4, 4)
    with refuses("every class must have a training image, got none of b"):
        open_data(str(tmp_path), OPTIONS)


def test_sizes(tmp_path: Path) -> None:
    draw(tmp_path / "train" / "a" / "0.png", 4, 8, value=90)
    draw(tmp_path / "train" / "a" / "1.png", 9, 7, value=30)
    with refuses("one size (H, W), got (4, 8) (0.png) and (9, 7) (1.png); pass --image-size S"):
        read_folder(tmp_path, OPTIONS)
    got = all_of(read_folder(tmp_path, DataOptions(image_size=6)), "train")
    assert got.shape == (2, 1, 6, 6)
    assert (got[0] == 90).all()
    assert (got[1] == 30).all()


def test_resize_is_the_same_for_files_and_arrays(tmp_path: Path) -> None:
    image = draw(tmp_path / "train" / "a" / "0.png", 20, 31, 3)
    path = save(tmp_path, train_images=image[None], train_labels=np.array([0]))
    options = DataOptions(image_size=9)
    assert torch.equal(
        all_of(read_folder(tmp_path, options), "train"), all_of(read_npz(path, options), "train")
    )


def test_lazy_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        draw(tmp_path / "train" / "ab"[i % 2] / f"{i}.png", 8, 6, 3)
    options = DataOptions(image_size=5)
    eager = read_folder(tmp_path, options)
    monkeypatch.setattr(image_rows, "EAGER_BYTES", 12 * 3 * 5 * 5 - 1)
    lazy = read_folder(tmp_path, options)
    assert isinstance(eager.train.images.images, ArrayImages)  # type: ignore[attr-defined]
    assert isinstance(lazy.train.images.images, FileImages)  # type: ignore[attr-defined]
    assert lazy.train.images.shape == eager.train.images.shape == (12, 3, 5, 5)
    indices = torch.tensor([7, 0, 7, 11])
    assert torch.equal(lazy.train.images.take(indices), eager.train.images.take(indices))
    assert lazy.train.images.take(torch.tensor([], dtype=torch.int64)).shape == (0, 3, 5, 5)


def test_undecodable_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train" / "a" / "0.png"
    draw(path, 64, 64, 3)
    whole = path.read_bytes()
    path.write_bytes(b"no image")
    with refuses("0.png: must be a JPEG, PNG or BMP image, got UnidentifiedImageError"):
        read_folder(tmp_path, OPTIONS)
    path.write_bytes(whole[: len(whole) // 2])
    with refuses("0.png: must be a JPEG, PNG or BMP image, got OSError", "replace or remove"):
        read_folder(tmp_path, OPTIONS)
    monkeypatch.setattr(image_rows, "EAGER_BYTES", 0)
    lazy = read_folder(tmp_path, OPTIONS)  # the header is whole
    with refuses("0.png: must be a JPEG, PNG or BMP image, got OSError"):
        lazy.train.images.take(torch.tensor([0]))


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 9999, np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    with refuses("0.png: pixels must be 8 bits, got mode 'I;16'; scale the image to 0..255"):
        read_folder(tmp_path, OPTIONS)


def test_folder_of_no_known_layout(tmp_path: Path) -> None:
    with refuses("no train/CLASS folders and no CSV with labels; give train/CLASS/*.jpg"):
        open_data(str(tmp_path), OPTIONS)
    table(tmp_path / "a.csv", "image,age", "0,1")
    with refuses("no CSV with labels"):
        open_data(str(tmp_path), OPTIONS)
    table(tmp_path / "b.csv", "image,label", "0,1")
    table(tmp_path / "c.csv", "image,label", "0,1")
    with refuses("must have one CSV with labels, got b.csv, c.csv; move the others away"):
        open_data(str(tmp_path), OPTIONS)
    (tmp_path / "train" / "a").mkdir(parents=True)
    with refuses("the set must have at least one image, got none"):
        open_data(str(tmp_path), OPTIONS)


# ------------------------------------------------------------------------------------------ CSV


def ham(folder: Path, name: str = "HAM10000_metadata.csv", separator: str = ",") -> None:
    """60 images of 20 lesions, 3 images each, in two sub-folders."""
    rows = []
    for i in range(60):
        lesion = i // 3
        part = folder / f"HAM10000_images_part_{1 + i % 2}"
        draw(part / f"ISIC_{i:07}.png", 4, 5, 3)
        rows.append(
            separator.join((f"HAM_{lesion:07}", f"ISIC_{i:07}", ("nv", "mel")[lesion % 2], "histo"))
        )
    table(folder / name, separator.join(("lesion_id", "image_id", "dx", "dx_type")), *rows)


def assert_lesions_stay_together(splits: Splits, folder: Path, lesion_of: dict[str, str]) -> None:
    """Find every image again by its pixels, and its lesion by its name."""
    lesion = {np.asarray(Image.open(f)).tobytes(): lesion_of[f.stem] for f in folder.rglob("*.png")}
    seen = [
        {lesion[i.permute(1, 2, 0).numpy().tobytes()] for i in all_of(splits, part)}
        for part in ("train", "val", "test")
        if getattr(splits, part) is not None
    ]
    assert sum(len(s) for s in seen) == len(set.union(*seen)) == len(set(lesion_of.values()))


@pytest.mark.parametrize("name", ["HAM10000_metadata.csv", "HAM10000_metadata.tab"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ham10000(tmp_path: Path, seed: int, name: str) -> None:
    folder = tmp_path / "ham10000"
    ham(folder, name, "\t" if name.endswith("tab") else ",")
    splits = ham10000.load(DataOptions(root=tmp_path, seed=seed))
    assert splits.class_names == ("mel", "nv")
    assert splits.vertical_flip
    parts = [len(p) for p in (splits.train, splits.val, splits.test) if p]
    assert parts == [42, 6, 12]  # 7, 1 and 2 of the ten lesions of each class, 3 images each
    assert_lesions_stay_together(splits, folder, {f"ISIC_{i:07}": str(i // 3) for i in range(60)})


def test_ham10000_as_a_folder(tmp_path: Path) -> None:
    ham(tmp_path / "ham10000")
    by_name = ham10000.load(DataOptions(root=tmp_path))
    by_path = open_data(str(tmp_path / "ham10000"), OPTIONS)
    assert torch.equal(all_of(by_name, "test"), all_of(by_path, "test"))


def one_hot(*names: str, classes: str) -> list[str]:
    columns = classes.split(",")
    return [",".join(["1.0" if c == n else "0.0" for c in columns]) for n in names]


CLASSES_2018 = "MEL,NV,BCC,AKIEC,BKL,DF,VASC"
CLASSES_2019 = "MEL,NV,BCC,AK,BKL,DF,VASC,SCC,UNK"


def isic(folder: Path, stem: str, classes: str, labels: list[str], first: int = 0) -> None:
    for i in range(len(labels)):
        draw(folder / f"{stem}_Input" / f"ISIC_{first + i:07}.png", 4, 4, 3)
    rows = [f"ISIC_{first + i:07},{h}" for i, h in enumerate(one_hot(*labels, classes=classes))]
    name = f"{stem}_GroundTruth"
    table(folder / name / f"{name}.csv", f"image,{classes}", *rows)


def test_isic2018_divided_by_lesion(tmp_path: Path) -> None:
    folder = tmp_path / "isic2018"
    names = CLASSES_2018.split(",")
    isic(folder, "ISIC2018_Task3_Training", CLASSES_2018, names * 10)
    groups = [f"ISIC_{i:07},L{i % 7}_{i // 14},x,y" for i in range(70)]  # pairs of one class
    table(
        folder / "ISIC2018_Task3_Training_LesionGroupings.csv",
        "image,lesion_id,diagnosis confirm type,source",
        *groups,
    )
    splits = isic2018.load(DataOptions(root=tmp_path))
    assert splits.class_names == tuple(names)
    assert splits.vertical_flip
    assert_lesions_stay_together(
        splits, folder, {f"ISIC_{i:07}": f"L{i % 7}_{i // 14}" for i in range(70)}
    )


def test_isic2018_official_parts(tmp_path: Path) -> None:
    folder = tmp_path / "isic2018"
    names = CLASSES_2018.split(",")
    for first, (part, count) in zip(
        (0, 100, 200), (("Training", 3), ("Validation", 1), ("Test", 2)), strict=True
    ):
        isic(folder, f"ISIC2018_Task3_{part}", CLASSES_2018, names * count, first)
    splits = isic2018.load(DataOptions(root=tmp_path))
    assert [len(p) for p in (splits.train, splits.val, splits.test) if p] == [21, 7, 14]
    assert splits.train.labels.tolist() == list(range(7)) * 3


def test_isic2019_drops_the_empty_class(tmp_path: Path) -> None:
    folder = tmp_path / "isic2019"
    names = CLASSES_2019.split(",")
    isic(folder, "ISIC_2019_Training", CLASSES_2019, names[:8] * 2)
    metadata = [f"ISIC_{i:07},50,torso,,male" for i in range(16)]
    table(
        folder / "ISIC_2019_Training_Metadata.csv",
        "image,age_approx,anatom_site_general,lesion_id,sex",
        *metadata,
    )
    assert isic2019.load(DataOptions(root=tmp_path)).class_names == tuple(names[:8])
    splits = open_data(str(folder), DataOptions(split=(1, 0, 0)))
    assert splits.class_names == tuple(names[:8])
    assert splits.train.labels.tolist() == list(range(8)) * 2


def test_isic2019_keeps_the_unknown_class_when_used(tmp_path: Path) -> None:
    folder = tmp_path / "isic2019"
    isic(folder, "ISIC_2019_Training", CLASSES_2019, CLASSES_2019.split(",") * 2)
    assert isic2019.load(DataOptions(root=tmp_path)).class_names[-1] == "UNK"


@pytest.mark.parametrize("image", ["file", "image", "image_id", "filename", "Image"])
@pytest.mark.parametrize("label", ["label", "class", "dx", "target", "diagnosis"])
def test_generic_columns(tmp_path: Path, image: str, label: str) -> None:
    for i in range(4):
        draw(tmp_path / "deep" / "er" / f"im.{i}.png", 4, 4)
    rows = ["im.0,x", "im.1.png,y", "er/im.2,x", "deep/er/im.3.png,y"]
    table(tmp_path / "t.csv", f"\ufeff{image}, {label}", *rows)
    splits = open_data(str(tmp_path), DataOptions(split=(1, 0, 0)))
    assert splits.class_names == ("x", "y")
    assert splits.train.labels.tolist() == [0, 1, 0, 1]


def test_generic_split_column(tmp_path: Path) -> None:
    parts = ("train", "Training", "val", "valid", "test", "testing")
    kept = [draw(tmp_path / f"{i}.png", 4, 4) for i in range(6)]
    rows = [f"{i},{part},7" for i, part in enumerate(parts)]
    path = table(tmp_path / "t.csv", "image,split,label", *rows)
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("7",)
    np.testing.assert_array_equal(all_of(splits, "train")[:, 0], np.stack(kept[:2]))
    np.testing.assert_array_equal(all_of(splits, "val")[:, 0], np.stack(kept[2:4]))
    np.testing.assert_array_equal(all_of(splits, "test")[:, 0], np.stack(kept[4:]))
    table(path, "image,split,label", "0,train,7", "1,fold1,7")
    with refuses("t.csv: split must be train, val or test, got 'fold1'"):
        open_data(str(tmp_path), OPTIONS)


def test_mixed_groups_reach_train_by_their_rarest_class(tmp_path: Path) -> None:
    rows = []
    for i in range(30):
        draw(tmp_path / f"{i}.png", 4, 4)
        rows.append(f"{i},{'rare' if i == 0 else 'common'},p{i // 3}")
    table(tmp_path / "t.csv", "image,label,patient_id", *rows)
    for seed in range(5):
        splits = open_data(str(tmp_path), DataOptions(seed=seed, split=(0.2, 0.4, 0.4)))
        assert splits.class_names == ("common", "rare")
        assert (splits.train.labels == 1).sum() == 1


@pytest.mark.parametrize(
    ("header", "rows", "fragments"),
    [
        (
            "image,label",
            ["0,a", "gone,a", "lost,b"],
            ["every row must have an image file under", "'gone' (2 of 3 rows)"],
        ),
        ("image,label", ["0,a", "0.png,b"], ["every image must have one row, got 0.png twice"]),
        ("image,label", ["0,a", "1,"], ["label must name a class in every row, got none in row 3"]),
        ("image,label", ["twin,a"], ["'twin' must be one file, got a/twin.png, b/twin.png"]),
        ("image,MEL,NV", ["0,1,0", "1,1,1"], ["one of MEL, NV must be 1", "got 2 in row 3"]),
        ("image,MEL,NV", ["0,0.0,0.0"], ["one of MEL, NV must be 1 in every row, got 0 in row 2"]),
        ("image,label", [], ["the set must have at least one image, got none"]),
    ],
)
def test_csv_refuses(tmp_path: Path, header: str, rows: list[str], fragments: list[str]) -> None:
    for name in ("0.png", "1.png", "a/twin.png", "b/twin.png"):
        draw(tmp_path / name, 4, 4)
    table(tmp_path / "t.csv", header, *rows)
    with refuses(*fragments):
        open_data(str(tmp_path), OPTIONS)


def test_csv_of_another_encoding(tmp_path: Path) -> None:
    draw(tmp_path / "0.png", 4, 4)
    (tmp_path / "t.csv").write_bytes("image,label\n0,naevus pigmenté\n".encode("latin-1"))
    with refuses("t.csv: must be a CSV in UTF-8, got", "save it again"):
        open_data(str(tmp_path), OPTIONS)


def test_named_table_without_an_image_column(tmp_path: Path) -> None:
    table(tmp_path / "ham10000" / "HAM10000_metadata.csv", "imag,dx", "0,nv")
    with refuses("no image column; did you mean 'imag'?"):
        ham10000.load(DataOptions(root=tmp_path))


# ------------------------------------------------------------------------------------ by name


@pytest.mark.parametrize(
    ("plugin", "fragments"),
    [
        (dermamnist, ["dermamnist: no file", "dermamnist.npz'; put the .npz of MedMNIST there"]),
        (cifar10, ["cifar10: nothing of cifar10, cifar10_jpg", "train/CLASS/*.jpg"]),
        (ham10000, ["ham10000: no file", "ham10000/HAM10000_metadata.csv'; put the images"]),
        (isic2018, ["isic2018: no file", "ISIC2018_Task3_Training_GroundTruth.csv'"]),
        (isic2019, ["isic2019: no file", "ISIC_2019_Training_GroundTruth.csv'"]),
    ],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_plugins_name_what_is_missing(
    tmp_path: Path, plugin: ModuleType, fragments: list[str]
) -> None:
    with refuses(*fragments):
        plugin.load(DataOptions(root=tmp_path))
    with refuses("is read from a data root and none was given; pass --data-root DIR"):
        plugin.load(OPTIONS)


def test_dermamnist_names_and_flips(tmp_path: Path) -> None:
    np.savez(tmp_path / "dermamnist.npz", **medmnist(7, train_labels=np.arange(7)))
    splits = open_data("dermamnist", DataOptions(root=tmp_path))
    assert splits.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert splits.horizontal_flip
    assert splits.vertical_flip


def small_cifar(folder: Path) -> None:
    for part, count in (("train", 20), ("test", 3)):
        for name in ("truck", "airplane", "cat"):
            for i in range(count):
                draw(folder / part / name / f"{i:04}.png", 8, 8, 3)


@pytest.mark.parametrize("top", ["", "cifar10_jpg/"])
def test_cifar10_tar_equals_folder(tmp_path: Path, top: str) -> None:
    folder, packed = tmp_path / "a" / "cifar10", tmp_path / "b"
    small_cifar(folder)
    packed.mkdir()
    with tarfile.open(packed / "cifar10_jpg.tar.gz", "w:gz") as archive:
        for part in ("test", "train"):
            archive.add(folder / part, f"{top}{part}")
    from_folder = open_data("cifar10", DataOptions(root=tmp_path / "a"))
    from_tar = open_data("cifar10", DataOptions(root=packed, seed=9))  # the seed changes nothing
    assert from_tar.class_names == from_folder.class_names == ("airplane", "cat", "truck")
    assert [len(p) for p in (from_tar.train, from_tar.val, from_tar.test) if p] == [54, 6, 9]
    assert from_tar.horizontal_flip
    assert not from_tar.vertical_flip
    for part in ("train", "val", "test"):
        assert torch.equal(all_of(from_tar, part), all_of(from_folder, part))
        assert torch.equal(getattr(from_tar, part).labels, getattr(from_folder, part).labels)


def test_cifar10_damaged_tar(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        data = pixels(20000).tobytes()
        info = tarfile.TarInfo("train/cat/0.jpg")
        info.size = len(data)
        archive.addfile(info, io.BytesIO(data))
    path = tmp_path / "cifar10.tar.gz"
    path.write_bytes(stream.getvalue()[:9000])
    with refuses("cifar10.tar.gz: must be a complete .tar.gz archive, got"):
        cifar10.load(DataOptions(root=tmp_path))
    path.write_bytes(b"not an archive")
    with refuses("cifar10.tar.gz: must be a complete .tar.gz archive, got ReadError"):
        cifar10.load(DataOptions(root=tmp_path))


def test_cifar10_bad_image_in_the_tar_is_named(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "cifar10.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("train/cat/0.jpg")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"01234"))
    with refuses("train/cat/0.jpg: must be a JPEG, PNG or BMP image"):
        cifar10.load(DataOptions(root=tmp_path))


# ------------------------------------------------------------------------------------- built in


@pytest.fixture(scope="module")
def derm() -> Splits:
    return open_data("synthetic-derm", OPTIONS)


def test_synthetic_shapes_and_shares(derm: Splits) -> None:
    assert derm.val is not None
    assert derm.test is not None
    for part, size in ((derm.train, 3500), (derm.val, 500), (derm.test, 1500)):
        assert part.images.shape == (size, 3, 28, 28)
        assert part.images.take(torch.tensor([0])).dtype == torch.uint8
    shares = torch.bincount(derm.train.labels) / 3500
    assert shares.tolist() == pytest.approx([0.03, 0.05, 0.11, 0.03, 0.11, 0.65, 0.02], abs=1e-6)
    assert torch.bincount(derm.test.labels).min() >= 30
    assert derm.vertical_flip


def test_synthetic_repeats_and_follows_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    tenth = {k: tuple(c // 10 + 1 for c in counts) for k, counts in synthetic_derm.COUNTS.items()}
    monkeypatch.setattr(synthetic_derm, "COUNTS", tenth)  # 351 in train: more than one chunk
    first, again, other = (synthetic_derm.load(DataOptions(seed=s)) for s in (0, 0, 1))
    for part in ("train", "val", "test"):
        assert torch.equal(all_of(first, part), all_of(again, part))
        assert torch.equal(getattr(first, part).labels, getattr(again, part).labels)
        assert not torch.equal(all_of(first, part), all_of(other, part))


def test_synthetic_images_are_all_different_and_use_the_range(derm: Splits) -> None:
    flat = torch.cat([all_of(derm, p) for p in ("train", "val", "test")]).flatten(1)
    assert len(np.unique(flat.numpy(), axis=0)) == len(flat)
    assert 80 < flat.float().mean() < 170
    assert (flat == 255).float().mean() < 0.05  # hardly any clipped light
    assert (flat == 0).float().mean() < 0.01


def test_synthetic_side(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict.fromkeys(synthetic_derm.COUNTS, (1, 1, 1, 1, 1, 2, 1))
    monkeypatch.setattr(synthetic_derm, "COUNTS", few)
    splits = open_data("synthetic_derm", DataOptions(image_size=40))
    assert splits.train.images.shape == (8, 3, 40, 40)


def test_synthetic_mean_colour_does_not_decide(derm: Splits) -> None:
    """Least squares on the mean colour must stay near the largest class: cues must be combined."""
    assert derm.test is not None

    def features(part: str) -> torch.Tensor:
        mean = all_of(derm, part).double().mean((2, 3)) / 255
        return torch.cat([mean, torch.ones(len(mean), 1, dtype=torch.float64)], 1)

    target = torch.nn.functional.one_hot(derm.train.labels).double()
    weights = torch.linalg.lstsq(features("train"), target).solution
    accuracy = ((features("test") @ weights).argmax(1) == derm.test.labels).double().mean()
    assert 0.6 < accuracy < 0.75  # always the largest class: 0.65


# ------------------------------------------------------------------------------------ real data


@needs_real
def test_real_dermamnist() -> None:
    root = _real_root()
    assert root is not None
    if not (root / "dermamnist.npz").is_file():
        pytest.skip("no dermamnist.npz under the data root")
    splits = open_data("dermamnist", DataOptions(root=root))
    assert torch.bincount(splits.train.labels).tolist() == [228, 359, 769, 80, 779, 4693, 99]
    assert splits.image_shape == (3, 28, 28)
    assert splits.val is not None
    assert splits.test is not None
    assert (len(splits.val), len(splits.test)) == (1003, 2005)


@needs_real
def test_real_busi() -> None:
    root = _real_root()
    assert root is not None
    if not (root / "busi_128.npz").is_file():
        pytest.skip("no busi_128.npz under the data root")
    splits = open_data(str(root / "busi_128.npz"), DataOptions(image_size=32))
    parts = [p for p in (splits.train, splits.val, splits.test) if p is not None]
    assert torch.cat([p.labels for p in parts]).bincount().tolist() == [437, 210, 133]
    assert splits.image_shape == (1, 32, 32)


@pytest.mark.slow
@needs_real
def test_real_cifar10() -> None:
    root = _real_root()
    assert root is not None
    if not any((root / place).exists() for place in cifar10.PLACES):
        pytest.skip("no CIFAR-10 under the data root")
    splits = open_data("cifar10", DataOptions(root=root))
    assert splits.class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    assert splits.image_shape == (3, 32, 32)
    assert splits.val is not None
    assert splits.test is not None
    assert torch.bincount(splits.train.labels).tolist() == [4500] * 10
    assert torch.bincount(splits.val.labels).tolist() == [500] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10
