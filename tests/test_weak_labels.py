"""Boxes drawn around masks, and boxes from files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdq.weak_labels import Box, BoxedImage, box_masks, classes_present, read_coco, read_voc


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def extent(mask: Tensor) -> tuple[int, int, int, int]:
    """Return the first and last row and column of a mask ``(H, W)``."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def test_without_margin_a_box_is_the_smallest() -> None:
    mask = torch.zeros(1, 1, 8, 9, dtype=torch.uint8)
    mask[0, 0, 2, 3] = mask[0, 0, 5, 6] = 1
    found = box_masks(mask, rng(), (0, 0))
    assert found.dtype == torch.uint8
    expected = torch.zeros(1, 1, 8, 9, dtype=torch.uint8)
    expected[0, 0, 2:6, 3:7] = 1
    assert torch.equal(found, expected)


def test_each_side_has_a_margin_of_its_own() -> None:
    masks = torch.zeros(400, 1, 64, 64, dtype=torch.uint8)
    masks[:, :, 30:33, 30:33] = 1
    found = box_masks(masks, rng())
    margins = torch.tensor([
        (30 - top, bottom - 32, 30 - left, right - 32)
        for top, bottom, left, right in (extent(mask[0]) for mask in found)
    ])  # fmt: skip
    for side in margins.T:
        assert sorted(set(side.tolist())) == list(range(1, 10))
    # independent: no two sides of the four are the same draws
    assert len({tuple(side.tolist()) for side in margins.T}) == 4
    assert torch.equal(found, box_masks(masks, rng()))
    assert not torch.equal(found, box_masks(masks, rng(1)))


def test_a_box_ends_at_the_edge() -> None:
    mask = torch.zeros(1, 1, 6, 7, dtype=torch.uint8)
    mask[0, 0, 0, 6] = 1
    assert box_masks(mask, rng(), (9, 9)).bool().all()
    assert extent(box_masks(mask, rng(), (2, 2))[0, 0]) == (0, 2, 4, 6)


def test_every_class_has_a_map_and_an_absent_one_no_box() -> None:
    masks = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    masks[0, 0, 1:4, 1:4], masks[0, 0, 3, 3], masks[1, 0, 6, 6] = 1, 3, 3
    found = box_masks(masks, rng(), (0, 0), classes=3)
    assert found.shape == (2, 3, 8, 8)
    assert extent(found[0, 0]) == (1, 3, 1, 3)  # boxes of two classes overlap
    assert extent(found[0, 2]) == (3, 3, 3, 3)
    assert not found[:, 1].any()
    assert classes_present(masks, 3).tolist() == [[True, False, True], [False, False, True]]
    assert torch.equal(found.flatten(2).any(2), classes_present(masks, 3))


def coco(path: Path, **changed: Any) -> Path:
    annotation = {"image_id": 7, "category_id": 2, "bbox": [1, 2, 3, 1.5], **changed}
    document = {
        "images": [{"id": 7, "file_name": "a/one.png", "height": 6, "width": 8},
                   {"id": 9, "file_name": "two.png", "height": 6, "width": 8}],
        "categories": [{"id": 1, "name": "cyst"}, {"id": 2, "name": "mass"}],
        "annotations": [annotation],
    }  # fmt: skip
    path.write_text(json.dumps(document))
    return path


def test_coco_boxes(tmp_path: Path) -> None:
    found = read_coco(coco(tmp_path / "boxes.json"))
    assert set(found) == {"one", "two"}
    assert found["two"].boxes == ()
    assert found["one"] == BoxedImage("one", (6, 8), (Box("mass", 1, 2, 4, 4),))
    mask = found["one"].masks(("cyst", "mass"))
    assert mask.shape == (2, 6, 8)
    assert not mask[0].any()
    assert extent(mask[1]) == (2, 3, 1, 3)
    # as the image is resized: the shorter side doubled, the centre square cut out
    assert extent(found["one"].masks(("mass",), side=12)[0]) == (4, 7, 0, 5)


@pytest.mark.parametrize(
    "bbox", [[6, 0, 3, 2], [0, 5, 1, 2], [-1, 0, 2, 2], [1, 1, 0, 2], [0, 0, float("nan"), 1]]
)
def test_a_coco_box_outside_its_image_is_refused(tmp_path: Path, refuses: Any, bbox: Any) -> None:
    with refuses("annotation 0 (a/one.png): a box must have pixels and lie inside the image",
                 "(6 x 8)", "mend or remove it"):  # fmt: skip
        read_coco(coco(tmp_path / "boxes.json", bbox=bbox))


def test_other_wrong_coco_files(tmp_path: Path, refuses: Any) -> None:
    with refuses("must be a COCO file", "FileNotFoundError"):
        read_coco(tmp_path / "no.json")
    with refuses("must be a COCO file", "KeyError: 3"):
        read_coco(coco(tmp_path / "boxes.json", category_id=3))
    (tmp_path / "list.json").write_text("[]")
    with refuses("must be a COCO file", "TypeError"):
        read_coco(tmp_path / "list.json")
    found = read_coco(coco(tmp_path / "boxes.json"))["one"]
    with refuses("one: the class of a box must be one of cyst, massa, got 'mass'"):
        found.masks(("cyst", "massa"))


@pytest.mark.parametrize("height", [0, -3, 10**8])
def test_a_size_that_no_image_has_is_refused(tmp_path: Path, refuses: Any, height: int) -> None:
    path = coco(tmp_path / "boxes.json")
    path.write_text(path.read_text().replace('"height": 6', f'"height": {height}'))
    with refuses("boxes.json: an image must have 1 to 134217728 pixels", "mend its height"):
        read_coco(path)
    xml = voc(tmp_path / "x.xml", BOX)
    xml.write_text(xml.read_text().replace(">6</height", f">{height}</height"))
    with refuses("x.xml: an image must have 1 to 134217728 pixels"):
        read_voc(xml)


@pytest.mark.parametrize("wrong", ["1e999", "NaN", '"' + "a" * 5000 + '"', "[]", "{}", "null"])
def test_numbers_that_are_none_are_refused_in_a_sentence(
    tmp_path: Path, refuses: Any, wrong: str
) -> None:
    path = coco(tmp_path / "boxes.json")
    path.write_text(path.read_text().replace('"height": 6', f'"height": {wrong}'))
    with refuses("boxes.json: must be a COCO file", "mend the file") as error:
        read_coco(path)
    assert len(str(error.value)) < 500
    with refuses("x.xml: must be a Pascal VOC file", "mend the file") as error:
        read_voc(voc(tmp_path / "x.xml", BOX.replace(">2<", f">{wrong.strip(chr(34))}<")))
    assert len(str(error.value)) < 500


def test_a_document_nested_too_deep_is_refused(tmp_path: Path, refuses: Any) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with refuses("deep.json: must be a COCO file", "RecursionError"):
        read_coco(tmp_path / "deep.json")


def voc(path: Path, box: str, name: str = "<filename>one.jpg</filename>") -> Path:
    path.write_text(
        f"<annotation>{name}<size><width>8</width><height>6</height><depth>3</depth></size>"
        f"<object><name>mass</name><bndbox>{box}</bndbox></object></annotation>"
    )
    return path


BOX = "<xmin>2</xmin><ymin>3</ymin><xmax>4</xmax><ymax>4</ymax>"


def test_voc_boxes_count_from_one_and_end_inside(tmp_path: Path) -> None:
    """The rectangle of the COCO file above."""
    expected = BoxedImage("one", (6, 8), (Box("mass", 1, 2, 4, 4),))
    assert read_voc(voc(tmp_path / "x.xml", BOX)) == expected
    assert read_voc(voc(tmp_path / "one.xml", BOX, name="")) == expected


def test_wrong_voc_files(tmp_path: Path, refuses: Any) -> None:
    with refuses("object 0: a box must have pixels and lie inside the image (6 x 8)"):
        read_voc(voc(tmp_path / "x.xml", BOX.replace(">4</xmax", ">9</xmax")))
    with refuses("object 0: a box must have pixels and lie inside"):  # 0 is no pixel there
        read_voc(voc(tmp_path / "x.xml", BOX.replace(">2</xmin", ">0</xmin")))
    with refuses("must be a Pascal VOC file", "no bndbox/xmin"):
        read_voc(voc(tmp_path / "x.xml", ""))
    (tmp_path / "x.xml").write_text("<annotation>")
    with refuses("must be a Pascal VOC file", "ParseError"):
        read_voc(tmp_path / "x.xml")
