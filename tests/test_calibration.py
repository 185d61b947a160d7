"""Calibration: what it sees, and a network that computes in float for a while."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sdq import quantizers
from sdq.calibration import calibrate_, in_float
from sdq.config import QuantConfig
from sdq.errors import RunError
from sdq.quant_model import quantize


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_an_uncalibrated_network_says_so(toy: Callable[..., nn.Module], sample: Tensor) -> None:
    with pytest.raises(RunError, match=r"calibrated before use; call sdq\.calibrate_"):
        quantize(toy(), sample=sample)(sample)


def test_calibration_sees_the_float_network(toy: Callable[..., nn.Module], sample: Tensor) -> None:
    net = toy().eval()
    parts = [randn(16, 1, 8, 8, seed=s) for s in range(3)]
    qmodel = quantize(net, QuantConfig(act_bits=4), sample=sample).train()
    calibrate_(qmodel, [(x, torch.zeros(16)) for x in parts], steps=2)
    assert qmodel.training
    seen = torch.cat(parts[:2])
    expected = quantizers.mse_scale(seen.reshape(1, -1), 8, True, per_channel=False, steps=100)
    assert torch.equal(qmodel.act_quantizers()["first_input"].scale, expected)
    statistics = qmodel.net.get_buffer("bn1.running_mean")
    assert torch.equal(statistics, net.bn1.running_mean)  # evaluation mode


def test_scales_do_not_depend_on_the_weights_bits(
    toy: Callable[..., nn.Module], sample: Tensor
) -> None:
    """Those of a network of one bit would be for activations that batch norm soon mends."""
    x, scales = randn(16, 1, 8, 8), []
    for bits in (1, 2, 8):
        qmodel = quantize(toy().eval(), QuantConfig(bit_choices=(bits,)), sample=sample)
        calibrate_(qmodel, [(x, torch.zeros(16))])
        scales.append({k: float(q.scale.detach()) for k, q in qmodel.act_quantizers().items()})
    assert scales[0] == scales[1] == scales[2]


@pytest.mark.parametrize("batches", [1, 2, 20])
def test_calibration_looks_at_256_images_of_large_batches(
    batches: int, toy: Callable[..., nn.Module], sample: Tensor
) -> None:
    qmodel = quantize(toy(), sample=sample)
    counts: list[int] = []
    qmodel.net.register_forward_pre_hook(lambda _, inputs: counts.append(len(inputs[0])))
    calibrate_(qmodel, [(randn(300, 1, 8, 8), torch.zeros(300))] * batches)
    assert counts == {1: [256], 2: [128] * 2, 20: [32] * 8}[batches]
    counts.clear()
    calibrate_(qmodel, iter([(randn(300, 1, 8, 8), torch.zeros(300))] * batches))
    assert counts == [32] * min(batches, 8)


def test_a_network_can_compute_in_float_for_a_while(
    toy: Callable[..., nn.Module], sample: Tensor
) -> None:
    net = toy().eval()
    x = torch.randn(4, *sample.shape[1:])
    qmodel = quantize(net, QuantConfig(bit_choices=(2,)), sample=sample).eval()
    calibrate_(qmodel, [(x, torch.zeros(4))])
    quantized = qmodel(x)
    with in_float(qmodel):
        torch.testing.assert_close(qmodel(x), net(x))
    assert torch.equal(qmodel(x), quantized)
    assert not torch.equal(quantized, net(x))
