"""``--for``: what a target accepts is chosen, and ``export --check``: what it does not is said."""

import json

import pytest

from sdq.run_folder import RunFolder

QUANTIZE = "quantize --from {f}/float --data {f}/ok.npz --search-epochs 1 --epochs 1 --bits 3"
SEARCH = "search --from {f}/float --data {f}/ok.npz --search-epochs 1 --bits 3"

CONTRADICTIONS = [
    ("--for fin", "--for: unknown name 'fin'; did you mean 'finn'?"),
    ("--for tensorrt", "Known: finn, hls4ml, onnxruntime"),
    ("--for finn --batch-norm fold", "--batch-norm: must be one of 'train', 'freeze' to prepare "
     "for finn (--for finn), got 'fold'; drop one of the two"),
    ("--for finn --weight-quantizer dorefa", "--weight-quantizer: must be 'lsq' to prepare for "),
    ("--for finn --act-bits 16", "--act-bits: must be one of 2, 3, 4, 5, 6, 7, 8 to prepare for "),
    ("--for finn --first-last-bits 32", "--first-last-bits: must be one of 1, 2, 3,"),
    ("--for finn --pin layers.1=32", "--pin: must be one of 1, 2, 3, 4, 5, 6, 7, 8 to prepare"),
    ("--for finn --granularity channel", "--granularity: must be one of network, block, layer to "
     "prepare for finn (--for finn), got 'channel'"),
    ("--for finn --learn-act-bits --act-choices 16", "--act-choices: must be among 2, 3, 4, 5, 6,"),
    ("--for hls4ml --act-bits 16", "--act-bits: must be one of 2, 3, 4, 5, 6, 7, 8 to prepare"),
    ("--for onnxruntime --batch-norm train", "--batch-norm: must be 'fold' to prepare for "),
    ("--for onnxruntime --act-bits 16", "--act-bits: must be one of 2, 3, 4, 5, 6, 7, 8, 32 to "),
    ("--for finn --config {f}/chosen.json", "--config: quant.integer_datapath: must be True to "),
]  # fmt: skip


@pytest.mark.parametrize("verb", [QUANTIZE, SEARCH])
@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_an_option_that_contradicts_the_target_is_refused(
    sdq, files, tmp_path, verb, options, message
):
    (files / "chosen.json").write_text('{"quant": {"integer_datapath": false}}')
    done = sdq(f"{verb} {options}".format(f=files), "--out", tmp_path / "run")
    assert (done.code, message in done.err) == (2, True), done.err
    assert not (tmp_path / "run").exists()


def test_what_matters_to_the_target_is_chosen_and_recorded(sdq, files, tmp_path):
    run = tmp_path / "run"
    command = f"{SEARCH} --for finn --learn-act-bits --act-choices 4,8,16 --quiet"
    done = sdq(command.format(f=files), "--out", run)
    assert done.code == 0, done.err
    document = RunFolder.open(run).read_json("run.json")
    assert document["request"]["for"] == "finn"
    quant = document["quant"]
    assert quant["integer_datapath"] is True
    assert quant["act_choices"] == [4, 8]
    assert (quant["batch_norm"], quant["weight_quantizer"]) == ("train", "lsq")


def test_what_somebody_chose_stays(sdq, files, tmp_path):
    run = tmp_path / "run"
    (files / "input.json").write_text('{"quant": {"input_bits": 6}}')
    command = f"{SEARCH} --for onnxruntime --act-bits 6 --config {{f}}/input.json --quiet"
    assert sdq(command.format(f=files), "--out", run).code == 0
    quant = RunFolder.open(run).read_json("run.json")["quant"]
    assert (quant["act_bits"], quant["input_bits"], quant["batch_norm"]) == (6, 6, "fold")


SPECIAL = """
import torch
from torch import nn

def gated():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(), nn.Conv2d(4, 4, 3, groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * 24 * 24, 7),
    )

class Gamma(nn.Module):
    def forward(self, x):
        return torch.lgamma(x.abs() + 1)

def gamma():
    return nn.Sequential(
        nn.Conv2d(3, 2, 3, 4), Gamma(), nn.Conv2d(2, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(2 * 7 * 7, 7),
    )
"""


@pytest.fixture(scope="module")
def gated(sdq, files):
    """A run of a network that FINN cannot take, in two places."""
    (files / "special.py").write_text(SPECIAL)
    model, data = f"{files / 'special.py'}:gated", f"--data {files / 'ok.npz'} --quiet"
    assert sdq(f"train --model {model} {data} --epochs 1 --out", files / "gated").code == 0
    run = files / "gated_quantized"
    command = f"quantize --from {files / 'gated'} {data} --search-epochs 1 --epochs 1 --bits 3"
    assert sdq(command, "--out", run).code == 0
    return run


def test_a_network_the_target_cannot_take_is_refused_before_training(sdq, files, tmp_path, gated):
    command = f"quantize --from {files}/gated --data {files}/ok.npz --bits 3 --for finn"
    done = sdq(command, "--out", tmp_path / "run")
    assert done.code == 2
    assert "finn cannot take this network; 2 things must change" in done.err
    assert "2: must be a layer that FINN has between quantizers, got SiLU; use nn.ReLU" in done.err
    assert "3: must have one group, or as many as channels" in done.err
    assert not (tmp_path / "run").exists()


def test_check_says_all_at_once(sdq, gated, tmp_path):
    done = sdq(f"export {gated} --format finn --check --json")
    assert done.code == 2
    assert "SiLU" in done.out
    assert "use nn.ReLU" in done.out
    document = done.json
    assert (document["format"], document["accepted"]) == ("finn", False)
    assert [finding["layer"] for finding in document["findings"]] == ["2", "3"]
    assert set(document["findings"][0]) == {"layer", "rule", "got", "repair"}
    assert not (gated / "export").exists()


def test_check_of_several_formats_is_one_document(sdq, gated):
    done = sdq(f"export {gated} --format qonnx,finn --check --json --quiet")
    assert done.code == 2
    found = {one["format"]: one["accepted"] for one in done.json["exports"]}
    assert found == {"qonnx": True, "finn": False}
    assert len(done.out.splitlines()) == 1


def test_check_tries_what_the_exporter_can_write(sdq, files, tmp_path, capfd):
    """What it says is all that is printed: torch's own report of the graph is not JSON."""
    (files / "special.py").write_text(SPECIAL)
    model, data = f"{files / 'special.py'}:gamma", f"--data {files / 'ok.npz'} --quiet"
    assert sdq(f"train --model {model} {data} --epochs 1 --out", tmp_path / "f").code == 0
    command = f"quantize --from {tmp_path / 'f'} {data} --search-epochs 1 --epochs 1 --bits 3"
    assert sdq(command, "--out", tmp_path / "q").code == 0
    capfd.readouterr()
    done = sdq(f"export {tmp_path / 'q'} --format onnx,qonnx --check --json --quiet")
    assert done.code == 2
    found = [entry["findings"] for entry in done.json["exports"]]
    assert [[finding["layer"] for finding in one] for one in found] == [["aten::lgamma"]] * 2
    assert len(done.out.splitlines()) == 1
    assert "graph(" not in capfd.readouterr().out


def test_an_export_without_check_refuses_with_the_same(sdq, gated, tmp_path):
    findings = sdq(f"export {gated} --format finn --check --json --quiet").json["findings"]
    done = sdq(f"export {gated} --format finn --out {tmp_path / 'x'}")
    assert done.code == 2
    for finding in findings:
        said = "{layer}: {rule}, got {got}; {repair}".format(**finding)
        assert said in done.err
    assert not (tmp_path / "x").exists()


def test_a_format_that_takes_everything_accepts(sdq, gated):
    done = sdq(f"export {gated} --format qonnx --check --json")
    assert (done.code, done.json["accepted"], done.json["findings"]) == (0, True, [])
    assert f"qonnx takes {gated} as it is" in done.out
    assert json.loads(done.out.splitlines()[-1])["format"] == "qonnx"


def test_check_of_a_network_that_is_accepted(sdq, files):
    done = sdq(f"export {files / 'quantized'} --format finn --check")
    assert (done.code, done.err) == (0, "")


def test_check_of_a_skipped_layer(sdq, files, tmp_path):
    run = tmp_path / "run"
    command = f"{QUANTIZE} --skip layers.4 --quiet".format(f=files)
    assert sdq(command, "--out", run).code == 0
    found = sdq(f"export {run} --format finn --check --json --quiet").json["findings"]
    assert [(f["layer"], f["got"]) for f in found] == [("layers.4", "a Linear left in float")]
    assert "--skip" in found[0]["repair"]


@pytest.mark.parametrize("option", ["--verify", "--out x"])
def test_check_writes_nothing_and_says_so(sdq, files, option):
    done = sdq(f"export {files / 'quantized'} --check {option}")
    assert done.code == 2
    assert "--check: must stand without --out, --build and --verify" in done.err
