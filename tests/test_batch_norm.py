"""Batch normalisation is trained, frozen, or folded into the layer before it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import Head, NoisyNorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdq.batch_norm import FrozenBatchNorm
from sdq.quant_model import QuantModel


def head_after(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 8, 1), Head())


class Vectors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.linear(x.mean((2, 3))))))


class Sequences(nn.Module):
    """As many positions as features: what is normalised are the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bn = nn.Linear(12, 12), nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.linear(x.mean(1)))).mean(1))


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.head(F.relu(self.bn(x)) + x)


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.bn1, self.bn2, self.head = nn.BatchNorm2d(8), nn.BatchNorm2d(8), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv(F.relu(self.first(x)))))
        return self.head(F.relu(self.bn2(self.conv(x))))


class TiedNorms(nn.Module):
    """Two layers with one weight, each with a batch normalisation of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.left = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.right = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.right[0].weight = self.left[0].weight
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.right(F.relu(self.left(F.relu(self.first(x)))))))


class Preactivated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.conv2, self.head = nn.Conv2d(8, 8, 3, padding=1), Head()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)
        return self.head(x + self.conv2(F.relu(self.bn(x))))


FOLDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # name: (network, batch normalisations that remain, frozen)
    "conv": (lambda: head_after(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), 0),
    "conv without bias": (
        lambda: head_after(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), 0,
    ),
    "without factors": (
        lambda: head_after(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, affine=False)), 0,
    ),
    "linear": (Vectors, 0),
    "depthwise": (
        lambda: head_after(
            nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        ),
        0,
    ),
    "transposed": (
        lambda: head_after(nn.ConvTranspose2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8)), 0,
    ),
    "linear without factors": (
        lambda: nn.Sequential(
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8),
            nn.BatchNorm1d(8, affine=False), nn.ReLU(), nn.Linear(8, 5),
        ),
        0,
    ),
    "linear of sequences": (Sequences, 1),
    "behind dropout": (
        lambda: head_after(nn.Conv2d(3, 8, 3), nn.Dropout(0.1), nn.BatchNorm2d(8)), 1,
    ),
    "transposed in groups": (
        lambda: head_after(
            nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)
        ),
        1,
    ),
    "read twice": (ReadTwice, 1),
    "called twice": (CalledTwice, 2),
    "tied": (TiedNorms, 2),
    "preactivation": (Preactivated, 1),
    "in a whole module": (lambda: head_after(nn.Conv2d(3, 8, 3), NoisyNorm()), 1),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDS)
def test_batch_norm_is_folded_or_frozen(
    name: str, exact: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module], quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    make, frozen = FOLDS[name]
    bits = 4 if name == "called twice" else 8  # 8 bits called twice: onnxruntime cannot load them
    exact(seeded(make), images(), batch_norm="fold", bits=bits)
    qmodel = quantized(seeded(make), batch_norm="fold")
    found = [m for m in qmodel.modules() if isinstance(m, FrozenBatchNorm)]
    assert len(found) == frozen
    assert not any(isinstance(m, _BatchNorm) for m in qmodel.modules())


@pytest.mark.parametrize("name", ["conv", "linear", "preactivation", "in a whole module"])
def test_frozen_batch_norm_does_not_move(
    name: str, exact: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module],
) -> None:  # fmt: skip
    net = seeded(FOLDS[name][0])
    qmodel = exact(net, images(), batch_norm="freeze", formats=False)  # trained two steps
    (path,) = [path for path, m in net.named_modules() if isinstance(m, _BatchNorm)]
    norm, ours = net.get_submodule(path), qmodel.net.get_submodule(path)
    assert isinstance(ours, FrozenBatchNorm)
    assert ours.state_dict().keys() == norm.state_dict().keys()
    assert all(torch.equal(v, norm.state_dict()[k]) for k, v in ours.state_dict().items())
    assert not list(ours.parameters())


def test_batch_norm_that_trains_moves(
    exact: Callable[..., Any], images: Callable[[], Tensor], seeded: Callable[..., nn.Module]
) -> None:
    net = seeded(FOLDS["conv"][0])
    qmodel = exact(net, images(), formats=False)
    moved = qmodel.net.state_dict()["1.running_mean"]
    assert not torch.equal(moved, net.state_dict()["1.running_mean"])


def test_batch_norm_without_statistics_is_left_as_it_is(
    exact: Callable[..., Any], images: Callable[[], Tensor], seeded: Callable[..., nn.Module]
) -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    net = seeded(lambda: head_after(nn.Conv2d(3, 8, 3), norm))
    qmodel = exact(net, images(), batch_norm="fold", formats=False)
    assert type(qmodel.net.get_submodule("1")) is nn.BatchNorm2d
