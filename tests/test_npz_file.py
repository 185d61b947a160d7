"""Image sets of one .npz: what is read, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdq.data import DataOptions, divide, open_data
from sdq.npz_file import read_npz

OPTIONS = DataOptions()
RNG = np.random.default_rng(0)


def pixels(n: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *shape), dtype=np.uint8)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path / "set.npz", **arrays)
    return path / "set.npz"


def medmnist(n: int = 6, **changed: Any) -> dict[str, Any]:
    labels = (np.arange(n) % 3).astype(np.uint8)[:, None]
    arrays = {f"{p}_images": pixels(n, 5, 4, 3) for p in ("train", "val", "test")}
    return arrays | {f"{p}_labels": labels for p in ("train", "val", "test")} | changed


def test_npz_medmnist(tmp_path: Path, all_of: Callable[..., torch.Tensor]) -> None:
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


def test_npz_without_splits_is_divided(tmp_path: Path, all_of: Callable[..., torch.Tensor]) -> None:
    images = pixels(40, 4, 4)
    labels = np.arange(40) % 2
    path = save(tmp_path, images=images, labels=labels)
    splits = open_data(str(path), DataOptions(split=(0.5, 0.25, 0.25), seed=4))
    expected = divide(torch.from_numpy(labels), (0.5, 0.25, 0.25), 4)
    for part, indices in zip(("train", "val", "test"), expected, strict=True):
        np.testing.assert_array_equal(all_of(splits, part)[:, 0], images[indices])
    assert open_data(str(path), DataOptions(split=(0.8, 0, 0.2))).val is None


def test_npz_class_names(tmp_path: Path) -> None:
    path = save(tmp_path, **medmnist(class_names=np.array(["a", "b", "ç"])))
    assert open_data(str(path), OPTIONS).class_names == ("a", "b", "ç")


def test_npz_resizes_shorter_side_then_cuts_the_centre(
    tmp_path: Path, all_of: Callable[..., torch.Tensor]
) -> None:
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
def test_npz_refuses(
    tmp_path: Path, changed: dict[str, Any], fragments: list[str], refuses: Callable[..., Any]
) -> None:
    with refuses("set.npz", *fragments):
        open_data(str(save(tmp_path, **medmnist(**changed))), OPTIONS)


def test_npz_missing_keys(tmp_path: Path, refuses: Callable[..., Any]) -> None:
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


def test_npz_damaged(tmp_path: Path, refuses: Callable[..., Any]) -> None:
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


def test_dermamnist_names_and_flips(tmp_path: Path) -> None:
    np.savez(tmp_path / "dermamnist.npz", **medmnist(7, train_labels=np.arange(7)))
    splits = open_data("dermamnist", DataOptions(root=tmp_path))
    assert splits.class_names == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert splits.horizontal_flip
    assert splits.vertical_flip
