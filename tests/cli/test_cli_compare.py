"""``sdq compare``: figures are those of the runs, and other data are refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdq.report.intervals import Paired


def read(path):
    return json.loads(path.read_text())


def test_runs_beside_each_other(sdq, derm):
    done = sdq(f"compare {derm / 'quantized'} {derm / 'float'} --json")
    assert (done.code, done.err) == (0, "")
    assert done.json["same_data"] is True
    first, second = done.json["runs"]
    metrics = read(derm / "quantized" / "metrics.json")
    assert first["metrics"] == metrics["quantized"]
    assert second["metrics"] == metrics["float"]  # of the same network
    for name in ("weight_bytes", "bops"):
        assert first[name] == metrics[name]
    assert first["bits"] == metrics["avg_weight_bits_all"]
    for name in ("accuracy", "auc", "ece"):
        assert second["difference"][name] == pytest.approx(
            metrics["float"][name] - metrics["quantized"][name]
        )
    found = load_file(derm / "quantized" / "predictions.safetensors")
    right = [found[k].argmax(1) == found["labels"] for k in ("quantized", "float")]
    cells = [(a & b).sum() for a in (right[0], ~right[0]) for b in (right[1], ~right[1])]
    interval = Paired(*map(int, cells)).interval()
    assert second["accuracy_interval"] == pytest.approx([-interval.high, -interval.low])
    low, high = second["accuracy_interval"]
    assert low < second["difference"]["accuracy"] < high
    assert f"{metrics['float']['accuracy']:.4f}" in done.out


def test_methods_of_a_federation(sdq, pages):
    fed = pages["federated"].parent
    done = sdq(f"compare {fed} {fed / 'fca'} --json --quiet")
    assert [r["run"] for r in done.json["runs"]] == [
        str(fed / "fedavg"), str(fed / "fca"), str(fed / "fca")
    ]  # fmt: skip
    wanted = read(fed / "fca" / "metrics.json")["float"]
    assert done.json["runs"][1]["metrics"] == done.json["runs"][2]["metrics"] == wanted


def test_a_device_and_a_page(sdq, derm, tmp_path):
    page = tmp_path / "compared.html"
    runs = f"{derm / 'quantized'} {derm / 'quantized'}"
    done = sdq(f"compare {runs} --target bit_fusion --html {page} --json")
    cost = sdq(f"cost {derm / 'quantized'} --target bit_fusion --json --quiet").json["total"]
    assert [r["latency_s"] for r in done.json["runs"]] == [cost["latency_s"]] * 2
    assert f'value="{cost["latency_s"]}"' in page.read_text()


def test_other_data(sdq, derm, files, tmp_path):
    runs = f"{derm / 'quantized'} {files / 'quantized'}"
    done = sdq(f"compare {runs} --json")
    assert (done.code, done.out) == (2, "")
    assert "were measured on different images" in done.err
    assert "--different-data" in done.err
    page = tmp_path / "page.html"
    done = sdq(f"compare {runs} --different-data --json --html {page}")
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert done.json["same_data"] is False
    assert all("difference" not in run for run in done.json["runs"])
    assert "cannot be compared" in page.read_text()
    assert "points" not in done.out


def test_other_labels_have_no_interval(sdq, derm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(derm / "quantized", run)
    tensors = load_file(run / "predictions.safetensors")
    save_file(tensors | {"labels": torch.zeros_like(tensors["labels"])},
              run / "predictions.safetensors")  # fmt: skip
    done = sdq(f"compare {derm / 'quantized'} {run} --json --quiet")
    assert "accuracy_interval" not in done.json["runs"][1]


def test_requests_that_cannot_be_met(sdq, derm, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(derm / "float", run)
    document = read(run / "run.json")
    (run / "run.json").write_text(json.dumps(document | {"status": "running"}))
    for command, message in (
        (f"compare {derm / 'float'}", "must have two runs or more"),
        (f"compare {derm / 'float'} {tmp_path}", "must be a run folder"),
        (f"compare {derm / 'float'} {run}", "continue it with --resume"),
        (f"compare {derm / 'float'} {derm / 'float'} --fps 3", "must stand with --target"),
    ):
        done = sdq(command)
        assert (done.code, done.out) == (2, "")
        assert message in done.err
    del document["data"]
    (run / "run.json").write_text(json.dumps(document))
    assert "its files must be as sdq wrote them" in sdq(f"compare {derm / 'float'} {run}").err
