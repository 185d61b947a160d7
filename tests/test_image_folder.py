"""Image sets of a folder: class folders, and images with a CSV in one of several layouts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sdq import image_rows
from sdq.data import ArrayImages, DataOptions, open_data
from sdq.datasets import dermoscopic4, ham10000, isic2018, isic2019
from sdq.errors import RequestError
from sdq.image_files import FileImages
from sdq.image_folder import read_folder
from sdq.npz_file import read_npz

OPTIONS = DataOptions()
RNG = np.random.default_rng(0)


def draw(path: Path, *shape: int, value: int | None = None) -> np.ndarray:
    """Write a lossless image and return its pixels."""
    noise = RNG.integers(0, 256, shape, dtype=np.uint8)
    array = noise if value is None else np.full(shape, value, np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return array


def table(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------------- class folders


def test_class_folders(tmp_path: Path, all_of: Callable[..., torch.Tensor]) -> None:
    kept = {}
    for part in ("train", "val", "test"):
        for name in ("b", "a"):
            for i, suffix in enumerate(("png", "bmp", "PNG")):
                kept[part, name, i] = draw(tmp_path / part / name / f"{i}.{suffix}", 6, 5, 3)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".cache").mkdir()
    draw(tmp_path / "train" / "a" / ".thumbnails" / "0.png", 6, 5, 3)
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("a", "b")
    assert splits.image_shape == (3, 6, 5)
    for part in ("train", "val", "test"):
        assert getattr(splits, part).labels.tolist() == [0, 0, 0, 1, 1, 1]
        expected = np.stack([kept[part, n, i] for n in "ab" for i in range(3)])
        np.testing.assert_array_equal(all_of(splits, part).permute(0, 2, 3, 1), expected)


def test_parts_may_be_spelled_with_capitals(tmp_path: Path) -> None:
    for part in ("Train", "Test", "VAL"):
        for name in ("b", "a"):
            draw(tmp_path / part / name / "0.png", 6, 5)
    splits = open_data(str(tmp_path), OPTIONS)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [2, 2, 2]


@pytest.mark.parametrize("lost", ["1.tif", "deeper/1.png", "1.webp"])
def test_images_that_would_be_left_out_are_named(
    lost: str, tmp_path: Path, refuses: Callable[..., Any]
) -> None:
    for name in ("b", "a"):
        draw(tmp_path / "train" / name / "0.png", 6, 5)
    file = tmp_path / "train" / "b" / lost
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"whatever")
    with refuses("b: its images must be .jpg, .jpeg, .png, .bmp files", f"got 1 others, {lost}"):
        open_data(str(tmp_path), OPTIONS)


def test_class_folders_train_alone_numbers_and_grey(tmp_path: Path) -> None:
    for name in ("10", "9", "2"):
        draw(tmp_path / "train" / name / "x.png", 4, 4)
    splits = open_data(str(tmp_path), OPTIONS)
    assert splits.class_names == ("2", "9", "10")
    assert splits.image_shape == (1, 4, 4)
    assert splits.val is None
    assert splits.test is None


def test_one_colour_image_makes_all_rgb(
    tmp_path: Path, all_of: Callable[..., torch.Tensor]
) -> None:
    grey = draw(tmp_path / "train" / "a" / "0.png", 4, 4)
    draw(tmp_path / "train" / "a" / "1.png", 4, 4, 3)
    got = all_of(open_data(str(tmp_path), OPTIONS), "train")
    assert got.shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(got[0], np.stack([grey] * 3))


def test_class_without_training_images(tmp_path: Path, refuses: Callable[..., Any]) -> None:
    draw(tmp_path / "train" / "a" / "0.png", 4, 4)
    draw(tmp_path / "test" / "b" / "0.png", 4, 4)
    with refuses("every class must have a training image, got none of b"):
        open_data(str(tmp_path), OPTIONS)


def test_sizes(
    tmp_path: Path, all_of: Callable[..., torch.Tensor], refuses: Callable[..., Any]
) -> None:
    draw(tmp_path / "train" / "a" / "0.png", 4, 8, value=90)
    draw(tmp_path / "train" / "a" / "1.png", 9, 7, value=30)
    with refuses("one size (H, W), got (4, 8) (0.png) and (9, 7) (1.png); pass --image-size S"):
        read_folder(tmp_path, OPTIONS)
    got = all_of(read_folder(tmp_path, DataOptions(image_size=6)), "train")
    assert got.shape == (2, 1, 6, 6)
    assert (got[0] == 90).all()
    assert (got[1] == 30).all()


def test_resize_is_the_same_for_files_and_arrays(
    tmp_path: Path, all_of: Callable[..., torch.Tensor]
) -> None:
    image = draw(tmp_path / "train" / "a" / "0.png", 20, 31, 3)
    path = tmp_path / "set.npz"
    np.savez(path, train_images=image[None], train_labels=np.array([0]))
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


def test_undecodable_files_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: Callable[..., Any]
) -> None:
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


def test_sixteen_bits_are_refused(tmp_path: Path, refuses: Callable[..., Any]) -> None:
    (tmp_path / "train" / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 9999, np.uint16)).save(tmp_path / "train" / "a" / "0.png")
    with refuses("0.png: pixels must be 8 bits, got mode 'I;16'; scale the image to 0..255"):
        read_folder(tmp_path, OPTIONS)


def test_folder_of_no_known_layout(tmp_path: Path, refuses: Callable[..., Any]) -> None:
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


def assert_lesions_stay_together(
    parts: list[torch.Tensor], folder: Path, lesion_of: dict[str, str]
) -> None:
    """Find every image again by its pixels, and its lesion by its name."""
    lesion = {np.asarray(Image.open(f)).tobytes(): lesion_of[f.stem] for f in folder.rglob("*.png")}
    seen = [{lesion[i.permute(1, 2, 0).numpy().tobytes()] for i in part} for part in parts]
    assert sum(len(s) for s in seen) == len(set.union(*seen)) == len(set(lesion_of.values()))


@pytest.mark.parametrize("name", ["HAM10000_metadata.csv", "HAM10000_metadata.tab"])
@pytest.mark.parametrize("seed", [0, 1])
def test_ham10000(
    tmp_path: Path, seed: int, name: str, all_of: Callable[..., torch.Tensor]
) -> None:
    folder = tmp_path / "ham10000"
    ham(folder, name, "\t" if name.endswith("tab") else ",")
    splits = ham10000.load(DataOptions(root=tmp_path, seed=seed))
    assert splits.class_names == ("mel", "nv")
    assert splits.vertical_flip
    parts = [len(p) for p in (splits.train, splits.val, splits.test) if p]
    assert parts == [42, 6, 12]  # 7, 1 and 2 of the ten lesions of each class, 3 images each
    images = [all_of(splits, part) for part in ("train", "val", "test")]
    assert_lesions_stay_together(images, folder, {f"ISIC_{i:07}": str(i // 3) for i in range(60)})


def test_ham10000_as_a_folder(tmp_path: Path, all_of: Callable[..., torch.Tensor]) -> None:
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


def test_isic2018_divided_by_lesion(tmp_path: Path, all_of: Callable[..., torch.Tensor]) -> None:
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
    images = [all_of(splits, part) for part in ("train", "val", "test")]
    assert_lesions_stay_together(
        images, folder, {f"ISIC_{i:07}": f"L{i % 7}_{i // 14}" for i in range(70)}
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


def test_isic2019_has_flambys_centres(tmp_path: Path) -> None:
    folder = tmp_path / "isic2019"
    names = CLASSES_2019.split(",")[:8]
    isic(folder, "ISIC_2019_Training", CLASSES_2019, names * 2)
    lesions = ["BCN_0000001", "HAM_0000001", "MSK4_0000001", "HAM_0000002", ""]
    table(
        folder / "ISIC_2019_Training_Metadata.csv",
        "image,lesion_id",
        *(f"ISIC_{i:07},{lesions[i % 5]}{i if lesions[i % 5] else ''}" for i in range(16)),
    )
    splits = isic2019.load(DataOptions(root=tmp_path, split=(1, 0, 0)))
    assert splits.centre_names == ("BCN", "HAM", "MSK4")
    assert splits.train.centres is not None
    assert splits.train.centres.tolist() == [(0, 1, 2, 1, -1)[i % 5] for i in range(16)]
    sources = [f"ISIC_{i:07},{'rosendahl' if i % 5 == 1 else 'vidir_modern'}" for i in range(16)]
    table(folder / "HAM10000_metadata.csv", "image_id,dataset", *sources)
    splits = isic2019.load(DataOptions(root=tmp_path, split=(1, 0, 0)))
    assert splits.centre_names == ("BCN", "MSK4", "rosendahl", "vidir_modern")
    assert splits.train.centres is not None
    assert splits.train.centres.tolist() == [(0, 2, 1, 3, -1)[i % 5] for i in range(16)]


def test_isic2019_has_flambys_split(tmp_path: Path) -> None:
    """The file has every centre by number and every part; what it leaves out is left out."""
    folder = tmp_path / "isic2019"
    names = CLASSES_2019.split(",")[:8]
    isic(folder, "ISIC_2019_Training", CLASSES_2019, names * 3)
    rows = [f"ISIC_{i:07},{i % 6},{'test' if i >= 16 else 'train'}" for i in range(22)]
    table(folder / "train_test_split", "image,center,fold", *rows)
    splits = isic2019.load(DataOptions(root=tmp_path))
    assert splits.test is not None
    assert (len(splits.train), len(splits.test), splits.val) == (16, 6, None)
    assert splits.train.centres is not None
    of = [splits.centre_names[c] for c in splits.train.centres.tolist()]
    assert of == [isic2019.CENTRES[i % 6] for i in range(16)]
    table(folder / "train_test_split", "image,center,fold", "ISIC_0000001,6,train")
    with pytest.raises(RequestError, match="center must be from 0 to 5, got '6'"):
        isic2019.load(DataOptions(root=tmp_path))


def test_a_centre_column_names_centres(tmp_path: Path) -> None:
    for i in range(4):
        draw(tmp_path / f"{i}.png", 4, 4)
    rows = [f"{i},{'xy'[i % 2]},{'ba'[i // 2]}" for i in range(4)]
    table(tmp_path / "t.csv", "image,label,hospital", *rows)
    splits = open_data(str(tmp_path), DataOptions(split=(1, 0, 0)))
    assert splits.centre_names == ("a", "b")
    assert splits.train.centres is not None
    assert splits.train.centres.tolist() == [1, 1, 0, 0]
    assert splits.train.names == ("0.png", "1.png", "2.png", "3.png")


def test_dermoscopic4_is_nevi_keratoses_and_melanomas(tmp_path: Path) -> None:
    folder = tmp_path / "dermoscopic4"
    for i in range(12):
        draw(folder / "images" / f"ISIC_{i}.png", 4, 4)
    rows = [
        f"ISIC_{i},{dermoscopic4.CLASS_NAMES[i % 3]},{'AB'[i // 6]},{'test' if i % 2 else 'train'}"
        for i in range(12)
    ]
    table(folder / "dermoscopic4.csv", "image,label,client,split", *rows)
    splits = dermoscopic4.load(DataOptions(root=tmp_path))
    assert splits.class_names == ("nv", "bkl", "mel")
    assert splits.centre_names == ("A", "B")
    assert splits.train.labels.tolist() == [0, 2, 1, 0, 2, 1]
    table(folder / "dermoscopic4.csv", "image,label,client,split", *rows[:-1], "ISIC_11,bcc,B,test")
    with pytest.raises(RequestError, match="classes must be nv, bkl, mel, got 'bcc'"):
        dermoscopic4.load(DataOptions(root=tmp_path))


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


def test_generic_split_column(
    tmp_path: Path, all_of: Callable[..., torch.Tensor], refuses: Callable[..., Any]
) -> None:
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


@pytest.mark.parametrize("column", ["patient_id", "patient", "lesion_id"])
def test_a_patient_stays_in_one_part(tmp_path: Path, column: str) -> None:
    rows = []
    for i in range(60):  # a patient's images are equal
        draw(tmp_path / f"{i}.png", 4, 4, value=i // 6)
        rows.append(f"{i},{'ab'[i % 2]},p{i // 6}")
    table(tmp_path / "t.csv", f"image,label,{column}", *rows)
    splits = open_data(str(tmp_path), DataOptions(split=(0.5, 0.2, 0.3)))
    assert splits.val is not None
    assert splits.test is not None
    seen = []
    for part in (splits.train, splits.val, splits.test):
        seen.append(set(part.images.take(torch.arange(len(part)))[:, 0, 0, 0].tolist()))
    assert list(map(len, seen)) == [5, 2, 3]
    assert len(set.union(*seen)) == 10


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
        ("image,label", ["0,1.0", "1,1.25"], ["label must name a class", "such as '1.25'"]),
        ("image,label,split", ["0,a,train", "1,b"], ["split must be train, val or test, got ''"]),
        ("image,label", [], ["the set must have at least one image, got none"]),
    ],
)
def test_csv_refuses(
    tmp_path: Path, header: str, rows: list[str], fragments: list[str], refuses: Callable[..., Any]
) -> None:
    for name in ("0.png", "1.png", "a/twin.png", "b/twin.png"):
        draw(tmp_path / name, 4, 4)
    table(tmp_path / "t.csv", header, *rows)
    with refuses(*fragments):
        open_data(str(tmp_path), OPTIONS)


def test_csv_of_another_encoding(tmp_path: Path, refuses: Callable[..., Any]) -> None:
    draw(tmp_path / "0.png", 4, 4)
    (tmp_path / "t.csv").write_bytes("image,label\n0,naevus pigmenté\n".encode("latin-1"))
    with refuses("t.csv: must be a CSV in UTF-8, got", "save it again"):
        open_data(str(tmp_path), OPTIONS)


def test_named_table_without_an_image_column(tmp_path: Path, refuses: Callable[..., Any]) -> None:
    table(tmp_path / "ham10000" / "HAM10000_metadata.csv", "imag,dx", "0,nv")
    with refuses("no image column; did you mean 'imag'?"):
        ham10000.load(DataOptions(root=tmp_path))
