"""Bit-serial arrays, rooflines, energy and effective bit operations: formulas by hand."""

import pytest
import torch

import hw
from hw.energy import mac_joules, weight_fetch_joules
from hw.targets import bit_fusion, cortex_m7, loom, stripes, xeon_8380
from hw.targets.a100 import TARGET as A100
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy, LayerBits


def conv(k: int, c: int, side: int, window: int = 3, groups: int = 1) -> LayerSpec:
    weight = (k, c // groups, window, window)
    macs = k * c // groups * window**2 * side**2
    return LayerSpec("conv", "conv2d", weight, (c, side, side), (k, side, side), macs, False)


def linear(k: int, c: int) -> LayerSpec:
    return LayerSpec("fc", "linear", (k, c), (c,), (k,), k * c, True)


# Stripes takes 256 filters, 16 windows, 16 channels at a time, and a cycle an activation bit
STRIPES = [
    (conv(256, 16, 4), 8, 16, 9 * 16),  # one step a tap, 16 bits: as a parallel array of 16 times
    (conv(256, 16, 4), 8, 4, 9 * 4),
    (conv(256, 16, 4), 1, 4, 9 * 4),  # weights are not serial
    (conv(257, 17, 5), 8, 3, 2 * 2 * 2 * 9 * 3),  # each just over: 25 positions are two sets
    (
        conv(64, 64, 4, groups=64),
        8,
        8,
        64 * 9 * 8,
    ),  # depthwise: a filter at a time
    (linear(256, 16), 8, 8, 8),  # 15 of 16 windows idle
]
# Loom takes 128 filters and also a cycle a weight bit
LOOM = [
    (conv(128, 16, 4), 8, 8, 9 * 64),
    (conv(128, 16, 4), 3, 5, 9 * 15),
    (conv(129, 16, 4), 1, 2, 2 * 9 * 2),
    (linear(2048, 16), 4, 8, 4 * 16),  # other outputs take the places of windows
    (linear(2049, 17), 4, 2, 2 * 2 * 4 * 16),
]


@pytest.mark.parametrize(("spec", "weight_bits", "act_bits", "cycles"), STRIPES)
def test_stripes(spec: LayerSpec, weight_bits: int, act_bits: int, cycles: int) -> None:
    assert stripes.TARGET.cycles(spec, weight_bits, act_bits) == cycles
    assert stripes.TARGET.latency_s(spec, weight_bits, act_bits) == cycles / 980e6


@pytest.mark.parametrize(("spec", "weight_bits", "act_bits", "cycles"), LOOM)
def test_loom(spec: LayerSpec, weight_bits: int, act_bits: int, cycles: int) -> None:
    assert loom.TARGET.cycles(spec, weight_bits, act_bits) == cycles


def test_loom_does_as_much_as_128_multipliers_of_16_bits() -> None:
    spec = conv(128, 64, 16)
    assert loom.TARGET.cycles(spec, 16, 16) == spec.macs / 128


def test_a_roofline_is_the_larger_of_compute_and_memory() -> None:
    peak, bandwidth = 40 * 2.3e9 * 128, 204.8e9
    big = conv(256, 256, 28)
    moved = big.num_weights + 2 * 256 * 28 * 28  # bytes: weights, input, output
    assert big.macs / peak > moved / bandwidth
    assert xeon_8380.TARGET.latency_s(big, 8, 8) == big.macs / peak
    assert xeon_8380.TARGET.latency_s(big, 8, 16) == big.macs / (peak / 2)
    flat = linear(1000, 4096)
    assert xeon_8380.TARGET.latency_s(flat, 8, 8) == (4_096_000 + 5096) / bandwidth
    # bytes hold fewer bits, and gain nothing
    assert xeon_8380.TARGET.latency_s(flat, 2, 4) == xeon_8380.TARGET.latency_s(flat, 8, 8)
    assert xeon_8380.TARGET.legal_weight_bits(flat) == (8,)


def test_a_microcontroller_stores_packed_and_multiplies_wide() -> None:
    device = cortex_m7.TARGET
    spec = conv(64, 64, 8)
    assert device.latency_s(spec, 8, 8) == device.latency_s(spec, 2, 2) == spec.macs / 960e6
    assert [device.use(spec, w, 8).costs["flash_bytes"] for w in (1, 2, 3, 4, 8)] == [
        36864 / 8 * bits for bits in (2, 2, 4, 4, 8)
    ]
    flat = linear(1000, 1000)
    moved = 1_000_000 / 2 + 2000  # reading 4-bit weights takes longer than multiplying them
    assert device.latency_s(flat, 4, 8) == max(moved / 1.536e9, 1e6 / 960e6)
    policy = BitwidthPolicy((LayerBits("fc", 8, 8, True, 3_000_000),))
    large = LayerSpec("fc", "linear", (1000, 3000), (3000,), (1000,), 3_000_000, False)
    found = hw.report((large,), policy, device)
    assert found.over == ("flash_bytes",)
    assert found.shares["flash_bytes"] == 3_000_000 / 2**21
    fewer = BitwidthPolicy((LayerBits("fc", 4, 8, True, 3_000_000),))
    assert hw.report((large,), fewer, device).fits


def test_tensorrt_has_four_bits_in_linear_layers_alone() -> None:
    spec, flat = conv(64, 64, 8), linear(1000, 1000)
    assert A100.legal_weight_bits(spec) == (8,)
    assert A100.legal_weight_bits(flat) == (4, 8)
    assert A100.stored(spec, 4) == 8
    assert (A100.stored(flat, 4), A100.computed(flat, 4, 8)) == (4, 16)
    assert (A100.computed(flat, 8, 8), A100.computed(flat, 32, 32)) == (8, 32)


def test_energy_of_bit_fusion_by_hand() -> None:
    assert mac_joules(8, 8) == pytest.approx(0.3e-12)
    assert mac_joules(2, 4) == pytest.approx((0.2 * 8 / 64 + 0.1) * 1e-12)
    assert weight_fetch_joules(64) == 1.3e-9
    spec = conv(64, 64, 8)
    use = bit_fusion.TARGET.use(spec, 3, 4)  # 3 bits are fused as 4, and stored as 3
    by_hand = spec.macs * (0.2 * 16 / 64 + 0.1) * 1e-12 + spec.num_weights * 3 / 64 * 1.3e-9
    assert use.costs["energy_j"] == pytest.approx(by_hand, rel=1e-12)


def test_effective_bit_operations_by_hand() -> None:
    spec = LayerSpec("a", "conv2d", (1, 2, 1, 3), (2, 1, 5), (1, 1, 3), 18, False)
    policy = BitwidthPolicy((LayerBits("a", 4, 5, True, 6),))
    assert hw.layer_ebops((spec,), policy) == [18 * 4 * 5]
    # spans: 7 has 3 bits, 4 one, 0 none, -6 two, 5 three, 1 one: 10 of them, at 3 positions
    codes = {"a": torch.tensor([7, 4, 0, -6, 5, 1])}
    assert hw.layer_ebops((spec,), policy, codes) == [3 * 10 * 5]
