"""``sdq federate`` with masks: what clients know, what is written of them, and what is refused."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

MODEL = """
from torch import nn

def build(num_classes, in_channels=1):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, num_classes, 1)
    )
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A network that gives maps, and images of a bright square with its mask."""
    home = tmp_path_factory.mktemp("masks")
    (home / "net.py").write_text(MODEL)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 24), ("val", 6), ("test", 9)):
        masks = np.zeros((count, 8, 8), np.uint8)
        masks[:, 2:6, 3:7] = 1
        images = rng.normal(60, 20, masks.shape) + 140 * masks
        arrays[f"{part}_images"] = images.clip(0, 255).astype(np.uint8)
        arrays[f"{part}_masks"] = masks
    np.savez(home / "d.npz", **arrays)
    return (
        f"federate --rounds 2 --batch-size 8 --quiet --json --lr 0.01 --model {home}/net.py:build "
        f"--data {home}/d.npz --clients 3"
    )


def test_a_run_says_what_clients_know(sdq, command, tmp_path):
    found = sdq(
        f"{command} --method fedmix_seg,fedst,fedavg_labelled --supervision pixel,box,none "
        f"--hyper fedmix_seg.agreement=0.5 --out {tmp_path}/run"
    )
    assert found.code == 0, found.err
    methods = json.loads(found.out.splitlines()[-1])["metrics"]["methods"]
    for name, metrics in methods.items():
        document = json.loads((tmp_path / "run" / name / "run.json").read_text())
        known = [c["supervision"] for c in document["clients"]]
        assert known == ["pixel", "box", "none"]
        assert "class_counts" not in document["clients"][0]
        # who has no masks chooses no round by them
        assert ["val" in c["num_examples"] for c in document["clients"]] == [True, False, False]
        assert document["request"]["supervision"] == "pixel,box,none"
        server, own = metrics["generalization"], metrics["specialization"]
        assert set(server["clients"]) == set(own["clients"]) == {"0", "1", "2"}
        each = [c["dice"] for c in server["clients"].values()]
        assert server["client_mean"]["dice"] == pytest.approx(np.mean(each))
        assert own["worst_dice"] == min(c["dice"] for c in own["clients"].values())


def test_masks_for_all_without_the_option(sdq, command, tmp_path):
    found = sdq(f"{command} --method fedavg --out {tmp_path}/run")
    assert found.code == 0, found.err
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [c["supervision"] for c in document["clients"]] == ["pixel"] * 3
    worst = json.loads((tmp_path / "run" / "metrics.json").read_text())["specialization"]
    assert sdq(f"report {tmp_path}/run").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "each client&#39;s own network" in page
    assert f"{100 * worst['worst_dice']:.1f}" in page


def test_outlines_of_several_methods(sdq, command, tmp_path):
    found = sdq(f"{command} --method local,fedavg,fedst,fedrgd,fedprox --out {tmp_path}/run")
    assert found.code == 0, found.err
    assert sdq(f"report {tmp_path}/run --quiet").code == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "8 of 9 test images" in page
    assert page.count('<image href="data:image/png;base64,') == 8
    assert page.count("<title>truth</title>") == 8
    for drawn in ("fedavg", "fedst", "fedrgd"):
        assert len(re.findall(rf"^{drawn}: ", page, re.MULTILINE)) == 8
    assert not re.findall(r"^(fedprox|local): ", page, re.MULTILINE)
    assert "Outlines of fedprox: those of fedavg, fedst, fedrgd are shown." in page
    assert "Outlines of local: it has no model of the server&#39;s." in page


def test_no_outlines_on_images_that_clients_trained_on(sdq, command, tmp_path):
    """Without test images of the set each client holds some out, and the report knows none."""
    home = Path(command.split("--data ")[1].split()[0])
    with np.load(home) as arrays:
        kept = {name: arrays[name] for name in ("train_images", "train_masks")}
    np.savez(tmp_path / "train.npz", **kept)
    asked = command.replace(str(home), str(tmp_path / "train.npz"))
    found = sdq(f"{asked} --method fedavg --out {tmp_path}/run")
    assert found.code == 0, found.err
    done = sdq(f"report {tmp_path}/run")
    assert done.code == 0, done.err
    assert "Pictures of test images: the data have no test part of their own." in done.out
    assert "<image" not in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--method fedmix_seg --supervision pixel,box", "one level for each of 3 clients"),
        ("--method fedmix_seg --supervision pixel,box,boxes", "got 'boxes'; did you mean 'box'?"),
        ("--method fedmix_seg --supervision box,image,none", "must have supervision pixel, got"),
        ("--method fedprox --supervision pixel,box,image", "got box at 'client 1'; use a method"),
        ("--method fedmix --supervision pixel,box,image", "did you mean 'fedmix_seg'?"),
        ("--method fca", "fca: is for classification, got segmentation"),
        ("--method fedavg --loss focal", "--loss: must be one of dice_bce, dice in segmentation"),
        ("--method fedavg --select specialization --adjust 1", "--adjust: must be 0"),
        ("--method fedavg --sampling balanced", "--sampling: must be all in segmentation"),
    ],
)
def test_refusals(sdq, command, tmp_path, options, message):
    found = sdq(f"{command} {options} --out {tmp_path}/run")
    assert found.code == 2
    assert message in found.err
    assert not (tmp_path / "run").exists()


def test_supervision_is_of_masks(sdq, tmp_path):
    found = sdq(
        "federate --rounds 1 --model mlp --data synthetic_derm --method fedavg --partition natural "
        f"--supervision pixel,box,image,none --out {tmp_path}/run --quiet"
    )
    assert found.code == 2
    assert "--supervision: data must have masks, got classification" in found.err


def test_who_has_no_masks_does_not_train_on_them_later(sdq, command, tmp_path):
    """Bits of a client's own model are not learned from masks that it was said not to have."""
    run = tmp_path / "run"
    done = sdq(
        f"{command} --method fedmix_seg --supervision pixel,box,none --keep-clients --out {run}"
    )
    assert done.code == 0, done.err
    weak = run / "clients" / "client_2"
    data = command.partition("--data ")[2].split()[0]
    start = f"quantize --from {weak} --data {data} --bits 8"
    refused = sdq(f"{start} --epochs 1 --out {tmp_path}/q")
    assert refused.code == 2
    assert "train must have a mask an image, got none" in refused.err
    assert not (tmp_path / "q").exists()
    assert sdq(f"evaluate {weak}").code == 0
    after = sdq(f"{start} --ptq --ptq-steps 2 --out {tmp_path}/p")
    assert after.code == 0, after.err
