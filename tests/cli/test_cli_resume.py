"""Runs that are killed: the same command with --resume ends where the undisturbed run does."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

TRAIN = "train --model mlp --data {f}/ok.npz --epochs 2 --quiet"
SEARCH = "search --from {f}/float --data {f}/ok.npz --bits 2 --search-epochs 2 --quiet"
QUANTIZE = (
    "quantize --from {f}/float --data {f}/ok.npz --bits 2 --search-epochs 2 --epochs 2 --quiet"
)
PTQ = "quantize --from {f}/float --data {f}/ok.npz --bits 2 --ptq --ptq-steps 3 --quiet"
RESULTS = ("policy.json", "model.safetensors", "metrics.json", "float.safetensors", "layers.json")


def same(run: Path, undisturbed: Path) -> None:
    """Check that both hold the same results, and nothing of an unfinished write."""
    for name in RESULTS:
        assert (run / name).exists() == (undisturbed / name).exists()
        if (run / name).exists():
            assert (run / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert {p.name for p in run.rglob("*")} == {p.name for p in undisturbed.rglob("*")}
    epochs = [json.loads(x) for x in (run / "log.jsonl").read_text().splitlines()]
    keys = [(x["phase"], x["epoch"]) for x in epochs]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(TRAIN, id="train"),
        pytest.param(SEARCH, id="search", marks=pytest.mark.slow),
        pytest.param(f"{QUANTIZE} --ema-decay 0.9 --bn-batches 2", id="quantize"),
        pytest.param(f"{QUANTIZE} --keep-weights", id="keep", marks=pytest.mark.slow),
        pytest.param(PTQ, id="ptq", marks=pytest.mark.slow),
    ],
)
def test_killed_in_any_write_a_run_goes_on(sdq, files, tmp_path, writes, command):
    command = f"{command.format(f=files)} --out"
    assert sdq(command, tmp_path / "undisturbed").code == 0
    count = writes.count
    assert count > 6
    for number in range(1, count + 1):
        run = tmp_path / f"killed_{number}"
        with writes.killed_in(number):
            sdq(command, run)
        begun = (run / "run.json").exists()  # else there is nothing to resume
        done = sdq(f"{command} {run} {'--resume' if begun else ''}")
        assert done.code == 0, done.err
        same(run, tmp_path / "undisturbed")


def test_a_run_that_ended_may_be_resumed(sdq, files, tmp_path):
    command = f"{QUANTIZE.format(f=files)} --out {tmp_path / 'run'}"
    assert sdq(command).code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert sdq(f"{command} --resume").code == 0
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", ["train.safetensors", "run.json"])
def test_a_damaged_file_is_named(sdq, files, tmp_path, name):
    run = tmp_path / "run"
    command = f"{TRAIN.format(f=files)} --out {run}"
    assert sdq(command).code == 0
    path = next(run.rglob(name))
    path.write_bytes(path.read_bytes()[:100])
    done = sdq(f"{command} --resume")
    assert done.code == 2
    assert str(path) in done.err


def test_ctrl_c(sdq, files, tmp_path, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    run = tmp_path / "run"
    command = f"{TRAIN.format(f=files)} --out {run}"
    with monkeypatch.context() as patch:
        patch.setattr("sdq.cli.progress.Watch.__call__", interrupt)
        done = sdq(command)
    assert (done.code, done.out) == (130, "")
    assert done.err == "error: interrupted; repeat the command with --resume to continue\n"
    assert sdq(f"{command} --resume").code == 0


def test_ctrl_c_where_there_is_nothing_to_resume(sdq, files, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sdq.cli.evaluate.predict", interrupt)
    done = sdq(f"evaluate {files / 'float'}")
    assert (done.code, done.err) == (130, "error: interrupted; repeat the command\n")


def stop(command: str, when: Callable[[], bool], how: signal.Signals) -> tuple[int, str]:
    """Run ``sdq`` in a process of its own, and send it a signal once ``when()`` is true."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sdq", *command.split()], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        while not when():
            if process.poll() is not None:
                pytest.fail(f"ended before it was stopped: {process.communicate()[1]}")
            time.sleep(0.002)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    return process.returncode, err


def logged(run: Path, phase: str, epoch: int) -> Callable[[], bool]:
    """Return a function that tells whether the run's log has this epoch."""

    def found() -> bool:
        log = run / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        return any((x["phase"], x["epoch"]) == (phase, epoch) for x in map(json.loads, lines))

    return found


def test_a_process_that_is_killed(sdq, files, tmp_path):
    """Once for real, in the middle of the search."""
    run = tmp_path / "run"
    command = QUANTIZE.format(f=files).replace("--search-epochs 2", "--search-epochs 20")
    code, _ = stop(f"{command} --out {run}", logged(run, "search", 2), signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run / "policy.json").exists()
    assert sdq(f"{command} --resume --out {run}").code == 0
    assert sdq(f"{command} --out", tmp_path / "undisturbed").code == 0
    same(run, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_process_that_is_interrupted(sdq, files, tmp_path):
    run = tmp_path / "run"
    command = TRAIN.format(f=files).replace("--epochs 2", "--epochs 200")
    code, err = stop(f"{command} --out {run}", logged(run, "train", 3), signal.SIGINT)
    assert code == 130
    assert err == "error: interrupted; repeat the command with --resume to continue\n"
    assert sdq(f"{command} --resume --out {run}").code == 0


def saved(run: Path, phase: str, epochs: int) -> Callable[[], bool]:
    """Return a function that tells whether the phase's checkpoint has so many epochs."""
    path = run / "checkpoints" / f"{phase}.safetensors"

    def found() -> bool:
        if not path.exists():
            return False
        with safe_open(path, framework="pt") as file:
            return int(file.metadata()["epochs"]) >= epochs

    return found


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """In every phase and between them, with convolutions, each time in a new process."""

    def sdq(command: str) -> None:
        subprocess.run([sys.executable, "-m", "sdq", *command.split()], check=True)

    float_, run = tmp_path / "float", tmp_path / "run"
    train = "train --model vgg_like --data synthetic_derm --epochs 3 --quiet"
    stop(f"{train} --out {float_}", saved(float_, "train", 1), signal.SIGKILL)
    stop(f"{train} --resume --out {float_}", saved(float_, "train", 2), signal.SIGKILL)
    sdq(f"{train} --resume --out {float_}")
    sdq(f"{train} --out {tmp_path / 'float2'}")
    same(float_, tmp_path / "float2")

    quantize = (
        f"quantize --from {float_} --data synthetic_derm --bits 2 --search-epochs 2 --epochs 3 "
        "--quiet"
    )
    moments: list[Callable[[], bool]] = [
        (run / "run.json").exists,
        (run / "layers.json").exists,
        saved(run, "search", 1),
        saved(run, "search", 2),
        (run / "policy.json").exists,
        saved(run, "finetune", 1),
        saved(run, "finetune", 3),
    ]
    for number, moment in enumerate(moments):
        if not moment():  # the signal may have come late
            resume = "--resume" if number else ""
            code, _ = stop(f"{quantize} {resume} --out {run}", moment, signal.SIGKILL)
            assert code == -signal.SIGKILL
    sdq(f"{quantize} --resume --out {run}")
    sdq(f"{quantize} --out {tmp_path / 'undisturbed'}")
    same(run, tmp_path / "undisturbed")
