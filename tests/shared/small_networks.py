"""Modules that several tests build their networks of."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """The mean over positions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class NoisyNorm(nn.Module):
    """A batch normalisation inside a module that asks for the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        return x + 0.1 * torch.randn_like(x) if self.training else x


def unpacked(net: Any, x: Tensor) -> Tensor:
    """Return the input after ReLU, by way of a shape that is taken apart."""
    n, c, h, w = x.shape
    return x.view(n, c, h * w).relu().view(n, c, h, w)


def padded(net: Any, x: Tensor) -> Tensor:
    """Return the input after ReLU with zeros around it, to a multiple of seven."""
    missing = math.ceil(x.shape[-1] / 7) * 7 - x.shape[-1]
    return F.pad(F.relu(x), [missing // 2, missing - missing // 2, 0, 0])
