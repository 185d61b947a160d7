"""Bits of channels, of blocks and of activations, and a latency: from the search to the file."""

import importlib.util
import json

import pytest

ONNX = importlib.util.find_spec("onnx") is not None


def quantize(sdq, files, run, options):
    common = f"--from {files / 'float'} --data {files / 'ok.npz'} --search-epochs 1 --epochs 1"
    done = sdq(f"quantize {common} {options} --json --quiet --out {run}")
    assert done.code == 0, done.err
    return done.json["metrics"], json.loads((run / "policy.json").read_text())["layers"]


def exported(sdq, run, formats=("onnx", "qonnx")):
    """Return what the exports say, if they can be made; all are verified."""
    found = []
    for format in formats if ONNX else ():
        done = sdq(f"export {run} --format {format} --verify --samples 20 --json")
        assert done.code == 0, done.err + done.out
        assert done.json["verification"]["verified"] is True
        assert done.json["verification"]["exact"]["different"] == 0
        found.append(done.json["export"])
    return found


def test_channels_go_all_the_way(sdq, files, tmp_path):
    run = tmp_path / "run"
    metrics, layers = quantize(sdq, files, run, "--granularity channel --choices 1,2,4 --bits 2")
    assert metrics["avg_weight_bits"] <= 2
    each = {x["name"]: x.get("channel_bits") for x in layers}
    assert any(len(set(bits)) > 1 for bits in each.values() if bits)
    for written in exported(sdq, run):
        for x in layers:
            bits = each[x["name"]] or [x["weight_bits"]]
            assert written["weight_bits"][x["name"]] == (bits if len(set(bits)) > 1 else bits[0])
    found = sdq(f"evaluate {run} --json").json["quantized"]["accuracy"]
    # batches of another size: float32 sums may differ in the last digits
    assert found == pytest.approx(metrics["quantized"]["accuracy"], abs=1e-4)
    costs = sdq(f"cost {run} --target bit_fusion --json").json
    for key in ("avg_weight_bits", "avg_weight_bits_all", "weight_bytes", "bops"):
        assert costs["total"][key] == metrics[key]
    for row in costs["layers"]:
        bits = each[row["name"]]
        if bits:
            assert row["weight_bits"] == pytest.approx(sum(bits) / len(bits))
        assert row["cycles"] > 0


@pytest.mark.parametrize("verb", ["quantize", "search"])
def test_a_latency_is_no_sum_over_channels(sdq, files, tmp_path, verb):
    done = sdq(
        f"{verb} --from {files / 'float'} --data {files / 'ok.npz'} --granularity channel "
        f"--target bit_fusion --latency-ms 1 --out {tmp_path / 'run'}"
    )
    assert done.code == 2
    assert "--granularity: must be layer, block or network with a device's limits" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    ["", "--granularity block", "--learn-act-bits", "--granularity network --learn-act-bits"],
)
def test_a_latency_is_kept(sdq, files, tmp_path, options):
    run = tmp_path / "run"
    # the ends take ceil(2352 / 16) * 128 / 32 + 64 / 16 = 592 cycles of 2 ns; 8 are left for the
    # layers between, which take 12 at 8 bits with inputs of 4
    limit = 1.2e-6
    quantize(sdq, files, run, f"--target bit_fusion --latency-ms 0.0012 {options}")
    found = sdq(f"cost {run} --target bit_fusion --json").json["total"]["latency_s"]
    assert 1.184e-6 < found <= limit
    exported(sdq, run)


def test_activations_of_sixteen_bits(sdq, files, tmp_path):
    run = tmp_path / "run"
    _, layers = quantize(sdq, files, run, "--bits 4 --act-bits 16")
    assert 16 in {x["act_bits"] for x in layers}
    exported(sdq, run, ["qonnx"])
    if ONNX:
        done = sdq(f"export {run} --format onnx --out {tmp_path / 'onnx'}")
        assert done.code == 2
        assert "must have at most 8 bits in onnx, or 32 for float, got 16; " in done.err
        assert "--act-bits 8, or --format qonnx" in done.err
        assert not (tmp_path / "onnx").exists()
