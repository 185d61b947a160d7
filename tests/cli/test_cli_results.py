"""What the verbs give: files, tables and the last line as JSON."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

METRICS = {
    "accuracy", "balanced_accuracy", "macro_f1", "auc", "per_class_recall", "ece", "num_examples",
}  # fmt: skip
TRAINED = {"best_epoch", "selected_by", "validation_score"}
COSTS = {
    "agreement", "avg_weight_bits", "avg_weight_bits_all", "weight_bytes", "bops", "float_layers",
}  # fmt: skip
ONNX = importlib.util.find_spec("onnx") is not None
needs_onnx = pytest.mark.skipif(not ONNX, reason="sdq[export] is not installed")


def metrics_are_whole(metrics, classes=7):
    assert set(metrics) == METRICS
    assert len(metrics["per_class_recall"]) == classes
    for key in METRICS - {"per_class_recall"}:
        assert math.isfinite(metrics[key])


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("models", {"mlp", "resnet20", "vgg_like"}),
        ("datasets", {"synthetic_derm", "dermamnist"}),
        ("methods", {"fedavg", "fca"}),
        ("formats", {"finn", "hls4ml", "onnx", "onnx-packed", "qonnx"}),
        ("targets", {"bit_fusion"}),
        ("search_methods", {"sdq", "hessian"}),
    ],
)
def test_list(sdq, kind, some):
    done = sdq(f"list {kind} --json")
    assert (done.code, done.err) == (0, "")
    assert list(done.json) == [kind]
    assert done.json[kind] == sorted(done.json[kind])
    assert some <= set(done.json[kind])
    table = sdq(f"list {kind}")
    assert [line.split()[0] for line in table.out.splitlines()] == done.json[kind]


@pytest.mark.parametrize("verb", ["", "--help"])
def test_help_lists_every_verb(sdq, verb):
    done = sdq(verb)
    assert done.code == (0 if verb else 2)
    for name in ("list", "train", "quantize", "search", "evaluate", "export", "cost", "demo"):
        assert f" {name} " in done.out


@pytest.mark.parametrize(
    "verb", ["list", "train", "quantize", "search", "evaluate", "export", "cost", "demo"]
)
def test_every_verb_explains_itself(sdq, verb):
    done = sdq(f"{verb} --help")
    assert done.code == 0
    assert f"sdq {verb}" in done.out
    assert "Example" in done.out


def test_train(derm):
    run = derm / "float"
    metrics = read(run / "metrics.json")
    assert set(metrics) == {"float"} | TRAINED
    metrics_are_whole(metrics["float"])
    document = read(run / "run.json")
    assert document["schema"] == "sdq.run/1"
    assert document["status"] == "done"
    assert document["seed"] == 0
    assert {"sdq", "torch", "python"} <= set(document["versions"])
    assert len(document["data"]["fingerprint"]) == 64
    assert document["data"]["image_shape"] == [3, 28, 28]
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(x["phase"], x["epoch"]) for x in log] == [("train", 1), ("train", 2)]


def test_quantize(derm):
    run = derm / "quantized"
    assert {p.name for p in run.iterdir()} == {
        ".lock", "checkpoints", "float.safetensors", "layers.json", "log.jsonl", "metrics.json",
        "model.safetensors", "plots", "policy.json", "predictions.safetensors", "report.html",
        "run.json",
    }  # fmt: skip
    metrics = read(run / "metrics.json")
    assert set(metrics) == {"float", "quantized"} | COSTS | TRAINED
    metrics_are_whole(metrics["float"])
    metrics_are_whole(metrics["quantized"])
    assert metrics["avg_weight_bits"] <= 2.0
    policy = read(run / "policy.json")
    assert policy["schema"] == "sdq.policy/1"
    bits = sum(x["num_weights"] * x["weight_bits"] for x in policy["layers"])
    assert metrics["weight_bytes"] == bits / 8
    weights = sum(x["num_weights"] for x in policy["layers"])
    assert metrics["avg_weight_bits_all"] == pytest.approx(bits / weights)
    # a linear layer has one MAC a weight
    assert metrics["bops"] == sum(
        x["num_weights"] * x["weight_bits"] * x["act_bits"] for x in policy["layers"]
    )
    assert read(derm / "float" / "metrics.json")["float"] == metrics["float"]
    for name in ("model", "float"):
        with safe_open(run / f"{name}.safetensors", framework="pt") as file:
            assert list(file.keys())


def test_nothing_in_a_run_is_a_pickle(derm):
    for path in derm.rglob("*"):
        if path.is_file() and path.name != ".lock":
            assert path.suffix in (".json", ".jsonl", ".safetensors", ".png", ".html"), path


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ("--bits 3.3", ("avg_weight_bits", 3.3)),
        ("--weight-kb 306", ("weight_bytes", 306_000)),
        ("--bops-g 0.0194", ("bops", 19_400_000)),
        ("--bits 3.3 --search-method uniform", ("avg_weight_bits", 3.0)),
        ("--bits 1e9", ("avg_weight_bits", 8.0)),
        ("--bits 2 --choices 2", ("avg_weight_bits", 2.0)),
        ("--bits 2 --first-last-bits 0", ("avg_weight_bits", 2.0)),
        ("--bits 2 --weight-scale per_tensor --scale power_of_two --act-bits 32",
         ("avg_weight_bits", 2.0)),
    ],
)  # fmt: skip
def test_quantize_keeps_the_budget(sdq, files, tmp_path, options, limit):
    run = tmp_path / "run"
    done = sdq(
        f"quantize --from {files / 'float'} --data {files / 'ok.npz'} {options} "
        f"--search-epochs 1 --epochs 1 --json --out {run}"
    )
    assert done.code == 0, done.err
    assert set(done.json) == {"out", "metrics"}
    assert done.json["out"] == str(run)
    assert done.json["metrics"] == read(run / "metrics.json")
    name, value = limit
    assert done.json["metrics"][name] <= value
    if "uniform" in options:
        assert done.json["metrics"][name] == value
    assert "quantized" in done.out  # the table


def test_search_then_quantize_with_its_policy(sdq, files, tmp_path):
    common = f"--from {files / 'float'} --data {files / 'ok.npz'}"
    done = sdq(f"search {common} --bits 3 --search-epochs 2 --json --out {tmp_path / 's'}")
    assert done.code == 0, done.err
    assert set(done.json) == {"out", "avg_weight_bits", "avg_weight_bits_all", "weight_bits"}
    assert done.json["avg_weight_bits"] <= 3
    policy = tmp_path / "s" / "policy.json"
    found = {x["name"]: x["weight_bits"] for x in read(policy)["layers"]}
    assert done.json["weight_bits"] == found
    assert not (tmp_path / "s" / "model.safetensors").exists()
    done = sdq(f"quantize {common} --policy {policy} --epochs 1 --quiet --out {tmp_path / 'q'}")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "q" / "policy.json").read_text() == policy.read_text()
    log = (tmp_path / "q" / "log.jsonl").read_text().splitlines()
    assert {json.loads(line)["phase"] for line in log} == {"finetune"}


def test_both_phases_learn_from_the_float_network(sdq, files, tmp_path, monkeypatch):
    from sdq.cli import quantize

    taught = {}
    originals = {phase: getattr(quantize, phase) for phase in ("search", "finetune_")}
    for phase, original in originals.items():

        def spy(*arguments, phase=phase, original=original, **options):
            taught[phase] = options["teacher"]
            return original(*arguments, **options)

        monkeypatch.setattr(quantize, phase, spy)
    common = f"--from {files / 'float'} --data {files / 'ok.npz'} --bits 3"
    done = sdq(f"quantize {common} --search-epochs 1 --epochs 1 --quiet --out {tmp_path / 'q'}")
    assert done.code == 0, done.err
    assert isinstance(taught["search"], torch.nn.Module)
    assert taught["search"] is taught["finetune_"]


def test_quantize_takes_weights_instead_of_a_run(sdq, files, tmp_path):
    weights = files / "float" / "model.safetensors"
    done = sdq(
        f"quantize --model mlp --weights {weights} --data {files / 'ok.npz'} --bits 2 "
        f"--search-epochs 1 --epochs 1 --quiet --out {tmp_path / 'run'}"
    )
    assert done.code == 0, done.err
    # the same network, data and seed as the run made with --from
    assert load_file(tmp_path / "run" / "model.safetensors").keys()
    one, two = (read(p / "metrics.json") for p in (tmp_path / "run", files / "quantized"))
    assert one == two


def test_evaluate_gives_what_the_run_measured(sdq, derm):
    done = sdq(f"evaluate {derm / 'quantized'} --json")
    assert done.code == 0, done.err
    metrics = read(derm / "quantized" / "metrics.json")
    assert set(done.json) == {"float", "quantized", "agreement"}
    for key in ("quantized", "float"):
        for name, value in done.json[key].items():
            # batches of another size: float32 sums may differ in the last digits
            assert value == pytest.approx(metrics[key][name], abs=1e-4)
    assert done.json["agreement"] == pytest.approx(metrics["agreement"], abs=1e-3)
    float_alone = sdq(f"evaluate {derm / 'float'} --json --quiet")
    assert float_alone.json == {"float": done.json["float"]}
    assert float_alone.out.count("\n") == 1


def test_evaluate_takes_weights(sdq, derm):
    weights = derm / "float" / "model.safetensors"
    done = sdq(f"evaluate --model mlp --weights {weights} --data synthetic_derm --json")
    assert done.code == 0, done.err
    # the normalisation is the training set's here as there
    assert done.json == sdq(f"evaluate {derm / 'float'} --json").json


def test_evaluate_takes_other_data(sdq, files):
    done = sdq(
        f"evaluate {files / 'quantized'} --data {files / 'size20.npz'} --image-size 28 --json"
    )
    assert done.code == 0, done.err
    metrics_are_whole(done.json["quantized"])


@needs_onnx
@pytest.mark.parametrize("format", ["onnx", "onnx-packed", "qonnx"])
@pytest.mark.parametrize(
    "options", ["", "--verify --samples 40", "--verify --samples 40 --with-preprocessing"]
)
def test_export(sdq, derm, tmp_path, format, options):
    done = sdq(f"export {derm / 'quantized'} --format {format} {options} --json --out {tmp_path}")
    assert done.code == 0, done.err
    written = done.json["export"]
    assert written["format"] == format
    assert written["path"] == str(tmp_path / written["file"])
    assert (tmp_path / written["file"]).stat().st_size == written["file_bytes"]
    policy = read(derm / "quantized" / "policy.json")["layers"]
    assert written["weight_bits"] == {x["name"]: x["weight_bits"] for x in policy}
    assert set(read(tmp_path / "export.json")["exports"]) == {format}
    assert ("verification" in done.json) == bool(options)
    if options:
        assert done.json["verification"]["verified"] is True
        assert "0 of" in done.out


@pytest.mark.parametrize("kind", ["dorefa", "entropy"])
def test_another_weight_quantizer_goes_all_the_way(sdq, files, tmp_path, kind):
    common = f"--from {files / 'float'} --data {files / 'ok.npz'} --weight-quantizer {kind}"
    done = sdq(
        f"quantize {common} --choices 1,2,8 --bits 4 --first-last-bits 0 --search-epochs 1 "
        f"--epochs 1 --json --out {tmp_path / 'q'}"
    )
    assert done.code == 0, done.err
    assert read(tmp_path / "q" / "run.json")["quant"]["weight_quantizer"] == kind
    found = sdq(f"evaluate {tmp_path / 'q'} --json").json["quantized"]
    # batches of another size: float32 sums may differ in the last digits
    expected = done.json["metrics"]["quantized"]["accuracy"]
    assert found["accuracy"] == pytest.approx(expected, abs=1e-4)
    assert sdq(f"search {common} --bits 3 --search-epochs 1 --out {tmp_path / 's'}").code == 0
    if ONNX:
        for format in ("onnx", "qonnx"):
            done = sdq(f"export {tmp_path / 'q'} --format {format} --verify --samples 20 --json")
            assert done.code == 0, done.err
            assert done.json["verification"]["verified"] is True


def test_a_run_from_before_there_was_a_choice_is_of_the_learned_step(sdq, files, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(files / "quantized", run)
    document = read(run / "run.json")
    assert document["quant"].pop("weight_quantizer") == "lsq"
    assert document["quant"].pop("weight_magnitude") == "learned"
    (run / "run.json").write_text(json.dumps(document))
    assert sdq(f"evaluate {run} --json").json == sdq(f"evaluate {files / 'quantized'} --json").json


@needs_onnx
def test_export_twice(sdq, files, tmp_path):
    out = tmp_path / "out"
    export = f"export {files / 'quantized'} --out {out}"
    assert sdq(export).code == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    done = sdq(export)
    assert done.code == 2
    assert "must not exist yet" in done.err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sdq(f"{export} --overwrite").code == 0
    assert sdq(f"{export} --format qonnx").code == 0
    assert {p.name for p in out.iterdir()} == {"export.json", "model.onnx", "model_qonnx.onnx"}


@needs_onnx
def test_export_of_several_formats(sdq, files, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export = f"export {files / 'quantized'} --out {out} --verify --samples 10 --json --format"
    done = sdq(f"{export} onnx-packed,qonnx")
    assert done.code == 0, done.err
    assert [x["export"]["format"] for x in done.json["exports"]] == ["onnx-packed", "qonnx"]
    assert all(x["verification"]["verified"] for x in done.json["exports"])
    assert (out / "onnx_packed" / "model_packed.onnx").is_file()
    assert (out / "qonnx" / "model_qonnx.onnx").is_file()
    # what one format cannot take is said before another is written
    from export.findings import Finding
    from export.formats import hls4ml

    found = (Finding("layers.1", "must be dense", "something else", "make it dense"),)
    monkeypatch.setattr(hls4ml, "check", lambda *_: found)
    other = tmp_path / "other"
    done = sdq(f"export {files / 'quantized'} --format onnx,hls4ml --out {other}")
    assert done.code == 2
    assert "hls4ml cannot take this network" in done.err
    assert "layers.1: must be dense, got something else; make it dense" in done.err
    assert not other.exists()
    for wrong, words in (("onnx,onnx", "each format once"), ("onnx,finnn", "did you mean 'finn'")):
        done = sdq(f"export {files / 'quantized'} --format {wrong} --out {other}")
        assert done.code == 2
        assert words in done.err
    done = sdq(f"export {files / 'quantized'} --format onnx --target pynq_z2 --out {other}")
    assert done.code == 2
    assert "--target must be asked of a format with a compiler" in done.err
    for rest in ("onnx", "finn"):
        command = f"export {files / 'quantized'} --simulate-layer first --out {other} --format"
        done = sdq(f"{command} {rest}")
        assert done.code == 2
        assert "--simulate-layer: must stand with --build and a format that gen" in done.err


@needs_onnx
def test_a_wrong_data_root_leaves_no_export(sdq, files, tmp_path):
    done = sdq(f"export {files / 'quantized'} --verify --data nowhere.npz --out", tmp_path / "out")
    assert done.code == 2
    assert not (tmp_path / "out").exists()


def test_cost(sdq, derm):
    run, metrics = derm / "quantized", read(derm / "quantized" / "metrics.json")
    done = sdq(f"cost {run} --json")
    assert done.code == 0, done.err
    assert set(done.json) == {"layers", "total"}
    for key in ("avg_weight_bits", "avg_weight_bits_all", "weight_bytes", "bops"):
        assert done.json["total"][key] == metrics[key]
    assert sum(x["macs"] for x in done.json["layers"]) == done.json["total"]["macs"]
    with_target = sdq(f"cost {run / 'policy.json'} --target bit_fusion --json").json
    assert with_target["total"] == done.json["total"] | {
        "target": "bit_fusion",
        "cycles": sum(x["cycles"] for x in with_target["layers"]),
        "latency_s": with_target["total"]["latency_s"],
        "energy_j": pytest.approx(sum(x["energy_j"] for x in with_target["layers"])),
        "bottleneck": with_target["total"]["bottleneck"],
        "fits": True,
        "shares": {},
        "limits": {},
    }
    assert with_target["total"]["latency_s"] > 0
    assert with_target["total"]["bottleneck"] in {x["name"] for x in with_target["layers"]}


def test_a_folder_of_images(sdq, tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("benign", "malignant"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).save(
                    folder / f"{split}{name}{i}.png"
                )
    run, data = tmp_path / "run", tmp_path / "images"
    done = sdq(f"train --model mlp --data {data} --epochs 1 --json --out {run}")
    assert done.code == 0, done.err
    metrics_are_whole(done.json["metrics"]["float"], classes=2)
    assert read(run / "run.json")["data"]["class_names"] == ["benign", "malignant"]
    done = sdq(
        f"quantize --from {run} --data {data} --bits 2 --search-epochs 1 --epochs 1 --quiet --out",
        tmp_path / "q",
    )
    assert done.code == 0, done.err


def test_a_users_model_goes_all_the_way(sdq, files, tmp_path):
    model, data = f"{files / 'models.py'}:fixed", files / "ok.npz"
    f, q = tmp_path / "f", tmp_path / "q"
    for command in (
        f"train --model {model} --data {data} --epochs 1 --out {f}",
        f"quantize --from {f} --data {data} --bits 8 --first-last-bits 0 --search-epochs 1 "
        f"--epochs 1 --out {q}",
        f"evaluate {q}",
        f"cost {q}",
    ):
        assert sdq(f"{command} --quiet").code == 0
    if ONNX:
        assert sdq(f"export {q} --verify --samples 10").code == 0


def test_the_same_seed_gives_the_same_weights(sdq, files, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        train = f"train --model mlp --data {files / 'ok.npz'} --epochs 1 --quiet --seed {seed}"
        assert sdq(f"{train} --out", tmp_path / name).code == 0
    a, b, c = ((tmp_path / x / "model.safetensors").read_bytes() for x in "abc")
    assert a == b
    assert a != c


def test_real_images(sdq, real_root, tmp_path):
    """The pretrained network on images that it was not trained on: shapes, not accuracy."""
    weights = real_root / "resnet20_cifar10.safetensors"
    data = f"--data dermamnist --data-root {real_root}"
    done = sdq(f"train --model mlp {data} --epochs 1 --json --out", tmp_path / "f")
    assert done.code == 0, done.err
    metrics_are_whole(done.json["metrics"]["float"])
    assert done.json["metrics"]["float"]["accuracy"] > 0.6  # two thirds are one class
    done = sdq(f"evaluate --model resnet20 --weights {weights} {data}")
    assert done.code == 2
    assert "'linear.bias' must have shape (7,), got (10,)" in done.err


def test_another_packages_export_is_noticed(tmp_path):
    """``python -m`` puts the current folder first on the path."""
    (tmp_path / "export.py").write_text("raise SystemExit(3)\n")
    done = subprocess.run(
        [sys.executable, "-m", "sdq", "list", "models"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{tmp_path / 'export.py'} hides it; rename that file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def undivided(sdq, tmp_path_factory):
    """Data without parts, a network trained on them with seed 1, and quantized with seed 2."""
    home = tmp_path_factory.mktemp("undivided")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (120, 8, 8, 3), dtype=np.uint8)
    np.savez(home / "own.npz", images=images, labels=np.arange(120) % 3)
    data = f"--data {home / 'own.npz'} --quiet"
    q = f"quantize {data} --from {home / 'f'} --search-epochs 1 --epochs 1 --bits 2"
    for command in (
        f"train --model mlp {data} --epochs 1 --seed 1 --out {home / 'f'}",
        f"train --model mlp {data} --epochs 1 --seed 7 --out {home / 'teacher'}",
        f"{q} --seed 2 --out {home / 'q'}",
    ):
        done = sdq(command)
        assert done.code == 0, done.err
    return home


def test_data_named_again_are_divided_as_they_were(sdq, undivided, tmp_path, monkeypatch):
    """Else images that a network was trained on would be measured on."""
    monkeypatch.chdir(undivided)
    measured = read(undivided / "q" / "metrics.json")["float"]["accuracy"]
    for name in ("own.npz", "./own.npz", undivided / "own.npz"):
        done = sdq(f"evaluate q --data {name} --json --quiet")
        assert done.code == 0, done.err
        assert done.json["float"]["accuracy"] == pytest.approx(measured)
    q = "quantize --data ./own.npz --from f --search-epochs 1 --epochs 1 --bits 2 --seed 3 --quiet"
    assert sdq(q, "--out", tmp_path / "q").code == 0
    again = read(tmp_path / "q" / "metrics.json")["float"]["accuracy"]
    assert again == pytest.approx(measured)
    refused = sdq(f"{q} --teacher teacher", "--out", tmp_path / "t")
    assert refused.code == 2
    assert "data must be divided as they are here" in refused.err


def test_a_division_of_their_own_is_for_other_data(sdq, undivided):
    for given in ("--seed 5", "--split 0.2,0.2,0.6"):
        done = sdq(f"evaluate {undivided / 'q'} {given}")
        assert done.code == 2
        assert "--split, --seed: must go with --data" in done.err
        done = sdq(f"evaluate {undivided / 'q'} --data {undivided / 'own.npz'} {given}")
        assert done.code == 2
        assert "must be divided as for" in done.err


def test_data_to_measure_on_are_missed_before_any_training(sdq, undivided, tmp_path):
    data = f"--data {undivided / 'own.npz'} --split 1,0,0 --out {tmp_path / 'out'}"
    for verb in ("train --model mlp", f"quantize --model mlp --weights "
                 f"{undivided / 'f' / 'model.safetensors'} --bits 2 --ptq"):  # fmt: skip
        done = sdq(f"{verb} {data}")
        assert done.code == 2
        assert "must have a test or val split to measure on" in done.err
        assert not (tmp_path / "out").exists()


def test_one_class_is_nothing_to_tell_apart(sdq, tmp_path):
    images = np.zeros((12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "one.npz", images=images, labels=np.zeros(12, dtype=np.int64))
    done = sdq(f"train --model mlp --data {tmp_path / 'one.npz'} --out {tmp_path / 'o'}")
    assert done.code == 2
    assert "must have 2 classes or more to tell apart, got 1" in done.err
    assert not (tmp_path / "o").exists()
