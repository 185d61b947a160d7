"""The run folder: one process at a time, whole files, and a resume of the same request only."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from sdq.checkpoint import load_tensors, save_tensors, write_bytes_atomically
from sdq.data import ArrayImages, ImageSet, Splits
from sdq.errors import RequestError, RunError
from sdq.layers import LayerSpec
from sdq.report.tables import METRICS
from sdq.run_document import check_metrics
from sdq.run_folder import SCHEMA, RunFolder, fingerprint, read_layers, versions


def refuses(*fragments: str) -> "pytest.RaisesExc[RequestError]":
    return pytest.raises(RequestError, match=".*".join(re.escape(f) for f in fragments))


REQUEST: dict[str, Any] = {"verb": "train", "model": "mlp", "epochs": 3, "split": (0.7, 0.1, 0.2)}


def create(path: Path, *, resume: bool = False, **changes: Any) -> RunFolder:
    return RunFolder.create(path, {**REQUEST, **changes}, resume=resume)


# --------------------------------------------------------------------------------- make and open


def test_a_new_run_says_what_was_asked(tmp_path: Path) -> None:
    with create(tmp_path / "deep" / "run") as run:
        document = run.read_json("run.json")
    assert document["schema"] == SCHEMA == "sdq.run/1"
    assert document["status"] == "running"
    assert document["request"] == {**REQUEST, "split": [0.7, 0.1, 0.2]}
    assert document["versions"] == versions()
    assert set(versions()) >= {"python", "platform", "sdq", "torch", "brevitas", "numpy"}
    assert not run.done
    run.update(status="done", seed=3)
    assert run.done
    assert RunFolder.open(run.path).read_json("run.json")["seed"] == 3


def test_an_empty_folder_will_do_and_a_full_one_will_not(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with create(empty):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("text")
    with refuses("--out: folder must be new or empty", "pass --resume to continue"):
        create(tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "text"
    (tmp_path / "file").write_text("text")
    with refuses("--out: folder must be new or empty"):
        create(tmp_path / "file")
    with refuses("--out: folder must be new or empty"):
        create(empty)


def test_a_run_is_held_by_one_process(tmp_path: Path) -> None:
    held = refuses("another sdq process is working in this folder; wait for it")
    with create(tmp_path / "run"), held:
        create(tmp_path / "run", resume=True)
    code = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with refuses("another sdq process is working in this folder; wait for it"):
            create(tmp_path / "run", resume=True)
        other.kill()
        other.wait()
        with create(tmp_path / "run", resume=True):
            pass  # a killed process holds nothing


def test_a_crash_releases_the_run(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create(tmp_path / "run"):
        raise ZeroDivisionError
    with create(tmp_path / "run", resume=True) as run:
        assert run.read_json("run.json")["status"] == "running"


def test_resume_asks_for_the_same_request(tmp_path: Path) -> None:
    with refuses("--resume: no run to continue in", "start without --resume"):
        create(tmp_path / "run", resume=True)
    with create(tmp_path / "run") as run:
        run.log({"epoch": 1})
    with create(tmp_path / "run", resume=True):
        pass  # the tuple of REQUEST equals the list in the file
    with refuses("--resume: epochs must be as in the interrupted run, 3, got 4"):
        create(tmp_path / "run", resume=True, epochs=4)
    with refuses("--resume: extra must be as in the interrupted run, None, got 1"):
        create(tmp_path / "run", resume=True, extra=1)
    assert (tmp_path / "run" / "log.jsonl").read_text() == '{"epoch": 1}\n'


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with refuses("must be a run folder, but has no run.json"):
        RunFolder.open(tmp_path)
    with refuses("must be a run folder, but has no run.json"):
        RunFolder.open(tmp_path / "nothing")
    (tmp_path / "run.json").write_text('{"schema": "sdq.run/2"}')
    with refuses("run.json: schema must be 'sdq.run/1', got 'sdq.run/2'", "another version"):
        RunFolder.open(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[1]", b"null", b"[" * 100_000])
def test_a_damaged_json_file_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "run.json").write_bytes(text)
    with refuses("run.json: must be"):
        RunFolder.open(tmp_path)


# ------------------------------------------------------------------------------------------ files


def test_json_and_log(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        run.write_json("metrics.json", {"float": {"accuracy": 0.5, "auc": None}})
        assert run.read_json("metrics.json") == {"float": {"accuracy": 0.5, "auc": None}}
        with pytest.raises(RunError, match=r"metrics\.json: numbers must be finite"):
            run.write_json("metrics.json", {"accuracy": float("nan")})
        assert run.read_json("metrics.json") == {"float": {"accuracy": 0.5, "auc": None}}
        for epoch in range(3):
            run.log({"epoch": epoch})
        with pytest.raises(RunError, match=r"log\.jsonl: numbers must be finite"):
            run.log({"epoch": 3, "bin_loss": float("inf")})
    lines = (run.path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


def test_tensors_round_trip_to_the_bit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    shared = torch.randn(4, 6)
    tensors = {
        "a": shared, "view": shared[1:], "turned": shared.t(), "half": shared.half(),
        "wide": shared.double(), "flag": torch.tensor(True), "count": torch.tensor(3),
        "last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }  # fmt: skip
    run.write_tensors("model.safetensors", tensors)
    found = run.read_tensors("model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    save_tensors(tmp_path / "m.safetensors", {"a": shared}, {"epochs": "3"})
    assert load_tensors(tmp_path / "m.safetensors")[1] == {"epochs": "3"}


def test_absent_or_damaged_tensors_are_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with refuses("weights: no file", "model.safetensors"):
        run.read_tensors("model.safetensors")
    with refuses("weights: no file"):
        load_tensors(tmp_path)
    run.write_tensors("model.safetensors", {"a": torch.ones(3)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for damaged in (whole[:-1], whole[:9], b"", b"\x80\x04K\x01.", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with refuses("model.safetensors: must be a whole safetensors file", "write it anew"):
            run.read_tensors("model.safetensors")


def test_an_interrupted_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a" / "file.json"
    write_bytes_atomically(file, b"old")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_bytes_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in file.parent.iterdir()] == ["file.json"]
    write_bytes_atomically(file, b"new")
    assert file.read_bytes() == b"new"


SPECS = (
    LayerSpec("conv", "conv2d", (4, 3, 3, 3), (3, 8, 8), (4, 8, 8), 6912, False),
    LayerSpec("fc", "linear", (10, 4), (4,), (10,), 40, True),
)


SPEC = json.loads(json.dumps(asdict(SPECS[0])))


def test_layers_round_trip(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_layers(SPECS)
    assert read_layers(tmp_path / "layers.json") == SPECS


@pytest.mark.parametrize(
    "document",
    [
        {}, {"layers": 3}, {"layers": [3]}, {"layers": [{"name": "conv"}]},
        {"layers": [{"name": "a", "weight_shape": 3, "in_shape": [], "out_shape": []}]},
        {"layers": [{"name": "a", "weight_shape": [], "in_shape": [], "out_shape": [], "x": 1}]},
        {"layers": [{**SPEC, "macs": "7"}]}, {"layers": [{**SPEC, "in_shape": []}]},
        {"layers": [{**SPEC, "macs": -7}]}, {"layers": [{**SPEC, "weight_shape": [4, 0]}]},
        {"layers": [{**SPEC, "has_bias": 1}]}, {"layers": [{**SPEC, "stride": "22"}]},
    ],
)  # fmt: skip
def test_damaged_layers_are_refused(tmp_path: Path, document: Any) -> None:
    (tmp_path / "layers.json").write_text(json.dumps(document))
    with refuses("layers.json: must list layer specifications"):
        read_layers(tmp_path / "layers.json")


def test_checkpoints_are_one_file_a_phase(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.checkpoint("search", {}).path == tmp_path / "checkpoints" / "search.safetensors"
    a, b = run.checkpoint("search", {"a": 1, "b": Path("x")}), run.checkpoint("search", {"a": 2})
    assert a.identity != b.identity


# ------------------------------------------------------------------------------------ fingerprint


def splits(**changes: Any) -> Splits:
    pixels = torch.arange(10 * 3 * 4 * 4, dtype=torch.uint8).reshape(10, 3, 4, 4)
    train = ImageSet(ArrayImages(pixels), torch.arange(10) % 2)
    parts = {"train": train, "val": None, "test": train.subset(torch.arange(4)), **changes}
    return Splits(class_names=("a", "b"), **parts)


def test_the_fingerprint_changes_with_labels_pixels_shapes_and_parts() -> None:
    first = fingerprint(splits())
    assert first == fingerprint(splits())
    assert re.fullmatch("[0-9a-f]{64}", first)
    train = splits().train
    pixel = train.images.take(torch.arange(10)).clone()
    pixel[3, 0, 0, 0] += 1
    others = [
        splits(train=ImageSet(ArrayImages(pixel), train.labels)),
        splits(train=ImageSet(train.images, 1 - train.labels)),
        splits(train=ImageSet(ArrayImages(pixel[:, :, :2]), train.labels)),
        splits(train=train.subset(torch.arange(9))),
        splits(test=None),
    ]
    assert len({first, *map(fingerprint, others)}) == 6


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("status", 3, "status: input should be a valid string, got 3"),
        ("request", [], "request: input should be a valid dictionary"),
        ("data", {}, "data.reference: field required"),
        ("methods", "fca", "methods: input should be a valid list, got 'fca'"),
        ("quant", 4, "quant: input should be a valid dictionary, got 4"),
    ],
)
def test_a_damaged_run_document_is_refused(
    tmp_path: Path, part: str, value: object, words: str
) -> None:
    with RunFolder.create(tmp_path / "run", {"verb": "train"}, resume=False) as run:
        run.update(**{part: value})
    with refuses("run.json: ", words, "copy the run anew"):
        RunFolder.open(tmp_path / "run")


@pytest.mark.parametrize(
    ("metrics", "sentence"),
    [
        ({"float": {"accuracy": "0.9"}}, "float.accuracy: input should be a valid number"),
        ({"quantized": {"auc": [1]}}, "quantized.auc: input should be a valid number, got [1]"),
        ({"float": {"per_class_recall": [0.5, {}]}}, "float.per_class_recall.1"),
        ({"float": {"dice": float("nan")}}, "float.dice: input should be a finite number, got nan"),
        ({"generalization": 3}, "generalization: input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_damaged_metrics_are_refused(tmp_path: Path, metrics: Any, sentence: str) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    with refuses("metrics.json: ", sentence, "copy the run anew"):
        RunFolder(tmp_path).read_metrics()


def test_metrics_may_be_missing_or_unknown(tmp_path: Path) -> None:
    metrics = {"float": {"auc": None, "accuracy": 1, "per_class_recall": [None, 0.5], "new": "x"}}
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert RunFolder(tmp_path).read_metrics() == metrics


def test_every_metric_that_a_table_shows_is_checked() -> None:
    for name in METRICS:
        with refuses(f"float.{name}: input should be a valid number"):
            check_metrics(Path("metrics.json"), {"float": {name: "x"}})


@pytest.mark.parametrize("log", ["{", "[1]\n", "3\n", "\n{}\n", "[" * 100_000, '{"a": NaN}'])
def test_a_damaged_log_is_refused(tmp_path: Path, log: str) -> None:
    (tmp_path / "log.jsonl").write_text(log)
    with refuses("log.jsonl: must have"):
        RunFolder(tmp_path).read_log()
