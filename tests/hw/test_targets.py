"""Cost models of devices: the formula of each family by hand."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hw
from hw.models.bit_serial import BitSerialArray
from hw.models.fpga_dataflow import DataflowFpga
from hw.models.roofline import Roofline
from hw.models.systolic import FusibleArray
from hw.targets.bit_fusion import TARGET
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.models import resnet20
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.quant_model import quantize


def conv(k: int, c: int, side: int, window: int = 3, groups: int = 1, calls: int = 1) -> LayerSpec:
    weight = (k, c // groups, window, window)
    macs = k * c // groups * window**2 * side**2 * calls
    return LayerSpec("conv", "conv2d", weight, (c, side, side), (k, side, side), macs, False)


def test_of_a_rate_and_a_latency_the_stricter_counts() -> None:
    assert hw.Demand(fps=100.0, latency_s=0.02).seconds == 0.01
    assert hw.Demand(fps=100.0, latency_s=0.002).seconds == 0.002
    assert hw.Demand().seconds is None


# 16 rows take input channels, 32 columns output channels; a unit holds (8 / w) (8 / a) multipliers
BY_HAND = [
    (conv(16, 16, 32), 8, 8, 1 * 1024 * 9 * 1),
    (conv(16, 16, 32), 4, 4, 1 * 1024 * 9 * 1),  # 64 channels at once, 16 to do
    (conv(64, 64, 8), 8, 8, 2 * 64 * 9 * 4),
    (conv(64, 64, 8), 4, 8, 2 * 64 * 9 * 2),
    (conv(64, 64, 8), 4, 4, 2 * 64 * 9 * 1),
    (conv(64, 64, 8), 3, 4, 2 * 64 * 9 * 1),  # 3 bits take the room of 4
    (conv(64, 64, 8), 1, 8, 2 * 64 * 9 * 1),  # 1 bit that of 2
    (conv(64, 512, 8), 1, 2, 2 * 64 * 9 * 2),  # ceil(512 / (16 * 16))
    (conv(64, 512, 8), 2, 2, 2 * 64 * 9 * 2),
    (conv(33, 17, 5), 8, 8, 2 * 25 * 9 * 2),  # both just over
    (conv(33, 17, 5), 6, 5, 2 * 25 * 9 * 2),  # 5 to 8 bits are as wide as 8
    (conv(16, 16, 4), 32, 32, 1 * 16 * 9 * 16),  # (8 / 32)^2 of a multiplier
    (conv(64, 64, 8, groups=64), 8, 8, 64 * 64 * 9 * 1),  # depthwise: one column at a time
    (conv(64, 64, 8, groups=2), 8, 8, 2 * 64 * 9 * 2),
    (conv(16, 16, 32, calls=2), 8, 8, 2 * 1024 * 9),  # a layer called twice
    # a transposed convolution: every input place meets each weight once
    (
        LayerSpec(
            "t", "conv_transpose2d", (8, 16, 2, 2), (16, 5, 5), (8, 10, 10), 8 * 16 * 4 * 25, True
        ),
        8,
        8,
        25 * 4,
    ),
    # kept whole in float: 5,000 products of 32 x 32 bits, 16 units each, on 512 units
    (LayerSpec("whole", "float", (1000, 1), (16,), (16,), 5000, False), 32, 32, 157),
    (LayerSpec("fc", "linear", (10, 64), (64,), (10,), 640, True), 8, 8, 4),
    (LayerSpec("fc", "linear", (100, 64), (64,), (100,), 6400, True), 4, 8, 4 * 2),
    (LayerSpec("fc", "linear", (10, 64), (7, 64), (7, 10), 4480, True), 8, 8, 7 * 4),
    (LayerSpec("c", "conv1d", (8, 4, 5), (4, 20), (8, 16), 8 * 4 * 5 * 16, True), 8, 8, 16 * 5),
]


@pytest.mark.parametrize(("spec", "weight_bits", "act_bits", "cycles"), BY_HAND)
def test_bit_fusion_cycles(spec: LayerSpec, weight_bits: int, act_bits: int, cycles: int) -> None:
    assert TARGET.cycles(spec, weight_bits, act_bits) == cycles


def test_bit_fusion_has_its_datasheet() -> None:
    assert FusibleArray(rows=16, columns=32, clock_hz=500e6) == TARGET
    assert hw.target("bit_fusion") is hw.target("bit-fusion") is TARGET


def test_a_network_is_the_sum_of_its_layers() -> None:
    specs = (conv(64, 64, 8), conv(16, 16, 32))
    policy = BitwidthPolicy((LayerBits("x", 4, 4, True, 36864), LayerBits("y", 8, 8, True, 2304)))
    cost = TARGET.cost(specs, policy)
    assert cost.layer_cycles == (1152, 9216)
    assert cost.bottleneck == 1
    assert cost.latency_s == pytest.approx(10368 / 500e6, rel=1e-15)


MIXES = [
    # 64 x 64 channels, 64 positions, 9 taps: sets of at most 32 channels of one width
    (conv(64, 64, 8), 8, [8] * 32 + [4] * 32, 64 * 9 * (4 + 2)),
    (conv(64, 64, 8), 8, [8, 4] * 32, 64 * 9 * (4 + 2)),  # in any order
    (conv(64, 64, 8), 8, [8] * 33 + [4] * 31, 64 * 9 * (2 * 4 + 2)),  # one too many for a set
    (
        conv(64, 64, 8),
        8,
        [4] * 30 + [3] * 2 + [2] * 31 + [1],
        64 * 9 * (2 + 1),
    ),  # 3 are as wide as 4
    (conv(64, 64, 8), 8, [6] * 64, 2 * 64 * 9 * 4),  # as the layer of one bitwidth
    (conv(64, 64, 8, groups=2), 8, [8] * 32 + [2] * 32, 64 * 9 * (2 + 1)),  # a width a group
    (conv(64, 64, 8, groups=2), 8, [8, 2] * 32, 64 * 9 * 2 * (2 + 1)),  # two in each
    (conv(64, 64, 8, groups=64), 8, [8, 2] * 32, 64 * 64 * 9),  # depthwise: one column at a time
]


@pytest.mark.parametrize(("spec", "act_bits", "channel_bits", "cycles"), MIXES)
def test_channels_of_each_width_are_passes_of_their_own(spec, act_bits, channel_bits, cycles):
    layer = LayerBits(
        "x", max(channel_bits), act_bits, True, math.prod(spec.weight_shape), tuple(channel_bits)
    )
    assert TARGET.cost((spec,), BitwidthPolicy((layer,))).layer_cycles == (cycles,)


def test_resnet20_on_bit_fusion_by_hand() -> None:
    qmodel = quantize(resnet20.build(10), QuantConfig(act_bits=4), sample=torch.zeros(1, 3, 32, 32))
    names = [b.name for b in qmodel.policy if b.searched]
    policy = qmodel.policy.with_weight_bits(dict.fromkeys(names, 4))
    cycles = TARGET.cost(qmodel.layers, policy).layer_cycles
    stage1, stage2, stage3 = 1024 * 9, 256 * 9, 2 * 64 * 9
    assert cycles == (
        stage1,  # 3 channels at 8 / 8
        *[stage1] * 6, *[stage2] * 6, *[stage3] * 6,
        4,  # 64 channels at 8 / 8
    )  # fmt: skip


def test_an_unknown_target_is_refused_with_the_nearest() -> None:
    with pytest.raises(RequestError, match="did you mean 'bit_fusion'"):
        hw.target("bitfusion")


def test_groups_are_counted_from_a_traced_network() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    qmodel = quantize(net, QuantConfig(), sample=torch.zeros(1, 8, 4, 4))
    assert TARGET.cost(qmodel.layers, qmodel.policy).layer_cycles == (8 * 16 * 9, 16)


def a_chip(**changed: Any) -> DataflowFpga:
    capacity = {"lut": 53_200, "bram_18k": 280, "dsp": 220}
    told = {"capacity": capacity, "clock_hz": 1e8, "dsp_slice": "DSP48E1"}
    return DataflowFpga(**{**told, **changed})


def a_processor(**changed: Any) -> Roofline:
    told = {
        "peaks": {8: 32e9, 32: 8e9}, "bandwidth": 4e9, "memory": ("memory_bytes", 2**30),
        "stored_bits": (8, 32),
    }  # fmt: skip
    return Roofline(**{**told, **changed})


@pytest.mark.parametrize(
    ("make", "changed", "sentence"),
    [
        (a_chip, {"clock_hz": 0}, "clock_hz must be a number above 0, got 0"),
        (a_chip, {"clock_hz": math.inf}, "clock_hz must be a number above 0, got inf"),
        (a_chip, {"clock_hz": None}, "clock_hz must be a number above 0, got None"),
        (a_chip, {"clock_hz": True}, "clock_hz must be a number above 0, got True"),
        (a_chip, {"capacity": 5}, "capacity must be a dictionary, got 5"),
        (a_chip, {"capacity": {"luts": 5}}, "must be one of lut, bram_18k, uram, dsp, got 'luts'"),
        (a_chip, {"capacity": {"lut": 2.5}}, "capacity of lut must be a whole number"),
        (a_chip, {"capacity": {"lut": -1}}, "capacity of lut must be a whole number of at least 0"),
        (a_chip, {"capacity": {}}, "capacity must have lut, bram_18k, dsp, got no lut; say 0"),
        (a_chip, {"capacity": {"lut": 5, "dsp": 0}}, "got no bram_18k; say 0 if the chip has none"),
        (a_chip, {"dsp_slice": "DSP48"}, "dsp_slice must be one of DSP48E1, DSP48E2, DSP58"),
        (a_chip, {"input_bits": 0}, "input_bits must be of bitwidths from 1 to 32, got 0"),
        (a_processor, {"peaks": {8: 1e9}}, "peaks must have 32 bits, for what stays in float"),
        (a_processor, {"peaks": {8: 0, 32: 1}}, "peak at 8 bits must be a number above 0, got 0"),
        (a_processor, {"stored_bits": (8,)}, "stored_bits must have 32 bits"),
        (a_processor, {"stored_bits": 8}, "stored_bits must be a tuple of bitwidths, got 8"),
        (a_processor, {"memory": ("memory_bytes", math.nan)}, "memory_bytes must be a number"),
        (a_processor, {"memory": 7}, "memory must be a pair of a name and a number, got 7"),
        (a_processor, {"bandwidth": "4"}, "bandwidth must be a number above 0, got '4'"),
        (partial(FusibleArray, 16, 32), {"clock_hz": -1}, "clock_hz must be a number above 0"),
        (partial(FusibleArray, 16, clock_hz=1e9), {"columns": 0}, "columns must be a whole number"),
        (partial(FusibleArray, 16, 32, 1e9), {"act_bits": (64,)}, "act_bits must be of bitwidths"),
        (partial(BitSerialArray, 8, 16, 16, serial_weights=True), {"clock_hz": 0}, "clock_hz must"),
        (partial(BitSerialArray, 8, 16, clock_hz=1e9, serial_weights=True), {"lanes": 1.5},
         "lanes must be a whole number of at least 1, got 1.5"),
    ],
)  # fmt: skip
def test_numbers_that_are_no_devices_are_refused(
    make: Callable[..., object], changed: dict[str, Any], sentence: str, refuses: Any
) -> None:
    with refuses(sentence):
        make(**changed)


@pytest.mark.parametrize("text", ["", "TARGET = 5", "TARGETS = {}"])
def test_a_file_without_a_target_is_refused(tmp_path: Path, refuses: Any, text: str) -> None:
    (tmp_path / "board.py").write_text(text)
    with refuses("board.py: TARGET must be a target with weight_bits, act_bits", "own-device.md"):
        hw.target(str(tmp_path / "board.py"))
