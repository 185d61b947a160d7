"""Errors and histograms of weights, by hand numbers."""

import math

import pytest
import torch
from torch import Tensor

from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.learned_scale import WeightQuantizer
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.weight_levels import COARSE, FINE, Quantized, after, before, histogram

# of which only the kind is looked at
LAYERS = (LayerSpec("a", "linear", (1, 1), (1,), (1,), 1, False),)


def quantized(weight: Tensor, bits: int, scale: float) -> Quantized:
    """Return a weight with a quantizer of one given scale."""
    quantizer = WeightQuantizer(weight, bits, per_channel=False)
    quantizer.base.fill_(scale)
    return Quantized(weight, quantizer)


def test_relative_error() -> None:
    # 2 bits with step 1: 0.6 -> 1, -1.2 -> -1, 3 -> 1 (the highest level)
    weight = torch.tensor([[0.6, -1.2, 3.0]])
    expected = math.sqrt(0.4**2 + 0.2**2 + 2.0**2) / math.sqrt(0.6**2 + 1.2**2 + 3.0**2)
    assert quantized(weight, 2, 1.0).relative_error() == pytest.approx(expected)
    assert quantized(torch.zeros(1, 3), 2, 1.0).relative_error() == 0.0


def layer(bits: int, count: int) -> LayerBits:
    return LayerBits("a", bits, 4, True, count)


def test_histogram() -> None:
    # in steps of 0.5: 0, 1, 1.02 (the bin of 1 reaches to 1.04), -2
    first = quantized(torch.tensor([[0.0, 0.5, 0.51, -1.0]]), 2, 0.5)
    last = quantized(torch.tensor([[0.0, 0.5, 0.5, 0.5]]), 2, 0.5)
    found = histogram(layer(2, 4), first, last)
    assert found.levels == (-2.0, 0.0, 1.0)
    # up to 3 steps on each side, and the bin in the middle
    assert len(found.before) == len(found.edges) - 1 == 2 * 3 * FINE + 1
    middles = [(a + b) / 2 for a, b in zip(found.edges, found.edges[1:], strict=False)]
    # a quarter of the weights in a bin of 1/12 step: 25 % * 12 per step
    unit = 25.0 * FINE
    for shares, expected in (
        (found.before, {-2.0: unit, 0.0: unit, 1.0: 2 * unit}),
        (found.after, {0.0: unit, 1.0: 3 * unit}),
    ):
        assert shares is not None
        seen = {round(m, 4): s for m, s in zip(middles, shares, strict=True) if s}
        assert seen == pytest.approx(expected)


def test_a_wide_histogram_is_coarse_and_cut() -> None:
    weight = torch.tensor([[-100.0, 0.0, 3.0, 100.0]])
    found = histogram(layer(8, 4), quantized(weight, 8, 1.0), None)
    assert found.after is None
    assert (found.edges[0], found.edges[-1]) == pytest.approx((-8 - 1 / 12, 8 + 1 / 12))
    assert found.levels == (0.0, 3.0)
    assert sum(found.before) / COARSE == pytest.approx(50.0)


@pytest.mark.parametrize("kind", ["dorefa", "entropy"])
def test_levels_at_half_steps_are_in_the_middle_of_a_bin(kind: str) -> None:
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    config = QuantConfig(weight_quantizer=kind)
    found = before({"a.weight": weight}, BitwidthPolicy((layer(1, 200),)), config, LAYERS)
    shown = histogram(layer(1, 200), found["a"], None)
    assert shown.levels == (-0.5, 0.5)
    for level in shown.levels:
        low = max(e for e in shown.edges if e < level)
        assert level - low == pytest.approx(1 / (2 * FINE), abs=1e-6)


def test_channels_of_several_bitwidths() -> None:
    """Weights that lie on the levels of their channel have no error, and lie on them in steps."""
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.5, -1.0, 0.0, 0.5]])
    policy = BitwidthPolicy((LayerBits("a", 2, 4, True, 8, channel_bits=(1, 2)),))
    found = before({"a.weight": weight}, policy, QuantConfig(), LAYERS)["a"]
    # the scale of least squares is searched for, not solved for
    assert found.relative_error() == pytest.approx(0.0, abs=0.02)
    position, level = found.in_steps()
    assert level.tolist() == [1, -1, 1, -1, 1, -2, 0, 1]
    torch.testing.assert_close(position, level, atol=0.05, rtol=0)


def test_after_has_the_learned_scales_and_floats_are_left_out() -> None:
    policy = BitwidthPolicy((LayerBits("f", 32, 32, False, 2), layer(2, 3)))
    tensors = {
        "net.f.weight": torch.ones(1, 2),
        "net.a.weight": torch.tensor([[2.0, -4.0, 2.0]]),
        "net.a.weight_quant.tensor_quant.base": torch.tensor([[1.0]]),
        "net.a.weight_quant.tensor_quant.gain": torch.tensor([[2.0]]),
    }
    found = after(tensors, policy, QuantConfig(), LAYERS * 2)
    assert set(found) == {"a"}
    position, level = found["a"].in_steps()
    assert position.tolist() == level.tolist() == [1.0, -2.0, 1.0]
    assert found["a"].relative_error() == 0.0


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    sound = quantized(torch.tensor([[0.0, 0.5]]), 2, 0.5)
    damaged = quantized(torch.tensor([[0.0, value]]), 2, 0.5)
    for first, last in ((damaged, None), (sound, damaged)):
        with pytest.raises(RequestError, match=r"a: weights must be finite.*copy the run anew"):
            histogram(layer(2, 2), first, last)


def test_tensors_of_another_quantizer_are_refused() -> None:
    policy = BitwidthPolicy((layer(2, 2),))
    tensors = {"net.a.weight": torch.tensor([[0.0, 0.5]])}
    with pytest.raises(RequestError, match=r"a: its tensors must be of .* Missing key"):
        after(tensors, policy, QuantConfig(), LAYERS)
