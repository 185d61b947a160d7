"""Where a number that is not finite comes from: images, a weight, a layer, or the loss."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sdq.calibration import calibrate_
from sdq.config import QuantConfig, TrainConfig
from sdq.diagnosis import LOWER, origin, weight_not_finite
from sdq.errors import RunError
from sdq.quant_model import quantize
from sdq.train import train_

IMAGES = torch.ones(4, 1, 8, 8)


class Overflow(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 1e38 * 1e38


def test_images(toy: Callable[..., nn.Module]) -> None:
    where, repair = origin(toy(), IMAGES * torch.inf, nullcontext())
    assert (where, repair) == ("the images of the batch are not finite", "mend the data")


def test_a_weight(toy: Callable[..., nn.Module]) -> None:
    net = toy()
    assert weight_not_finite(net) is None
    net.deep.bias.data[3] = torch.nan
    assert weight_not_finite(net) == "deep.bias"
    assert origin(net, IMAGES, nullcontext()) == ("weight 'deep.bias' is not finite", LOWER)


def test_the_first_layer_whose_output_is_not_finite() -> None:
    net = nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(64, 4), Overflow(), nn.ReLU()), nn.Linear(4, 2)
    )
    assert origin(net, IMAGES, nullcontext())[0] == "first in the output of '1.1'"
    assert not any(m._forward_hooks for m in net.modules())


def test_a_layer_of_a_quantized_network(toy: Callable[..., nn.Module]) -> None:
    qmodel = quantize(toy(), QuantConfig(), sample=IMAGES[:1])
    calibrate_(qmodel, [(IMAGES, torch.zeros(4))])
    for parameter in (qmodel.net.bn2.weight, qmodel.net.bn2.bias):
        parameter.data.fill_(3e38)  # finite, but not what it is added up to
    assert origin(qmodel, IMAGES, nullcontext())[0] == "first in the output of 'net.bn2'"


def test_an_operation_outside_of_layers() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(64, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.flatten(1)) / 0.0

    assert origin(Root(), IMAGES, nullcontext())[0] == "first in the network's output"


def test_the_loss_alone(toy: Callable[..., nn.Module]) -> None:
    expected = "every layer's output is finite, the loss is not"
    assert origin(toy(), IMAGES, nullcontext())[0] == expected


def test_training_names_the_layer(batches: Callable[..., list[tuple[Tensor, Tensor]]]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), Overflow())
    message = (
        r"train: loss must be finite, got nan in epoch 1, step 1: first in the output of '2'; "
        r"lower the learning rate"
    )
    with pytest.raises(RunError, match=message):
        train_(net, batches(), TrainConfig(epochs=1))
