"""Segmentation from training to a verified file, with a U-Net of four channels."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

NETWORK = """
from sdq.models import resnet20, unet

def maps(num_classes, in_channels):
    return unet.build(num_classes, in_channels, width=4)

def two_maps(in_channels):
    return unet.build(2, in_channels, width=4)

def small_maps(num_classes, in_channels):
    from torch import nn
    return nn.Conv2d(in_channels, num_classes, 3)
"""
DATA = "--data synthetic_lesions_seg --image-size 16 --batch-size 100 --quiet"
KEYS = {"dice", "iou", "per_class_dice", "dice_nonempty", "hd95", "num_examples"}


@pytest.fixture(scope="module")
def home(tmp_path_factory, sdq) -> Path:
    home = tmp_path_factory.mktemp("segmentation")
    (home / "net.py").write_text(NETWORK)
    done = sdq(
        f"train --model {home / 'net.py'}:maps {DATA} --epochs 2 --lr 0.01 --out", home / "f"
    )
    assert done.code == 0, done.err
    done = sdq(
        f"quantize --from {home / 'f'} {DATA} --search-epochs 1 --epochs 1 --bits 3 --act-bits 6 "
        "--json --out", home / "q",
    )  # fmt: skip
    assert done.code == 0, done.err
    return home


def test_a_run_records_the_task_and_its_metrics(home):
    document = json.loads((home / "f" / "run.json").read_text())
    assert document["data"]["task"] == "segmentation"
    assert document["data"]["class_names"] == ["lesion"]
    metrics = json.loads((home / "f" / "metrics.json").read_text())
    assert set(metrics["float"]) == KEYS
    assert metrics["selected_by"] == "dice"
    assert metrics["float"]["num_examples"] == 160
    log = [json.loads(line) for line in (home / "f" / "log.jsonl").read_text().splitlines()]
    best = max(line["val_dice"] for line in log if "val_dice" in line)
    assert metrics["validation_score"] == pytest.approx(best)


def test_a_quantized_run_has_both_networks(home):
    metrics = json.loads((home / "q" / "metrics.json").read_text())
    assert set(metrics["quantized"]) == set(metrics["float"]) == KEYS
    assert metrics["avg_weight_bits"] <= 3
    assert 0.8 < metrics["agreement"] <= 1


def test_what_is_measured_again_is_the_same(home, sdq):
    done = sdq(f"evaluate {home / 'q'} --quiet --json")
    assert done.code == 0, done.err
    before = json.loads((home / "q" / "metrics.json").read_text())
    assert done.json["quantized"] == before["quantized"]
    assert done.json["agreement"] == before["agreement"]


def test_the_files_are_verified(home, sdq):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("qonnx")
    done = sdq(f"export {home / 'q'} --format onnx,qonnx --verify --samples 5 --json")
    assert done.code == 0, done.err
    for document in done.json["exports"]:
        report = document["verification"]
        assert report["verified"], document["summary"]
        assert report["exact"]["different"] == 0
        for stage in report["runtimes"]:
            assert stage["agreement"] > 0.998


def test_costs_and_a_page(home, sdq):
    assert sdq(f"cost {home / 'q'} --target pynq_z2 --quiet").code == 0
    done = sdq(f"report {home / 'q'} --out", home / "page.html")
    assert done.code == 0, done.err
    page = (home / "page.html").read_text()
    assert "Dice" in page
    pictures = re.findall(r'<image href="([^"]*)"', page)
    assert len(pictures) == 8
    assert all(picture.startswith("data:image/png;base64,") for picture in pictures)
    assert "8 of 160 test images" in page
    for network in ("float", "quantized"):
        assert len(re.findall(rf"{network}: \d+\xa0%", page)) == 8
    done = sdq(f"report {home / 'f'} --no-images --out", home / "page.html")
    assert done.code == 0, done.err
    assert "<image" not in (home / "page.html").read_text()
    assert "Pictures: the report was made with --no-images." in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["greedy", "hessian", "sensitivity", "interpolate", "random", "uniform"]
)
def test_every_search_method_takes_maps(home, sdq, method, tmp_path):
    done = sdq(
        f"search --from {home / 'f'} {DATA} --search-epochs 1 --bits 3 --choices 2,4 "
        f"--search-method {method} --json --out", tmp_path / method,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["avg_weight_bits"] <= 3


def test_without_labels_and_with_a_policy(home, sdq, tmp_path):
    done = sdq(
        f"quantize --from {home / 'f'} {DATA} --ptq --ptq-images 16 --ptq-steps 2 --policy "
        f"{home / 'q' / 'policy.json'} --act-bits 6 --json --out", tmp_path / "p",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert set(done.json["metrics"]["quantized"]) == KEYS
    # the graph has no cut that a skip does not cross, but at its ends
    assert 1 <= len(done.json["metrics"]["blocks"]) < 10


def test_the_network_decides_what_images_with_masks_and_labels_are_for(home, sdq, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {}
    for part in ("train", "val", "test"):
        images = rng.integers(0, 256, (12, 16, 16), dtype=np.uint8)
        arrays |= {f"{part}_images": images, f"{part}_masks": images > 99,
                   f"{part}_labels": np.arange(12) % 3}  # fmt: skip
    np.savez(tmp_path / "both.npz", **arrays)
    data = f"--data {tmp_path / 'both.npz'} --epochs 1 --quiet --json --out"
    masks = sdq(f"train --model {home / 'net.py'}:maps {data}", tmp_path / "m")
    assert set(masks.json["metrics"]["float"]) == KEYS
    labels = sdq(f"train --model mlp {data}", tmp_path / "l")
    assert len(labels.json["metrics"]["float"]["per_class_recall"]) == 3
    assert labels.json["metrics"]["selected_by"] == "auc"
    again = sdq(f"evaluate {tmp_path / 'l'} --quiet --json")
    assert again.json["float"] == labels.json["metrics"]["float"]
    quantized = sdq(
        f"quantize --from {tmp_path / 'l'} --data {tmp_path / 'both.npz'} --bits 3 --epochs 1 "
        "--search-epochs 1 --quiet --json --out", tmp_path / "lq",
    )  # fmt: skip
    assert "accuracy" in quantized.json["metrics"]["quantized"]


def refused(done) -> str:
    assert done.code == 2, done.err
    return " ".join(done.err.split())


def test_requests_that_do_not_fit_are_refused_before_training(home, sdq, tmp_path):
    net, out = home / "net.py", tmp_path / "never"
    said = refused(sdq(f"train --model {net}:two_maps {DATA} --out", out))
    assert "a map of logits, as large as the image, for each of 1 foreground classes" in said
    assert "got (2, 16, 16)" in said
    said = refused(sdq(f"train --model {net}:small_maps {DATA} --out", out))
    assert "got (1, 14, 14)" in said
    said = refused(sdq(f"train --model {net}:maps {DATA} --select auc --out", out))
    assert "--select: must be one of dice, iou, loss, last in segmentation, got 'auc'" in said
    said = refused(sdq(f"quantize --from {home / 'f'} {DATA} --bits 3 --select auc --out", out))
    assert "must be one of dice, iou, loss, last" in said
    said = refused(sdq("train --model mlp --data synthetic_derm --select dice --quiet --out", out))
    assert "must be one of auc, accuracy, balanced_accuracy, loss, last in classification" in said
    said = refused(
        sdq(f"quantize --from {home / 'f'} --data synthetic_derm --bits 3 --quiet --out", out)
    )
    assert "must be data for segmentation as in the run, got classification; give data with masks" \
        in said  # fmt: skip
    assert not out.exists()


def test_its_report_tells_of_pixels(home, sdq):
    done = sdq("report", home / "q", "--json", "--quiet")
    assert (done.code, done.json["missing"]) == (0, [])
    page = (home / "q" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    metrics = json.loads((home / "q" / "metrics.json").read_text())
    assert "marks in an image what is lesion" in page
    assert f"{100 * metrics['agreement']:.1f} % of the pixels" in page
    for network in ("float", "quantized"):
        assert f'<data value="{metrics[network]["dice"]}">' in page
    assert f"Dice went from {100 * metrics['float']['dice']:.1f} %" in page
    assert "class-table" not in page.partition("</style>")[2]
