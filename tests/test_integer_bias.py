"""Biases on the grid of the products: by hand, in training, while scales are not settled."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_, in_float
from sdq.config import QuantConfig
from sdq.integer_bias import LARGEST_CODE, SMALLEST_SHARE, biases
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize


class Twice(nn.Module):
    """A layer that is called with inputs of two scales, and one whose input is in float."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.again(self.again(x).relu())).relu())


def images() -> Tensor:
    return torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


def calibrated(net: nn.Module, **config: Any) -> QuantModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for module in net.modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    how = {"integer_bias": True, "first_last_bits": None, "act_bits": 4, **config}
    qmodel = quantize(net, QuantConfig(**how), sample=images()[:1])
    calibrate_(qmodel, [(images(), torch.zeros(32))])
    apply_policy_(qmodel, qmodel.policy.with_weight_bits(dict.fromkeys(("0", "2"), 2)))
    return qmodel.eval()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_the_output_is_a_whole_number_of_units() -> None:
    """By hand: codes of the input times those of the weight, plus the bias's, times both scales."""
    qmodel = calibrated(perceptron())
    act, weight = qmodel.act_quantizers()["0_input"], qmodel.settled_quantizer("0")
    unit = act.scale * weight.scale.reshape(-1)
    bias = qmodel.layer("0").bias
    assert isinstance(bias, Tensor)
    whole = (bias / unit).round()
    assert (bias - whole * unit).abs().max() > 1e-3  # it was not one
    expected = (act.codes(images()) @ weight.codes(qmodel.weight("0")).T + whole) * unit
    found = qmodel.layer("0")(qmodel.net.get_submodule("0_input")(images()))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    qmodel = calibrated(perceptron())
    qmodel(images()).sum().backward()
    gradient = qmodel.layer("2").bias.grad  # type: ignore[union-attr]
    torch.testing.assert_close(gradient, torch.full((2,), 32.0))


def test_without_scales_biases_pass() -> None:
    qmodel = calibrated(perceptron())
    for quantizer in qmodel.act_quantizers().values():
        quantizer.observing = True
    rounding = biases(qmodel.net)["0"]
    bias = torch.tensor([0.1, 0.2, 0.3])
    assert torch.equal(rounding(bias), bias)
    for quantizer in qmodel.act_quantizers().values():
        quantizer.observing = False
    assert not torch.equal(rounding(bias), bias)
    with in_float(qmodel):
        assert torch.equal(rounding(bias), bias)


def test_inputs_of_two_scales_and_of_none_leave_the_bias_as_it_is() -> None:
    net = Twice()
    assert set(biases(calibrated_net(net).net)) == {"mix", "head"}
    assert set(biases(calibrated_net(net, act_bits=32).net)) == set()
    assert set(biases(calibrated_net(net, pins=(("head", 32),)).net)) == {"mix"}


def calibrated_net(net: nn.Module, **config: Any) -> QuantModel:
    how = {"integer_bias": True, "first_last_bits": None, "act_bits": 4, **config}
    return quantize(net, QuantConfig(**how), sample=images()[:1])


def test_it_adds_nothing_to_the_state() -> None:
    plain = quantize(perceptron(), QuantConfig(), sample=images()[:1])
    rounding = quantize(perceptron(), QuantConfig(integer_bias=True), sample=images()[:1])
    assert list(plain.state_dict()) == list(rounding.state_dict())


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_a_channel_without_weight_keeps_its_bias(bits: int) -> None:
    """Folding gives such channels: the factor of a dead one is some 1e-8, its offset is not."""
    net = perceptron()
    layer = net[0]
    assert isinstance(layer, nn.Linear)
    config = QuantConfig(integer_bias=True, bit_choices=(1, 2, 8), first_last_bits=None)
    with torch.no_grad():
        layer.weight[1].fill_(1e-7)
        layer.bias[1] = 7.0
    qmodel = quantize(net, config, sample=images()[:1])
    apply_policy_(qmodel, qmodel.policy.with_weight_bits({"0": bits}))
    calibrate_(qmodel, [(images(), torch.zeros(32))])
    rounding, bias = biases(qmodel.net)["0"], qmodel.layer("0").bias
    assert isinstance(bias, Tensor)
    codes = rounding.codes(bias.detach())
    assert codes is not None
    assert codes.abs().max() < LARGEST_CODE
    torch.testing.assert_close(rounding(bias)[1], torch.tensor(7.0), rtol=1e-5, atol=0)
    scale = qmodel.settled_quantizer("0").scale.reshape(-1)
    assert float(scale[1].detach()) == pytest.approx(7 * SMALLEST_SHARE)


def test_channels_of_different_bits_have_units_of_their_own(
    toy: Callable[..., nn.Module], batches: Callable[..., Any], sample: Tensor
) -> None:
    net = toy()
    qmodel = quantize(net, QuantConfig(integer_bias=True), sample=sample)
    calibrate_(qmodel, batches())
    layers = [
        replace(bits, weight_bits=8, channel_bits=(1, 2, 3, 8)) if bits.name == "small" else bits
        for bits in qmodel.policy
    ]
    apply_policy_(qmodel, BitwidthPolicy(tuple(layers)))
    rounding = biases(qmodel.net)["small"]
    scale = rounding.scale()
    assert scale is not None
    assert scale.shape == (4,)
    codes = rounding(qmodel.layer("small").bias) / scale  # type: ignore[arg-type]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
