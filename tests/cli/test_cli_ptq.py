"""``sdq quantize --ptq``: what it leaves, what it refuses, and that it sees no labels."""

import json

import pytest
from safetensors.torch import load_file

PTQ = "quantize --from {f}/float --data {f}/ok.npz --bits 3 --act-bits 8 --ptq --quiet"


@pytest.fixture(scope="module")
def run(sdq, files, tmp_path_factory):
    out = tmp_path_factory.mktemp("ptq") / "q"
    done = sdq(PTQ.format(f=files) + " --ptq-steps 5 --json --out", out)
    assert done.code == 0, done.err
    return out, done.json


def test_a_run_says_what_it_was_and_what_came_out(run):
    out, printed = run
    document = json.loads((out / "run.json").read_text())
    assert document["status"] == "done"
    assert document["request"]["ptq"]["steps"] == 5
    assert document["request"]["train"] is None
    assert document["request"]["search"]["train_weights"] is False
    metrics = json.loads((out / "metrics.json").read_text())
    assert printed["metrics"] == metrics
    assert metrics["avg_weight_bits"] <= 3
    layers = [name for block in metrics["blocks"] for name in block["layers"]]
    assert layers == [b["name"] for b in json.loads((out / "layers.json").read_text())["layers"]]
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [x["error"] for x in logged if x["phase"] == "rounding"] == [
        block["error"] for block in metrics["blocks"]
    ]


def test_labels_change_nothing(sdq, files, tmp_path, run):
    command = PTQ.format(f=files).replace("ok.npz", "other.npz") + " --ptq-steps 5 --out"
    assert sdq(command, tmp_path / "q").code == 0
    for name in ("model.safetensors", "policy.json", "metrics.json"):
        assert (tmp_path / "q" / name).read_bytes() == (run[0] / name).read_bytes()


@pytest.mark.parametrize("method", ["sdq", "greedy", "uniform", "hessian"])
def test_labels_change_nothing_in_any_search(sdq, files, tmp_path, method):
    for data in ("ok", "other"):
        command = PTQ.format(f=files).replace("ok.npz", f"{data}.npz")
        command += f" --search-method {method} --search-epochs 1 --ptq-steps 0 --out"
        assert sdq(command, tmp_path / data).code == 0
    first, second = (load_file(tmp_path / d / "model.safetensors") for d in ("ok", "other"))
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.parametrize("format", ["onnx", "qonnx"])
def test_the_file_of_a_run_is_verified(sdq, run, tmp_path, format):
    done = sdq(f"export {run[0]} --format {format} --verify --out", tmp_path / "file")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("changed", "method"),
    [
        ("", "sensitivity"),
        ("--act-bits 4 --learn-act-bits --search-epochs 1", "sdq"),
        ("--act-bits 8 --granularity channel", "hessian"),
        ("--act-bits 8 --config {f}/channels.json", "hessian"),
    ],
)
def test_bits_are_chosen_by_a_method_that_can(sdq, files, tmp_path, changed, method):
    (files / "channels.json").write_text('{"search": {"granularity": "channel"}}')
    command = PTQ.format(f=files)
    if changed:
        command = command.replace("--act-bits 8", changed.format(f=files))
    assert sdq(f"{command} --ptq-steps 1 --out", tmp_path / "q").code == 0
    request = json.loads((tmp_path / "q" / "run.json").read_text())["request"]
    assert request["search_method"] == method


def test_a_given_policy_is_used(sdq, files, tmp_path):
    command = PTQ.format(f=files).replace("--bits 3 --act-bits 8", "--ptq-steps 2")
    command += f" --policy {files}/searched/policy.json --out"
    assert sdq(command, tmp_path / "q").code == 0
    found = json.loads((tmp_path / "q" / "policy.json").read_text())
    assert found == json.loads((files / "searched" / "policy.json").read_text())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--epochs 3", "--epochs: must stand without --ptq"),
        ("--lr 1e-3", "--lr: must stand without --ptq"),
        ("--no-distill", "--no-distill: must stand without --ptq"),
        ("--teacher {f}/float", "--teacher: must stand without --ptq"),
        ("--bn-batches 2", "--bn-batches: must stand without --ptq"),
        ("--devices 2", "--devices: must stand without --ptq"),
        ("--precision bf16", "--precision: must stand without --ptq"),
        ("--weight-quantizer dorefa", "weight_quantizer must be 'lsq'"),
        ("--ptq-images 0", "--ptq-images"),
    ],
)
def test_what_does_not_fit_is_refused(sdq, files, tmp_path, options, expected):
    done = sdq(f"{PTQ} {options}".format(f=files) + " --out", tmp_path / "q")
    assert done.code == 2
    assert expected in done.err
    assert not (tmp_path / "q").exists()


@pytest.mark.parametrize("options", ["--ptq-images 5", "--ptq-steps 5"])
def test_its_options_need_it(sdq, files, tmp_path, options):
    command = PTQ.format(f=files).replace("--ptq ", "")
    done = sdq(f"{command} {options} --out", tmp_path / "q")
    assert done.code == 2
    assert "must stand with --ptq" in done.err
