"""Small quantized networks with random batch norms, biases and bitwidths."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import QuantConfig
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel, quantize

CHOICES = (1, 2, 3, 4, 6, 8)


class Residual(nn.Module):
    """A block with an option-A shortcut: strided slices and padded channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.first(x)))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.body(x) + shortcut)
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    """The same convolution called twice, and a linear layer without bias called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.mix = nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.tanh(self.again(x))
        x = F.relu(self.again(x))
        x = F.max_pool2d(x, 2).amax((2, 3))
        x = F.relu(self.mix(x)) + 1
        return self.head(self.mix(x))


class Segmenter(nn.Module):
    """Down, up, concatenation: one class a pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=2)
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.out = nn.Conv2d(9, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.leaky_relu(self.deep(torch.sigmoid(self.down(x))), 0.1))
        return self.out(torch.cat([x, y], 1))


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(3, 1, 1),
        nn.Conv2d(6, 6, 3, padding=1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 12, bias=False), nn.BatchNorm1d(12), nn.ReLU(),
        nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5, bias=False),
    )  # fmt: skip


class Everything(nn.Module):
    """Depthwise, pointwise, grouped and dilated convolutions, a residual sum, a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depthwise, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.pointwise, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.grouped, self.bn4 = nn.Conv2d(8, 6, 3, 2, 1, groups=2), nn.BatchNorm2d(6)
        self.dilated = nn.Conv2d(6, 4, 3, padding=2, dilation=2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.first(x))), 2)
        y = self.bn3(self.pointwise(F.relu6(self.bn2(self.depthwise(x))))) + x
        y = F.relu(torch.cat([y, x], 1))
        y = F.relu(self.dilated(F.relu(self.bn4(self.grouped(y)))))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class Overlapping(nn.Module):
    """Pooling with overlapping windows and padding, and a class for each pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.max_pool2d(F.relu(self.bn(self.first(x))), 3, 2, 1))


def convolutions() -> nn.Module:
    """No linear layer: the image has become one pixel."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 5, 3), nn.Flatten(),
    )  # fmt: skip


def normalized_first() -> nn.Module:
    """Batch normalisation of a quantized tensor; an average that is not quantized."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain, "perceptron": perceptron, "residual": Residual, "twice": Twice,
    "segmenter": Segmenter, "everything": Everything, "overlapping": Overlapping,
    "convolutions": convolutions, "normalized first": normalized_first,
}  # fmt: skip


def make(
    net: str | nn.Module, bits: int | None = None, seed: int = 0, side: int = 8, **config: object
) -> QuantModel:
    """Return a calibrated network; ``bits`` for every searched layer, or random ones."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    module = NETS[net]() if isinstance(net, str) else net
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_(0, 0.3)
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_(0, 0.3)
    sample = torch.zeros(1, 3, side, side)
    qmodel = quantize(module, QuantConfig(**config), sample=sample)
    calibrate_(qmodel, [(torch.randn(16, 3, side, side), torch.zeros(16))])
    choices = qmodel.config.bit_choices
    apply_policy_(
        qmodel,
        qmodel.policy.with_weight_bits(
            {x.name: bits or draw.choice(choices) for x in qmodel.policy if x.searched}
        ),
    )
    return qmodel


@pytest.fixture
def network() -> Callable[..., QuantModel]:
    return make


@pytest.fixture
def sample() -> Tensor:
    return torch.zeros(1, 3, 8, 8)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def float_bits() -> int:
    return FLOAT_BITS
