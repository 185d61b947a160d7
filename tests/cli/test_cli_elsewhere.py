"""Runs that are used from other folders, with other data, or not where they should be."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture
def undivided(tmp_path):
    """Return a set without parts, which every seed divides otherwise."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    images = rng.integers(0, 80, (120, 8, 8), np.uint8) + (60 * labels[:, None, None]).astype("u1")
    np.savez(tmp_path / "own.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path / "own.npz"


def document(run):
    return json.loads((run / "run.json").read_text())


def trained(sdq, folder, monkeypatch, seed=3):
    monkeypatch.chdir(folder)
    done = sdq(f"train --model mlp --data own.npz --seed {seed} --epochs 1 --quiet --out f")
    assert done.code == 0, done.err
    return folder / "f"


def test_data_are_divided_as_they_were_from_any_folder(sdq, undivided, monkeypatch):
    """Another spelling of the path was divided anew: test images had been trained on."""
    run = trained(sdq, undivided.parent, monkeypatch)
    sub = undivided.parent / "sub"
    sub.mkdir()
    monkeypatch.chdir(sub)
    quantize = "quantize --from ../f --data ../own.npz --bits 4 --search-method uniform --epochs 0"
    assert sdq(f"{quantize} --quiet --out q").code == 0
    assert document(sub / "q")["data"]["fingerprint"] == document(run)["data"]["fingerprint"]
    assert document(sub / "q")["held_out"] is True
    assert sdq("evaluate ../f --quiet").code == 0  # whose own data were named from elsewhere
    done = sdq("evaluate ../f --data ../own.npz --seed 0 --quiet")
    assert "--split, --seed: " in done.err
    assert "own.npz must be divided as for ../f" in done.err
    done = sdq(f"{quantize} --split 0.2,0.2,0.6 --quiet --out q2")
    assert done.code == 2
    assert "--split: " in done.err
    assert "images that it was trained on are measured on" in done.err


def test_paths_stay_out_of_what_is_shared(sdq, undivided, monkeypatch):
    run = trained(sdq, undivided.parent, monkeypatch)
    assert document(run)["data"]["reference"] == "own.npz"
    assert sdq("report f --quiet").code == 0
    assert str(undivided.parent) not in (run / "report.html").read_text()


def test_data_that_are_gone_are_named_with_the_run(sdq, undivided, monkeypatch):
    trained(sdq, undivided.parent, monkeypatch)
    undivided.unlink()
    done = sdq("evaluate f --quiet")
    assert done.code == 2
    assert f"f: its data, {undivided}, must be where they were, but are not; name them" in done.err


def test_all_of_an_external_set_is_measured(sdq, undivided, monkeypatch):
    trained(sdq, undivided.parent, monkeypatch)
    arrays = dict(np.load(undivided))
    np.savez("other.npz", images=255 - arrays["images"], labels=arrays["labels"])
    done = sdq("evaluate f --data other.npz --json")
    assert done.code == 0, done.err
    assert done.json["float"]["num_examples"] == 120
    shown = sdq("evaluate f --data other.npz")
    assert "f, 120 images" in " ".join(shown.out.split())
    part = sdq("evaluate f --data other.npz --split 0.5,0,0.5 --json --quiet")
    assert part.json["float"]["num_examples"] == 60
    refused = sdq("evaluate f --data other.npz --seed 1 --quiet")
    assert "--seed: must go with --split" in refused.err


@pytest.mark.parametrize("names", [None, ["a", "b", "c"]])
def test_the_run_s_own_images_are_known_wherever_they_are(sdq, undivided, monkeypatch, names):
    """Moved, they would be measured whole, training images and all."""
    if names is not None:
        np.savez(undivided, class_names=np.array(names), **dict(np.load(undivided)))
    run = trained(sdq, undivided.parent, monkeypatch)
    own = sdq("evaluate f --json --quiet").json["float"]
    assert own["num_examples"] == document(run)["data"]["num_examples"]["test"] < 120
    (undivided.parent / "moved").mkdir()
    undivided.rename(undivided.parent / "moved" / "renamed.npz")
    assert sdq("evaluate f --data moved/renamed.npz --json --quiet").json["float"] == own


def test_what_weights_from_a_file_were_trained_on_stays_unknown(sdq, undivided, monkeypatch):
    trained(sdq, undivided.parent, monkeypatch)
    train = "train --model mlp --weights f/model.safetensors --data own.npz --epochs 1"
    assert sdq(f"{train} --quiet --out g").code == 0
    quantize = "quantize --from g --data own.npz --bits 4 --search-method uniform --epochs 0"
    assert sdq(f"{quantize} --quiet --out q").code == 0
    assert document(undivided.parent / "q")["held_out"] is False
    assert sdq("report g --quiet").code == 0
    page = (undivided.parent / "g" / "report.html").read_text()
    assert "images that it was not trained on here." in page


def test_a_kept_client_is_opened_from_any_folder(sdq, undivided, monkeypatch):
    monkeypatch.chdir(undivided.parent)
    rows = [f"{i},{'ab'[i % 2]},{'test' if i % 5 == 0 else 'train'}" for i in range(120)]
    (undivided.parent / "split.csv").write_text("\n".join(["index,client,split", *rows]) + "\n")
    command = (
        "federate --method fedavg --model mlp --data own.npz --clients split.csv --rounds 1 "
        "--keep-clients --quiet"
    )
    done = sdq(f"{command} --out fed")
    assert done.code == 0, done.err
    (undivided.parent / "sub").mkdir()
    here = sdq("evaluate fed/clients/a --json --quiet")
    assert here.code == 0, here.err
    monkeypatch.chdir(undivided.parent / "sub")
    there = sdq("evaluate ../fed/clients/a --json --quiet")
    assert there.code == 0, there.err
    assert there.json == here.json
    elsewhere = command.replace("own", "../own").replace("split", "../split")
    done = sdq(f"{elsewhere} --resume --out ../fed")
    assert done.code == 0, done.err


def test_a_page_says_what_is_known_of_the_images(sdq, undivided, monkeypatch):
    run = trained(sdq, undivided.parent, monkeypatch)
    common = "--data own.npz --bits 4 --ptq --search-method uniform --quiet"
    assert sdq(f"quantize --from f {common} --ptq-steps 1 --ptq-images 999999 --out a").code == 0
    weights = f"--model mlp --weights {run / 'model.safetensors'}"
    assert sdq(f"quantize {weights} {common} --ptq-steps 0 --out b").code == 0
    assert sdq("report a --quiet").code == sdq("report b --quiet").code == 0
    known, unknown = ((run.parent / name / "report.html").read_text() for name in "ab")
    count = document(run)["data"]["num_examples"]["train"]
    assert f"How to round was then learned from {count} images without their labels" in known
    assert "images that neither was trained on." in known
    assert "Each weight was then rounded to the nearest level; nothing was trained." in unknown
    assert "what the float network was trained on before is not known" in unknown


def test_a_run_without_its_policy_is_named(sdq, undivided, monkeypatch):
    trained(sdq, undivided.parent, monkeypatch)
    command = "quantize --from f --data own.npz --bits 4 --search-method uniform --epochs 0"
    assert sdq(f"{command} --quiet --out q").code == 0
    (undivided.parent / "q" / "policy.json").unlink()
    done = sdq("report q")
    assert done.code == 2
    assert "q: must be a run with a policy.json, got none" in done.err


def test_options_that_would_do_nothing_are_refused(sdq, undivided, monkeypatch):
    trained(sdq, undivided.parent, monkeypatch)
    done = sdq("quantize --from f --data own.npz --bits 4 --act-choices 2,3 --quiet --out q")
    assert done.code == 2
    assert "--act-choices: must go with --learn-act-bits" in done.err
    done = sdq("train --model mlp --data own.npz --mean 127 --std 64 --quiet --out g")
    assert done.code == 2
    assert "--mean, --std: must be of pixels in 0..1, got 127 and 64; divide" in done.err


def test_an_interrupted_command_says_how_to_go_on(sdq, undivided, monkeypatch):
    """Before there is a folder, --resume would be refused."""
    monkeypatch.chdir(undivided.parent)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for early, where in ((True, "sdq.cli.inputs.open_data"), (False, "sdq.cli.train.train_")):
        with monkeypatch.context() as patched:
            patched.setattr(where, interrupted)
            done = sdq("train --model mlp --data own.npz --quiet --out q")
        assert done.code == 130
        assert done.err.startswith("error: interrupted; repeat the command")
        assert ("--resume" in done.err) != early


def test_a_page_is_named_in_any_locale(sdq, undivided, monkeypatch):
    trained(sdq, undivided.parent, monkeypatch)
    shutil.copytree(undivided.parent / "f", undivided.parent / "größe")
    environment = os.environ | {
        "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sdq", "report", "größe"], cwd=undivided.parent, env=environment,
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "größe/report.html".encode()
