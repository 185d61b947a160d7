"""``SPLIT.csv``: rows find their images, also where files of several folders have one name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sdq.data import DataOptions, Splits, open_data
from sdq.errors import RequestError
from sdq.split_file import apply_split_file

OPTIONS = DataOptions()


def draw(path: Path, value: int, side: int = 4) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), value, np.uint8)).save(path)


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(["file,client,split", *rows, ""]))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes whose files have the same names, in two parts."""
    for part, start in (("train", 0), ("test", 100)):
        for name, more in (("dark", 0), ("light", 10)):
            for i in range(3):
                draw(tmp_path / "photos" / part / name / f"{i}.png", start + more + i)
    draw(tmp_path / "photos" / "train" / "dark" / "alone.png", 50)
    return tmp_path / "photos"


def values(splits: Splits, part: str, all_of: Callable[..., Any]) -> list[int]:
    return [int(image[0, 0, 0]) for image in all_of(splits, part)]


def test_images_of_one_name_are_told_apart_by_their_folders(
    photos: Path, tmp_path: Path, all_of: Callable[..., Any]
) -> None:
    file = table(
        tmp_path / "SPLIT.csv", "train/dark/0.png,a,train", "train/light/0.png,b,train",
        "train/dark/1.png,b,val", "test/light/2.png,a,test", "alone,a,train",
    )  # fmt: skip
    found = apply_split_file(file, open_data(str(photos), OPTIONS))
    assert values(found, "train", all_of) == [0, 10, 50]
    assert found.train.labels.tolist() == [0, 1, 0]
    assert found.train.centres is not None
    assert found.train.centres.tolist() == [0, 1, 0]
    assert values(found, "val", all_of) == [1]
    assert values(found, "test", all_of) == [112]


@pytest.mark.parametrize("name", ["0", "0.png", "elsewhere/0.png"])
def test_a_name_of_several_files_is_refused(photos: Path, tmp_path: Path, name: str) -> None:
    file = table(tmp_path / "SPLIT.csv", "alone,a,train", f"{name},a,train")
    expected = rf"row 3: image '{name}' must be one file, got train/dark/0.png, train/light/0.png"
    with pytest.raises(RequestError, match=expected):
        apply_split_file(file, open_data(str(photos), OPTIONS))


def test_a_table_beside_masks_says_which_image_it_means(tmp_path: Path) -> None:
    for part in ("train", "test"):
        for name in ("0", "1"):
            draw(tmp_path / part / "images" / f"{name}.png", 9)
            draw(tmp_path / part / "masks" / f"{name}.png", 255)
    (tmp_path / "images.csv").write_text(
        "image,centre\ntrain/images/0.png,a\ntrain/images/1.png,b\ntest/images/0.png,b\n"
    )
    found = open_data(str(tmp_path), OPTIONS)
    assert found.centre_names == ("a", "b")
    assert found.train.centres is not None
    assert found.train.centres.tolist() == [0, 1]
    assert found.test is not None
    assert found.test.centres is not None
    assert found.test.centres.tolist() == [1, -1]
    (tmp_path / "images.csv").write_text("image,centre\n0,a\n")
    with pytest.raises(RequestError, match=r"must be one file, got test/images/0.png, train/ima"):
        open_data(str(tmp_path), OPTIONS)
