"""Budgets of devices: what is asked, what is held, what is refused, and what `sdq cost` says."""

import json

import pytest
import torch
from torch import nn

import hw
from hw.target import Demand, choices_of
from sdq.cli.device import DeviceRequest
from sdq.config import QuantConfig
from sdq.policy import BitwidthPolicy
from sdq.quant_model import quantize
from sdq.run_folder import read_layers
from sdq.search_space import SearchSpace


@pytest.fixture(scope="module")
def cnn(sdq, files, tmp_path_factory):
    """A convolutional network: its memories fit the chip."""
    run = tmp_path_factory.mktemp("cnn") / "float"
    done = sdq(f"train --model vgg_like --data {files}/ok.npz --quiet --epochs 1 --out", run)
    assert done.code == 0, done.err
    return run


def search(sdq, files, cnn, out, options):
    return sdq(
        f"search --from {cnn} --data {files}/ok.npz --quiet --json --search-epochs 1 "
        f"--act-bits 4 {options} --out",
        out,
    )


def read(run):
    return BitwidthPolicy.load(run / "policy.json"), read_layers(run / "layers.json")


def luts(run, fps):
    policy, layers = read(run)
    return hw.report(layers, policy, "pynq_z2", Demand(fps=fps)).totals["lut"]


def test_a_budget_of_luts_is_kept(sdq, files, cnn, tmp_path):
    fps = 1000
    ends = {}
    for bits in (1, 8):
        done = search(sdq, files, cnn, tmp_path / str(bits), f"--bits {bits}")
        assert done.code == 0, done.err
        ends[bits] = luts(tmp_path / str(bits), fps)
    policy, layers = read(tmp_path / "8")
    device = hw.target("pynq_z2").under(layers, Demand(fps=fps), choices_of(policy))
    # the least and the most that any policy of these layers takes, by trying each
    each = [
        [device.use(s, w, b.act_bits).costs["lut"] for w in (range(1, 9) if b.searched else (8,))]
        for s, b in zip(layers, policy, strict=True)
    ]
    least, most = sum(map(min, each)), sum(map(max, each))
    assert least <= min(ends.values())
    assert max(ends.values()) <= most
    limit = (least + most) / 2
    out = tmp_path / "s"
    done = search(
        sdq, files, cnn, out, f"--target pynq_z2 --fps {fps} --budget lut={limit} --budget dsp=100"
    )
    assert done.code == 0, done.err
    assert 0.9 * limit < luts(out, fps) <= limit
    run = json.loads((out / "run.json").read_text())
    assert run["request"]["budget"]["costs"] == {
        "pynq_z2:fps": fps, "pynq_z2:lut": limit, "pynq_z2:dsp": 100.0,
    }  # fmt: skip


def space():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(),
                        nn.Linear(144, 2))  # fmt: skip
    return SearchSpace.of(quantize(net, QuantConfig(), sample=torch.zeros(1, 3, 8, 8)))


@pytest.mark.parametrize(
    ("budget", "held"),
    [
        # the chip has 53,200 LUTs, of which 70 % can be used, and 280 memory blocks, of which 80 %
        ("lut=90000", {"lut": 37_240, "bram_18k": 224}),
        ("lut=10000", {"lut": 10_000, "bram_18k": 224}),
        ("latency_s=1", {"latency_s": 5e-3, "lut": 37_240}),
        ("latency_s=0.002", {"latency_s": 2e-3, "lut": 37_240}),
    ],
)
def test_the_stricter_of_two_limits_is_held(budget, held):
    request = DeviceRequest.of("pynq_z2", 5.0, None, [budget])
    found = {cost.__name__: limit for cost, limit in request.costs(space())}
    assert {name: found[name] for name in held} == pytest.approx(held)


def test_a_chip_without_memories_is_refused(tmp_path, refuses):
    """Every layer takes some: nothing can be searched for it."""
    board = tmp_path / "none.py"
    board.write_text(
        "from hw.models.fpga_dataflow import DataflowFpga\n"
        "TARGET = DataflowFpga(capacity={'lut': 50_000, 'bram_18k': 0, 'dsp': 0}, clock_hz=1e8,"
        " dsp_slice='DSP48E2')\n"
    )
    with refuses("must have some bram_18k for a search, got none"):
        DeviceRequest.of(str(board), 5.0).costs(space())


def test_a_latency_folds_the_units(sdq, files, cnn, tmp_path):
    done = search(sdq, files, cnn, tmp_path / "s", "--target pynq_z2 --latency-ms 5")
    assert done.code == 0, done.err
    found = sdq(f"cost {tmp_path}/s --target pynq_z2 --latency-ms 5 --json").json
    assert 4e-3 < found["total"]["latency_s"] <= 5e-3
    assert found["total"]["fits"]
    assert found["total"]["limits"]["latency_s"] == 5e-3
    row = next(x for x in found["layers"] if x["name"] == found["total"]["bottleneck"])
    assert row["cycles"] == max(x["cycles"] for x in found["layers"])
    assert {"lut", "bram_18k", "dsp", "pe", "simd", "unit"} <= set(row)


def test_without_a_demand_the_fastest_that_fits_is_shown(sdq, files, cnn, tmp_path):
    assert search(sdq, files, cnn, tmp_path / "s", "--bits 4").code == 0
    done = sdq(f"cost {tmp_path}/s --target pynq_z2 --json")
    assert done.code == 0, done.err
    total = done.json["total"]
    assert total["fits"]
    assert total["shares"] == {
        name: total[name] / n for name, n in {"lut": 53200, "bram_18k": 280, "dsp": 220}.items()
    }
    faster = sdq(f"cost {tmp_path}/s --target pynq_z2 --json --fps {total['fps'] * 2}")
    assert faster.code == 2 or not faster.json["total"]["fits"]
    assert "<- bottleneck" in done.out
    assert "lut: " in done.out


def test_bits_are_legal_for_the_kind_of_layer(sdq, files, cnn, tmp_path):
    for run, legal in ((files / "float", {4, 8}), (cnn, {8})):
        out = tmp_path / run.parent.name
        done = search(sdq, files, run, out, "--target a100 --act-bits 8 --bits 8 --choices 1,2,4,8")
        assert done.code == 0, done.err
        policy, _ = read(out)
        asked = json.loads((out / "run.json").read_text())["quant"]
        searched = [b for b in policy if b.searched]
        special = dict(asked["layer_choices"])
        assert {x for b in searched for x in special.get(b.name, asked["bit_choices"])} == legal
        assert {b.weight_bits for b in searched} <= legal
    done = search(
        sdq,
        files,
        cnn,
        tmp_path / "m7",
        "--target cortex_m7 --act-bits 8 --budget flash_bytes=60000",
    )
    assert done.code == 0, done.err
    policy, layers = read(tmp_path / "m7")
    assert {b.weight_bits for b in policy} <= {2, 4, 8}
    assert 50_000 < hw.report(layers, policy, "cortex_m7").totals["flash_bytes"] <= 60_000
    done = search(sdq, files, cnn, tmp_path / "pin", "--target a100 --act-bits 8 --bits 8 "
                  "--pin features.3=3")  # fmt: skip
    assert done.code == 2
    assert "--pin features.3: must have bits that a100 computes with (8, 32), got 3" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--fps 100", "--fps: must stand with --target"),
        ("--budget lut=10", "--budget lut: must stand with --target"),
        ("--target pynq_z2 --fps 0", "--fps: must be a positive number, got 0.0"),
        ("--target pynq_z2 --fps 10 --budget lut", "--budget: must be 'PATTERN=VALUE', got 'lut'"),
        ("--target pynq_z2 --fps 10 --budget lut=a", "--budget: must be numbers"),
        ("--target pynq_z2 --fps 10 --budget luts=9", "did you mean 'lut'? Known: bram_18k, dsp"),
        ("--target pynq_z2 --budget lut=90000", "demand: must be given, for a dataflow"),
        ("--target pynq_z2 --fps 1e9", "1e+09 fps must be within reach of every candidate"),
        ("--target pynq_z2 --latency-ms 1e-5", "with these bits no less than"),
        ("--target pynq_z2 --fps 100 --budget lut=10", "budget: lut must be at least"),
        ("--target pynq_z2 --fps 100 --act-bits 16", "--act-bits: must have bits that pynq_z2"),
        ("--target pynq_z2 --fps 100 --first-last-bits 32", "must be dense or depthwise"),
        ("--target pynq_z2 --fps 100 --granularity channel", "--granularity: must be layer"),
    ],
)
def test_refusals(sdq, files, cnn, tmp_path, options, message):
    done = search(sdq, files, cnn, tmp_path / "s", options)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "s").exists()
