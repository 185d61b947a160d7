"""Options of training: teachers, schedules, averages, statistics, selection, devices."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from sdq.batches import Normalization
from sdq.cli.teacher import Renormalized

TRAIN = "train --model mlp --data {f}/ok.npz --quiet"
QUANTIZE = "quantize --from {f}/float --data {f}/ok.npz --bits 2 --search-method uniform --quiet"


def read(path):
    return json.loads(path.read_text())


def log(run, phase):
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record for record in records if record["phase"] == phase]


@pytest.fixture(scope="module")
def teachers(sdq, files, tmp_path_factory):
    """A larger network on the same data, and teachers that do not fit."""
    home = tmp_path_factory.mktemp("teachers")
    for name, command in {
        "large": f"train --model vgg_like --data {files / 'ok.npz'} --mean 0.4 --std 0.3",
        "five": f"train --model mlp --data {files / 'five.npz'}",
        "size20": f"train --model mlp --data {files / 'size20.npz'}",
    }.items():
        done = sdq(f"{command} --epochs 1 --quiet --out", home / name)
        assert done.code == 0, done.err
    return home


def test_every_option_of_training(sdq, files, tmp_path):
    run = tmp_path / "run"
    done = sdq(
        f"{TRAIN.format(f=files)} --epochs 3 --lr 0.01 --weight-decay 0.1 --optimizer sgd "
        "--schedule linear --ema-decay 0.9 --bn-batches 2 --select loss --out",
        run,
    )
    assert done.code == 0, done.err
    asked = read(run / "run.json")["request"]["train"]
    expected = {
        "lr": 0.01, "weight_decay": 0.1, "optimizer": "sgd", "schedule": "linear",
        "ema_decay": 0.9, "bn_batches": 2, "select": "loss",
    }  # fmt: skip
    assert {key: asked[key] for key in expected} == expected
    records = log(run, "train")
    # one step an epoch (70 images): the second begins after a third of the steps
    rates = [1e-3 * 0.01, 0.01 * (1 - (1 / 3 - 0.05) / 0.95), 0.01 * (1 - (2 / 3 - 0.05) / 0.95)]
    assert [record["lr"] for record in records] == pytest.approx(rates)
    losses = [record["val_loss"] for record in records]
    metrics = read(run / "metrics.json")
    assert metrics["selected_by"] == "loss"
    assert metrics["best_epoch"] == losses.index(min(losses)) + 1 == records[-1]["best_epoch"]
    assert metrics["validation_score"] == min(losses)


def test_every_option_of_fine_tuning(sdq, files, tmp_path):
    run = tmp_path / "run"
    done = sdq(
        f"{QUANTIZE.format(f=files)} --epochs 2 --weight-decay 0.1 --optimizer sgd --schedule step "
        "--bin-reduction sum --no-distill --ema-decay 0.9 --bn-batches 2 --select accuracy --out",
        run,
    )
    assert done.code == 0, done.err
    request = read(run / "run.json")["request"]
    expected = {
        "weight_decay": 0.1, "optimizer": "sgd", "schedule": "step", "bin_reduction": "sum",
        "distill": False, "ema_decay": 0.9, "bn_batches": 2, "select": "accuracy",
    }  # fmt: skip
    assert {key: request["train"][key] for key in expected} == expected
    assert request["teacher"] is None
    assert read(run / "metrics.json")["selected_by"] == "accuracy"


def test_what_a_run_is_measured_on_does_not_select(sdq, tmp_path):
    """Without a test split the metrics are those of the validation split."""
    for part in ("train", "val"):
        for name in ("a", "b"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(8):
                Image.new("RGB", (12, 12), (20 * number, 10, 200)).save(folder / f"{number}.png")
    run = tmp_path / "run"
    done = sdq(f"train --model mlp --data {tmp_path / 'images'} --epochs 2 --quiet --out", run)
    assert done.code == 0, done.err
    metrics = read(run / "metrics.json")
    assert (metrics["best_epoch"], metrics["selected_by"]) == (2, "last")
    assert [record["selected_by"] for record in log(run, "train")] == ["last", "last"]


# --------------------------------------------------------------------------------------- teachers


def test_another_network_teaches(sdq, files, teachers, tmp_path):
    ends = {}
    weights = teachers / "large" / "model.safetensors"
    for name, option in {
        "own": "",
        "run": f"--teacher {teachers / 'large'}",
        "file": f"--teacher-model vgg_like --teacher-weights {weights}",
        "none": "--no-distill",
    }.items():
        done = sdq(f"{QUANTIZE.format(f=files)} --epochs 1 {option} --out", tmp_path / name)
        assert done.code == 0, done.err
        ends[name] = load_file(tmp_path / name / "model.safetensors")
    request = read(tmp_path / "run" / "run.json")["request"]
    assert request["teacher"] == {"run": str(teachers / "large"), "model": None, "weights": None}
    key = next(name for name in ends["own"] if name.endswith("10.weight"))
    # the file says nothing of the teacher's normalisation, so it is a fourth teacher
    values = [end[key] for end in ends.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--teacher {t}/five", "five: must have the data's 7 classes, got 5"),
        ("--teacher {t}/size20", "images must be the data's (3, 28, 28) (C, H, W), got (3, 20, 20"),
        ("--teacher {t}/nowhere", "must be a run folder"),
        ("--teacher {t}/large --no-distill", "--no-distill: must stand without a teacher"),
        ("--teacher {t}/large --teacher-model mlp", "--teacher: must stand without"),
        ("--teacher-model mlp", "--teacher-weights: must be given together"),
        ("--teacher-model mlp --teacher-weights {t}/five/model.safetensors", "must have shape"),
        ("--teacher-model mpl --teacher-weights {t}/five/model.safetensors", "did you mean 'mlp'"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(sdq, files, teachers, tmp_path, option, expected):
    command = f"{QUANTIZE.format(f=files)} {option.format(t=teachers)} --out"
    done = sdq(command, tmp_path / "out")
    assert done.code == 2
    assert expected in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_saw_the_test_images_is_refused(sdq, files, teachers, tmp_path):
    run = tmp_path / "teacher"
    with open(teachers / "large" / "run.json") as file:
        document = json.load(file)
    run.mkdir()
    document["data"]["fingerprint"] = "0" * 64
    (run / "run.json").write_text(json.dumps(document))
    save_file(load_file(teachers / "large" / "model.safetensors"), run / "model.safetensors")
    done = sdq(f"{QUANTIZE.format(f=files)} --teacher {run} --out", tmp_path / "out")
    assert done.code == 2
    assert "data must be divided as they are here" in done.err


def test_a_teacher_sees_images_as_it_was_trained_on_them():
    pixels = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    own = Normalization((0.4, 0.5, 0.6), (0.3, 0.2, 0.1))
    given = Normalization((0.1, 0.2, 0.3), (0.5, 0.4, 0.3))
    found = Renormalized(nn.Identity(), own, given)(given(pixels))
    torch.testing.assert_close(found, own(pixels), rtol=1e-5, atol=1e-5)  # float32


# ---------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--devices 0", "0 is not in the range x>=1"),
        ("--precision 16", "not one of '32', 'bf16'"),
        ("--schedule cos", "not one of 'cosine', 'linear', 'step', 'constant'"),
        ("--select f1", "not one of 'last', 'loss'"),
        ("--ema-decay 1", "ema_decay: input should be less than 1, got 1.0"),
        ("--ema-decay nan", "--ema-decay: must be a finite number"),
        ("--bn-batches -1", "-1 is not in the range x>=0"),
    ],
)
def test_wrong_options_are_refused(sdq, files, tmp_path, option, expected):
    done = sdq(f"{TRAIN.format(f=files)} {option} --out", tmp_path / "out")
    assert done.code == 2
    assert expected in done.err
    assert not (tmp_path / "out").exists()


def test_bfloat16(sdq, files, tmp_path):
    for precision in ("32", "bf16"):
        command = f"{QUANTIZE.format(f=files)} --epochs 1 --precision {precision} --out"
        done = sdq(command, tmp_path / precision)
        assert done.code == 0, done.err
    losses = [log(tmp_path / p, "finetune")[0]["train_loss"] for p in ("32", "bf16")]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)  # products of 8 bits of precision
    tensors = load_file(tmp_path / "bf16" / "model.safetensors").values()
    assert {t.dtype for t in tensors if t.is_floating_point()} == {torch.float32}
    done = sdq(f"{QUANTIZE.format(f=files)} --epochs 1 --resume --out", tmp_path / "bf16")
    assert "precision must be as in the interrupted run, 'bf16', got '32'" in done.err


@pytest.mark.slow
def test_two_processes(sdq, files, tmp_path):
    """The whole command, as Fabric starts it twice: one folder, one log, one table."""

    def run(verb, *more):
        command = [sys.executable, "-m", "sdq", *verb.split(), *map(str, more)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    verb = (
        f"quantize --from {files / 'float'} --data {files / 'ok.npz'} --bits 2 --search-epochs 2 "
        "--epochs 2 --batch-size 16 --device cpu --devices 2 --json --out"
    )
    done = run(verb, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("weight bytes") == 1
    assert (
        read(tmp_path / "run" / "metrics.json")
        == json.loads(done.stdout.splitlines()[-1])["metrics"]
    )
    assert [r["epoch"] for r in log(tmp_path / "run", "finetune")] == [1, 2]
    assert read(tmp_path / "run" / "run.json")["status"] == "done"
    assert sdq(f"evaluate {tmp_path / 'run'} --quiet").code == 0
    # a folder that is taken: both see it, one says it
    again = run(verb, tmp_path / "run")
    assert again.returncode == 2
    assert again.stderr.count("--out: folder must be new or empty") == 1
    other = run(f"{verb.replace('--devices 2', '')} {tmp_path / 'run'} --resume")
    assert other.returncode == 2
    assert "devices must be as in the interrupted run, 2, got 1" in other.stderr
    # and one that both find to be another run's only when they have met
    met = run(f"{verb.replace('--epochs 2', '--epochs 3')} {tmp_path / 'run'} --resume")
    assert met.returncode == 2
    assert met.stderr.count("--resume: train.epochs must be") == 1
