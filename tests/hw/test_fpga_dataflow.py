"""The dataflow family: FINN+ 1.6.1's own estimates, recorded, and numbers by hand."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import hw
from hw import dataflow_units as units
from hw.dataflow_units import Window
from hw.memories import bram_18k, least_waste
from hw.models.fpga_dataflow import DataflowFpga
from hw.target import Demand, choices_of
from hw.targets.pynq_z2 import TARGET
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.quant_model import quantize

INTERVAL = 100_000
"""Cycles of 1000 samples a second at 100 MHz."""

# what FINN+ reported of networks with these layers: rows, columns, positions, bits of weights and
# activations, then cycles, LUT, BRAM_18K and DSP
MATRIX = [
    ((16, 27, 1024, 8, 8), None, (49_152, 1413, 2, 0)),
    ((16, 144, 1024, 2, 4), None, (98_304, 780, 2, 0)),
    ((32, 144, 256, 3, 4), None, (98_304, 768, 1, 0)),
    ((32, 288, 256, 4, 4), None, (65_536, 1914, 4, 0)),
    ((64, 288, 64, 6, 3), None, (98_304, 909, 8, 0)),
    ((64, 576, 64, 8, 4), None, (73_728, 2482, 30, 0)),
    ((32, 16, 256, 3, 4), None, (65_536, 380, 1, 0)),
    ((128, 64, 16, 6, 4), None, (65_536, 415, 4, 0)),
    ((10, 1024, 1, 8, 8), "DSP48E1", (10_240, 0, 5, 1)),
    ((16, 27, 1024, 8, 8), "DSP48E1", (49_152, 0, 2, 9)),
    ((64, 576, 64, 8, 4), "DSP48E1", (73_728, 0, 30, 8)),
]


@pytest.mark.parametrize(("layer", "dsp_slice", "finn"), MATRIX)
def test_matrix_units_are_finn_s(layer, dsp_slice, finn) -> None:
    unit = units.matrix(*layer, INTERVAL, dsp_slice=dsp_slice)
    assert (unit.cycles, unit.bram_18k, unit.dsp) == (finn[0], *finn[2:])
    # FINN's accumulators are as wide as the weights' values ask: two bits either way, 1.1 LUT each
    assert unit.lut == pytest.approx(finn[1], abs=2 * 1.1 * unit.pe + 1)


@pytest.mark.parametrize(
    ("layer", "finn"),  # as MATRIX, at 4000 samples a second, with weights of -1 and +1 (BIPOLAR)
    [
        ((32, 144, 196, 1, 4), (18_816, 1099, 2)),
        ((64, 288, 49, 1, 4), (18_816, 1100, 2)),
        ((64, 576, 49, 1, 4), (12_544, 2715, 4)),
    ],
)
def test_units_of_one_bit_are_finn_s(layer, finn) -> None:
    unit = units.matrix(*layer, 25_000, dsp_slice=None)
    assert (unit.cycles, unit.bram_18k) == (finn[0], finn[2])
    assert unit.lut == pytest.approx(finn[1], abs=2 * 1.1 * unit.pe + 1)


def test_taps_that_meet_nothing_but_padding_cost_nothing() -> None:
    layers = quantize(
        nn.Sequential(
            nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.Flatten(),
        ),
        QuantConfig(integer_datapath=True), sample=torch.zeros(1, 3, 3, 3),
    ).layers  # fmt: skip
    target = replace(TARGET, network=tuple(layers))
    dense, each = (target.units(spec, 4, 4) for spec in layers[1:3])
    assert [unit.kind for unit in dense] == ["thresholds", "matrix"]
    assert [unit.kind for unit in each] == ["thresholds", "depthwise"]
    assert (dense[-1].cycles, each[-1].cycles) == (4 * 6, 6)


def test_a_matrix_unit_by_hand() -> None:
    # simd 9 is the first divisor of 27 with 16 * 27 / simd * 1024 <= 100,000 cycles; its products
    # have 16 bits: 9 * (2 ceil(16 / 6) - 1) * 16 = 720 for them, 16 * 17 = 272 for the adder tree,
    # and ceil(log2 27 + 16 + 1e-6) - 2 = 19 for the accumulator: 300 + 1.1 * 1011
    unit = units.matrix(16, 27, 1024, 8, 8, INTERVAL, dsp_slice=None)
    assert (unit.pe, unit.simd, unit.lut) == (1, 9, 1412)
    # 8-bit weights: no more than 4 of them in 36 bits, then 8 rows: 64 / 8 * 576 / 4 * 64
    unit = units.matrix(64, 576, 64, 8, 4, INTERVAL, dsp_slice=None)
    assert (unit.pe, unit.simd, unit.cycles) == (8, 4, 73_728)


def view(side, out, kernel, stride, channels) -> Window:
    return Window((side, side), (out, out), (kernel, kernel), (stride, stride), (1, 1), channels)


WINDOWS = [
    (view(34, 32, 3, 1, 3), 8, False, (27_861, 348)),
    (view(34, 32, 3, 1, 16), 4, False, (74_296, 420)),
    (view(34, 16, 3, 2, 16), 4, False, (38_000, 464)),
    (view(34, 16, 3, 2, 3), 8, False, (7_125, 364)),
    (view(18, 16, 3, 1, 16), 4, True, (37_488, 368)),
    (view(18, 8, 3, 2, 32), 4, True, (22_240, 464)),
    (view(32, 16, 2, 2, 16), 4, True, (21_280, 408)),
    (view(8, 4, 2, 2, 64), 8, True, (6_256, 492)),
    (view(32, 16, 1, 2, 16), 4, False, (16_386, 304)),
]


@pytest.mark.parametrize(("sliding", "bits", "each_channel", "finn"), WINDOWS)
def test_windows_are_finn_s(sliding, bits, each_channel, finn) -> None:
    unit = units.window(sliding, bits, INTERVAL, each_channel=each_channel)
    assert (unit.cycles, unit.lut) == finn


# channels, places, bits of a border, bits of a code; then cycles, LUT, BRAM
THRESHOLDS = [
    ((16, 1024, 5, 4), (16_384, 25, 0)),
    ((32, 256, 5, 4), (8_192, 40, 0)),
    ((64, 64, 9, 8), (4_096, 279, 7)),
    ((128, 1, 32, 8), (128, 16_320, 0)),
    ((3, 1024, 32, 8), (3_072, 512, 0)),
]


@pytest.mark.parametrize(("layer", "finn"), THRESHOLDS)
def test_thresholds_are_finn_s(layer, finn) -> None:
    unit = units.thresholds(*layer, INTERVAL, uram=False)
    assert (unit.cycles, unit.lut, unit.bram_18k) == finn


def test_depthwise_units_are_finn_s() -> None:
    # 16 channels of 18 x 18, four bits each; FINN: 552 LUTs with the thresholds inside
    found = units.depthwise(view(18, 16, 3, 1, 16), 4, 4, INTERVAL)
    assert [unit.kind for unit in found] == ["window", "depthwise"]
    assert (found[1].cycles, found[1].bram_18k) == (36_864, 1)
    inside = units.unit_thresholds(units.accumulator_bits(9, 4, 4), 1, 16, 4)
    assert found[1].lut + inside == 552
    # faster than all channels at once: then within the window
    fast = units.depthwise(view(18, 16, 3, 1, 16), 4, 4, 800)
    assert (fast[1].pe, fast[1].simd, fast[0].simd) == (16, 3, 16)


def test_other_units_by_hand() -> None:
    assert units.streaming("global pool", 64, 64, INTERVAL, passes=1).cycles == 4_160
    assert units.streaming("add", 64, 64, 1_000).pe == 8  # 64 / 4 * 64 is still too slow
    assert units.concat((64, 32), 100, 2_000).cycles == 1_200  # 96 / 8; 96 / 4 takes 2,400
    sliding, reduce = units.pool(view(32, 16, 2, 2, 16), 4, INTERVAL)
    assert (sliding.cycles, reduce.cycles) == (21_280, 16_384)


@pytest.mark.parametrize(
    ("width", "depth", "blocks"),
    [(1, 16384, 1), (1, 16385, 2), (2, 8193, 2), (4, 4096, 1), (8, 2049, 2), (9, 2048, 1),
     (18, 1024, 1), (19, 1024, 2), (36, 512, 1), (37, 512, 2), (36, 513, 2)],
)  # fmt: skip
def test_memory_blocks_by_hand(width: int, depth: int, blocks: int) -> None:
    assert bram_18k(width, depth) == blocks


def test_the_memory_with_least_waste() -> None:
    assert least_waste(9, 1024) == ("lut", 144)  # 9 * 16 of 64 bits, nothing wasted
    assert least_waste(72, 4096) == ("uram", 1)
    assert least_waste(72, 4096, uram=False) == ("bram_18k", 16)


def small(side: int = 8) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * (side // 2) ** 2, 5),
    )  # fmt: skip


def placed(demand: Demand, device: DataflowFpga = TARGET, act_bits: int = 4):
    qmodel = quantize(small(), QuantConfig(act_bits=act_bits), sample=torch.zeros(1, 3, 8, 8))
    return qmodel, device.under(qmodel.layers, demand, choices_of(qmodel.policy))


def kinds(device: DataflowFpga, qmodel) -> list[list[str]]:
    return [
        [unit.kind for unit in device.units(spec, bits.weight_bits, bits.act_bits)]
        for spec, bits in zip(qmodel.layers, qmodel.policy, strict=True)
    ]


def test_a_layer_is_charged_for_what_leads_to_it() -> None:
    qmodel, device = placed(Demand(fps=1000))
    assert kinds(device, qmodel) == [
        ["thresholds", "padding", "window", "matrix"],
        ["thresholds", "window", "pool", "padding", "window", "depthwise"],
        ["thresholds", "matrix"],
        ["thresholds", "matrix"],
    ]
    embedded = replace(device, standalone_thresholds=False)
    assert kinds(embedded, qmodel)[1:] == [
        ["window", "pool", "padding", "window", "depthwise"],
        ["thresholds", "matrix"],  # those of a depthwise unit, which FINN counts
        ["matrix"],
    ]


def test_interval_and_latency() -> None:
    qmodel, device = placed(Demand(fps=10_000))
    found = device.cost(qmodel.layers, qmodel.policy)
    assert device.interval == 10_000
    cycles = [
        [unit.cycles for unit in device.units(spec, bits.weight_bits, bits.act_bits)]
        for spec, bits in zip(qmodel.layers, qmodel.policy, strict=True)
    ]
    assert found.totals["interval_cycles"] == max(map(max, cycles)) <= 10_000
    assert found.totals["fps"] == 100e6 / max(map(max, cycles))
    assert found.latency_s == pytest.approx(sum(map(sum, cycles)) / 100e6)
    assert found.layer_cycles == tuple(map(max, cycles))


def test_a_latency_is_the_sum_of_all_units_and_folds_no_more_than_needed() -> None:
    _, unfolded = placed(Demand(fps=1))
    for latency_s in (1e-3, 3e-4, 1e-4):
        qmodel, device = placed(Demand(latency_s=latency_s))
        found = device.cost(qmodel.layers, qmodel.policy)
        assert found.latency_s <= latency_s
        slower = replace(device, interval=device.interval + 1)
        assert (
            slower.cost(qmodel.layers, qmodel.policy).latency_s > latency_s
            or device.interval >= unfolded.cost(qmodel.layers, qmodel.policy).layer_cycles[0]
        )


def test_what_cannot_be_reached_is_refused_with_what_can() -> None:
    with pytest.raises(RequestError, match=r"at most ([\d.e+]+) fps can be") as error:
        placed(Demand(fps=1e8))
    most = float(str(error.value).split("at most ")[1].split()[0])
    qmodel, device = placed(Demand(fps=most * 0.999))
    assert device.cost(qmodel.layers, qmodel.policy).totals["fps"] >= most * 0.999
    with pytest.raises(RequestError, match="must be within reach"):
        placed(Demand(fps=most * 1.01))
    with pytest.raises(RequestError, match=r"1e-09 s must .* no less than ([\d.e-]+) s") as error:
        placed(Demand(fps=1, latency_s=1e-9))
    least = float(str(error.value).split("no less than ")[1].split()[0])
    qmodel, device = placed(Demand(latency_s=least * 1.001))
    assert device.cost(qmodel.layers, qmodel.policy).latency_s <= least * 1.001
    with pytest.raises(RequestError, match="must be within reach"):
        placed(Demand(latency_s=least * 0.99))


def test_a_latency_does_not_ask_every_layer_for_the_pace_of_the_others() -> None:
    """A layer without more parallelism may take longer, if the sum allows it."""
    qmodel, fastest = placed(Demand(fps=1))
    fastest = replace(fastest, interval=1)
    cost = fastest.cost(qmodel.layers, qmodel.policy)
    _, device = placed(Demand(latency_s=cost.latency_s * 1.01))
    found = device.cost(qmodel.layers, qmodel.policy)
    assert device.interval < max(found.layer_cycles)
    assert found.latency_s <= cost.latency_s * 1.01


def test_without_a_demand_a_policy_gets_the_highest_rate_that_fits() -> None:
    tiny = replace(TARGET, capacity={"lut": 12_000, "bram_18k": 60, "dsp": 20, "uram": 0})
    qmodel, device = placed(Demand(), tiny)
    assert device.cost(qmodel.layers, qmodel.policy).fits
    fastest = max(replace(device, interval=1).cost(qmodel.layers, qmodel.policy).layer_cycles)
    tried = [int(fastest * 1.1**i) for i in range(200)]
    for interval in tried[: tried.index(device.interval)]:
        assert not replace(device, interval=interval).cost(qmodel.layers, qmodel.policy).fits
    none = replace(TARGET, capacity={"lut": 100, "bram_18k": 60, "dsp": 20, "uram": 0})
    qmodel, device = placed(Demand(), none)
    found = device.cost(qmodel.layers, qmodel.policy)
    assert found.over == ("lut",)
    assert not found.fits


def test_limits_are_the_usable_share() -> None:
    assert TARGET.limits == {
        "lut": pytest.approx(37_240), "bram_18k": 224.0, "dsp": 176.0,
    }  # fmt: skip


def test_units_in_dsp_slices_from_four_bits_on() -> None:
    qmodel, device = placed(Demand(fps=1000), hw.target("ultra96"))
    spec = qmodel.layers[2]
    assert device.use(spec, 4, 4).costs["dsp"] > 0
    assert device.use(spec, 3, 4).costs["dsp"] == device.use(spec, 4, 3).costs["dsp"] == 0
    assert device.use(spec, 3, 4).costs["lut"] > device.use(spec, 4, 4).costs["lut"]
    qmodel, device = placed(Demand(fps=1000))  # a DSP48E1 does not, for weights of lowest code
    assert device.use(spec, 8, 8).costs["dsp"] == 0
    narrow = replace(device, narrow_weights=True)
    assert narrow.use(spec, 8, 8).costs["dsp"] > 0


@pytest.mark.parametrize(
    ("network", "bits"),
    [
        (nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), 8),  # groups, but not of one channel
        (nn.Sequential(nn.Conv2d(4, 8, 3)), 32),
    ],
)
def test_what_finn_cannot_build_is_refused(network: nn.Module, bits: int) -> None:
    qmodel = quantize(network, QuantConfig(), sample=torch.zeros(1, 4, 8, 8))
    policy = BitwidthPolicy(
        tuple(LayerBits(b.name, bits, 8, False, b.num_weights) for b in qmodel.policy)
    )
    with pytest.raises(RequestError, match="layer 0: must be dense or depthwise"):
        hw.report(qmodel.layers, policy, "pynq_z2", Demand(fps=1))


@pytest.mark.parametrize(("none", "over"), [(None, ()), ("dsp", ()), ("bram_18k", ("bram_18k",))])
def test_what_a_chip_has_not_is_neither_free_nor_unlimited(none, over) -> None:
    """A layer of 4 bits: in slices if there are any, else in LUTs."""
    rows, columns, weights, acts = 16, 16, 4, 4
    net = nn.Sequential(nn.Flatten(), nn.Linear(columns, rows, bias=False))
    qmodel = quantize(net, QuantConfig(first_last_bits=4), sample=torch.zeros(1, 1, 4, 4))
    policy = BitwidthPolicy(
        tuple(LayerBits(b.name, weights, acts, False, b.num_weights) for b in qmodel.policy)
    )
    capacity = {"lut": 50_000, "bram_18k": 100, "dsp": 100} | ({none: 0} if none else {})
    chip = DataflowFpga(capacity, 100e6, "DSP48E2", standalone_thresholds=False)
    found = hw.report(qmodel.layers, policy, chip, Demand(fps=100))
    device = chip.under(qmodel.layers, Demand(fps=100), choices_of(policy))
    matrix = device.units(qmodel.layers[0], weights, acts)[-1]
    by_hand = units.matrix(
        rows,
        columns,
        1,
        weights,
        acts,
        device.interval,
        dsp_slice=None if none == "dsp" else "DSP48E2",
    )
    assert (matrix.lut, matrix.dsp) == (by_hand.lut, by_hand.dsp)
    assert (matrix.lut > 0) == (none == "dsp") == (matrix.dsp == 0)
    assert found.over == over
    assert ("dsp" in found.totals) == (none != "dsp")
    assert found.limits["bram_18k"] == 0.8 * capacity["bram_18k"]


class Repeated(nn.Module):
    """A layer that is called several times; and once each of the other kinds."""

    def __init__(self, what: str, calls: int) -> None:
        super().__init__()
        self.what, self.calls = what, calls
        self.conv, self.linear = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(6, 6)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1, groups=4)
        self.strided = nn.ConvTranspose2d(4, 6, 2, stride=2, padding=1)

    def forward(self, x):
        for name in ("conv", "linear", "up"):
            for _ in range(self.calls if name == self.what else 1):
                x = torch.relu(getattr(self, name)(x))
        return self.strided(x)


@pytest.mark.parametrize("what", ["conv", "linear", "up"])
def test_a_layer_that_is_called_several_times_is_refused(what) -> None:
    """FINN takes none, and one call alone would be charged."""
    sample = torch.zeros(1, 4, 8, 6)
    once = quantize(Repeated(what, 1), QuantConfig(), sample=sample)
    assert hw.report(once.layers, once.policy, "pynq_z2", Demand(fps=1)).fits
    twice = quantize(Repeated(what, 2), QuantConfig(), sample=sample)
    with pytest.raises(RequestError, match=f"layer {what}: must be called once.*for each call"):
        hw.report(twice.layers, twice.policy, "pynq_z2", Demand(fps=1))


def test_a_transposed_and_a_one_dimensional_convolution() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    qmodel = quantize(net, QuantConfig(), sample=torch.zeros(1, 4, 5, 5))
    device = TARGET.under(qmodel.layers, Demand(fps=1), choices_of(qmodel.policy))
    found = device.units(qmodel.layers[0], 4, 4)
    # zeros between and around: 11 x 11 x 4 values; 100 positions of 2 x 2 x 4 products, 6 rows
    assert [unit.cycles for unit in found[1:]] == [484, 52 + 10 * 160, 9_600]
    net = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 2, 1))
    qmodel = quantize(net, QuantConfig(), sample=torch.zeros(1, 4, 20))
    device = TARGET.under(qmodel.layers, Demand(fps=1), choices_of(qmodel.policy))
    found = device.units(qmodel.layers[0], 4, 4)
    assert [unit.cycles for unit in found[1:]] == [18 * 3 * 4 + 2, 18 * 12 * 6]


@pytest.mark.slow
def test_finn_live(monkeypatch) -> None:
    """A small network through FINN+ itself: all cycles are its own, LUTs within 15 %."""
    pytest.importorskip("finn")
    pytest.importorskip("export.finn_flow")
    path = Path(__file__).parents[2] / "benchmarks" / "finn_estimates.py"
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("finn_estimates", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "finn_estimates", benchmark)  # dataclasses look there
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "SHAPE", (1, 3, 8, 8))
    qmodel = benchmark.quantized(small(), 0)
    theirs = benchmark.finn_nodes(qmodel, benchmark.PARTS["pynq_z2"], 5_000, 100e6)
    ours = benchmark.our_units(qmodel, TARGET, 5_000)
    matched, rest, left = benchmark.pairs(ours, theirs)
    assert rest == []
    assert {node.kind for node in left} <= {"ElementwiseMul", "add"}  # scale and bias of logits
    for pair in matched:
        assert pair.unit.bram_18k == pair.node.bram_18k
    total = sum(pair.node.lut for pair in matched)
    assert sum(pair.unit.lut for pair in matched) == pytest.approx(total, rel=0.15)
