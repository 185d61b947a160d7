"""Networks that are quantized in part: what is refused, what stays in float, and what it costs."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

ONNX = importlib.util.find_spec("onnx") is not None

GATED = """
import torch
from torch import nn

class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(6, 6, 1)
    def forward(self, x):
        return self.mix(x) if x.mean() > 0 else x

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4, bias=False), nn.BatchNorm2d(6),
                                  nn.ReLU())
        self.gate = Gate()
        self.mid = nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, classes)
    def forward(self, x):
        x = self.gate(self.stem(x))
        return self.head(torch.relu(self.mid(x)).mean((2, 3)))

def build(num_classes):
    return Net(num_classes)
"""


@pytest.fixture(scope="module")
def gated(sdq, files, tmp_path_factory):
    """A trained network with a part that no tracing can follow."""
    home = tmp_path_factory.mktemp("gated")
    (home / "gated.py").write_text(GATED)
    command = f"train --model {home}/gated.py:build --data {files}/ok.npz --epochs 1 --quiet --out"
    assert sdq(command, home / "float").code == 0
    return home


def test_what_cannot_be_traced_is_refused_with_the_repair(sdq, gated, files, tmp_path):
    done = sdq(
        f"quantize --from {gated}/float --data {files}/ok.npz --bits 3 --out", tmp_path / "q"
    )
    assert done.code == 2
    assert "layer 'gate' (Gate) at " in done.err
    assert "gated.py:10, `return self.mix(x) if x.mean() > 0 else x`" in done.err
    assert "--skip 'gate'" in done.err
    assert not (tmp_path / "q").exists()


def test_a_skipped_part_stays_in_float_and_is_counted(sdq, gated, files, tmp_path):
    run = tmp_path / "q"
    done = sdq(
        f"quantize --from {gated}/float --data {files}/ok.npz --bits 3 --search-epochs 1 "
        "--epochs 1 --skip gate --pin head=6 --batch-norm fold --integer-datapath --json --out",
        run,
    )
    assert done.code == 0, done.err
    assert done.json["metrics"]["float_layers"] == ["gate"]
    assert "left in float: gate" in done.out
    layers = {x["name"]: x for x in json.loads((run / "policy.json").read_text())["layers"]}
    assert {n: x["weight_bits"] for n, x in layers.items() if n != "mid"} == {
        "stem.0": 8, "gate": 32, "head": 6,
    }  # fmt: skip
    # folded: the convolution has a bias, and the normalisation is gone
    names = set(load_file(run / "model.safetensors"))
    assert "net.stem.0.bias" in names
    assert not any(".stem.1." in name for name in names)
    cost = sdq(f"cost {run} --json").json
    (gate,) = (x for x in cost["layers"] if x["name"] == "gate")
    # 6 x 6 weights and 6 biases in float; one product for each weight at 7 x 7 places
    assert (gate["params"], gate["weight_bytes"], gate["weight_bits"]) == (42, 168.0, 32)
    assert gate["macs"] == 36 * 49
    assert gate["bops"] == 36 * 49 * 32 * 32
    assert sdq(f"cost {run} --target bit_fusion --json").json["total"]["latency_s"] > 0


@pytest.mark.skipif(not ONNX, reason="sdq[export] is not installed")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the gate's decision is frozen
def test_a_partly_quantized_network_is_exported(sdq, gated, files, tmp_path):
    run = tmp_path / "q"
    quantize = f"quantize --from {gated}/float --data {files}/ok.npz --skip gate --bits 3 --quiet"
    assert sdq(f"{quantize} --search-epochs 1 --epochs 1 --out", run).code == 0
    for kind in ("onnx", "qonnx"):
        done = sdq(f"export {run} --format {kind} --verify --json")
        assert done.code == 0, done.err
        assert done.json["verification"]["verified"]


@pytest.mark.skipif(not ONNX, reason="sdq[export] is not installed")
def test_a_network_for_integer_kernels_is_exported_packed(sdq, files, tmp_path):
    """Biases are rounded in training; the file names its run, and its three sizes are printed."""
    import onnx

    data, run = f"--data {files}/ok.npz", tmp_path / "q"
    train = f"train --model resnet20 {data} --epochs 1 --quiet --out"
    assert sdq(train, tmp_path / "f").code == 0
    done = sdq(
        f"quantize --from {tmp_path}/f {data} --bits 2 --choices 2 --act-bits 8 --epochs 1 --quiet "
        "--search-method uniform --batch-norm fold --integer-datapath --integer-bias --out",
        run,
    )
    assert done.code == 0, done.err
    assert json.loads((run / "run.json").read_text())["quant"]["integer_bias"]
    done = sdq(f"export {run} --format onnx-packed --opset 25 --verify --samples 8 --json")
    assert done.code == 0, done.err
    assert done.json["verification"]["verified"]
    written = done.json["export"]
    policy = json.loads((run / "policy.json").read_text())["layers"]
    weights = sum(layer["num_weights"] * layer["weight_bits"] for layer in policy) // 8
    assert written["weight_bytes"] == written["container_bytes"] == weights  # 2 and 8 bits fit
    assert weights < written["file_bytes"] == Path(written["path"]).stat().st_size
    assert f"weights: {weights:,} bytes of information, {weights:,} in their containers" in done.out
    metadata = {x.key: x.value for x in onnx.load(written["path"]).metadata_props}
    content = (run / "model.safetensors").read_bytes()
    assert metadata["run_sha256"] == hashlib.sha256(content).hexdigest()
    for options, message in (
        ("--format onnx-packed --opset 20", "must be 21 to 25, got 20"),
        ("--format onnx --opset 99", "must be 13 to 25, got 99"),
        ("--format qonnx --opset 17", "opset must not be given for the format 'qonnx'"),
        (f"--format onnx --out {run}/policy.json", "choose a path you can read and write"),
    ):
        done = sdq(f"export {run} {options}")
        assert (done.code, message in done.err) == (2, True), done.err


def test_a_pattern_of_skip_that_matches_nothing_is_refused(sdq, gated, files, tmp_path):
    done = sdq(
        f"quantize --from {gated}/float --data {files}/ok.npz --bits 3 --skip gte --out",
        tmp_path / "q",
    )
    assert done.code == 2
    assert "'gte'" in done.err
    assert "'gate'" in done.err
