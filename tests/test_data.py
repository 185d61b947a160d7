"""Image sets: the division into parts, sets by name, the built-in set, and the real data."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdq.data import ArrayImages, DataOptions, ImageSet, Splits, divide, open_data
from sdq.datasets import (
    cifar10,
    dermamnist,
    ham10000,
    isic2018,
    isic2019,
    synthetic_derm,
)

OPTIONS = DataOptions()
RNG = np.random.default_rng(0)


# -------------------------------------------------------------------------------------- classes


def test_classes_are_numbered_by_their_names(refuses: Callable[..., Any]) -> None:
    pixels = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    own = ImageSet(ArrayImages(pixels), torch.tensor([0, 1, 1, 0]))
    hospital = Splits(own, None, own.subset(torch.tensor([1])), ("mel", "nv"))
    found = hospital.numbered(("bcc", "nv", "mel"))
    assert found.class_names == ("bcc", "nv", "mel")
    assert found.train.labels.tolist() == [2, 1, 1, 2]
    assert found.test is not None
    assert found.test.labels.tolist() == [1]
    assert hospital.numbered(("mel", "nv")).train.labels.tolist() == [0, 1, 1, 0]
    with refuses("classes: must be bcc, nv, got mel, nv; name them alike in all sets"):
        hospital.numbered(("bcc", "nv"))
    maps = Splits(own, None, None, ("lesion",), task="segmentation")
    assert maps.numbered(("lesion",)) is maps
    with refuses("classes: must be gland, lesion, got lesion"):
        maps.numbered(("gland", "lesion"))


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
def test_divide_refuses(shares: tuple[float, ...], refuses: Callable[..., Any]) -> None:
    with refuses("divide: shares must be at least 0 and the first above 0, got", "--split"):
        divide(torch.zeros(3).long(), shares, 0)


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
    tmp_path: Path, plugin: ModuleType, fragments: list[str], refuses: Callable[..., Any]
) -> None:
    with refuses(*fragments):
        plugin.load(DataOptions(root=tmp_path))
    with refuses("is read from a data root and none was given; pass --data-root DIR"):
        plugin.load(OPTIONS)


def small_cifar(folder: Path) -> None:
    for part, count in (("train", 20), ("test", 3)):
        for name in ("truck", "airplane", "cat"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(folder / part / name / f"{i:04}.png")


@pytest.mark.parametrize("top", ["", "cifar10_jpg/"])
def test_cifar10_tar_equals_folder(
    tmp_path: Path, top: str, all_of: Callable[..., torch.Tensor]
) -> None:
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


def test_cifar10_damaged_tar(tmp_path: Path, refuses: Callable[..., Any]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        data = RNG.bytes(20000)
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


def test_cifar10_bad_image_in_the_tar_is_named(tmp_path: Path, refuses: Callable[..., Any]) -> None:
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


def test_synthetic_repeats_and_follows_the_seed(
    monkeypatch: pytest.MonkeyPatch, all_of: Callable[..., torch.Tensor]
) -> None:
    tenth = {k: tuple(c // 10 + 1 for c in counts) for k, counts in synthetic_derm.COUNTS.items()}
    monkeypatch.setattr(synthetic_derm, "COUNTS", tenth)  # 351 in train: more than one chunk
    first, again, other = (synthetic_derm.load(DataOptions(seed=s)) for s in (0, 0, 1))
    for part in ("train", "val", "test"):
        assert torch.equal(all_of(first, part), all_of(again, part))
        assert torch.equal(getattr(first, part).labels, getattr(again, part).labels)
        assert not torch.equal(all_of(first, part), all_of(other, part))


def test_synthetic_images_are_all_different_and_use_the_range(
    derm: Splits, all_of: Callable[..., torch.Tensor]
) -> None:
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


def test_synthetic_mean_colour_does_not_decide(
    derm: Splits, all_of: Callable[..., torch.Tensor]
) -> None:
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


def test_real_dermamnist(real_root: Path) -> None:
    if not (real_root / "dermamnist.npz").is_file():
        pytest.skip("no dermamnist.npz under the data root")
    splits = open_data("dermamnist", DataOptions(root=real_root))
    assert torch.bincount(splits.train.labels).tolist() == [228, 359, 769, 80, 779, 4693, 99]
    assert splits.image_shape == (3, 28, 28)
    assert splits.val is not None
    assert splits.test is not None
    assert (len(splits.val), len(splits.test)) == (1003, 2005)


def test_real_busi(real_root: Path) -> None:
    if not (real_root / "busi_128.npz").is_file():
        pytest.skip("no busi_128.npz under the data root")
    splits = open_data(str(real_root / "busi_128.npz"), DataOptions(image_size=32))
    parts = [p for p in (splits.train, splits.val, splits.test) if p is not None]
    assert torch.cat([p.labels for p in parts]).bincount().tolist() == [437, 210, 133]
    assert splits.image_shape == (1, 32, 32)


@pytest.mark.slow
def test_real_cifar10(real_root: Path) -> None:
    if not any((real_root / place).exists() for place in cifar10.PLACES):
        pytest.skip("no CIFAR-10 under the data root")
    splits = open_data("cifar10", DataOptions(root=real_root))
    assert splits.class_names == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    assert splits.image_shape == (3, 32, 32)
    assert splits.val is not None
    assert splits.test is not None
    assert torch.bincount(splits.train.labels).tolist() == [4500] * 10
    assert torch.bincount(splits.val.labels).tolist() == [500] * 10
    assert torch.bincount(splits.test.labels).tolist() == [1000] * 10


def test_joined_sets_are_read_when_asked_for(refuses: Callable[..., Any]) -> None:
    read: list[list[int]] = []

    class Told(ArrayImages):
        def take(self, indices: torch.Tensor) -> torch.Tensor:
            read.append(indices.tolist())
            return super().take(indices)

    def made(count: int, first: int, side: int = 2) -> ImageSet:
        pixels = torch.arange(first, first + count, dtype=torch.uint8)
        images = pixels.view(-1, 1, 1, 1).expand(-1, 1, side, side)
        return ImageSet(Told(images), torch.arange(count))

    joined = ImageSet.joined([made(3, 10), made(0, 0), made(4, 20)])
    assert joined.images.shape == (7, 1, 2, 2)
    assert joined.labels.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert read == []
    found = joined.images.take(torch.tensor([6, 0, 3, 6, 2]))
    assert found[:, 0, 0, 0].tolist() == [23, 10, 20, 23, 12]
    assert read == [[0, 2], [3, 0, 3]]
    part = joined.subset(torch.tensor([4, 1]))
    assert part.images.take(torch.tensor([1, 0]))[:, 0, 1, 1].tolist() == [11, 21]
    with refuses("joined must have one shape, got [(1, 2, 2), (1, 3, 3)]"):
        ImageSet.joined([made(1, 0), made(1, 0, side=3)])
