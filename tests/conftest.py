"""A small network with every kind of layer the engine quantizes, its data, and shared helpers."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn

from sdq.errors import RequestError

settings.register_profile("no-deadline", deadline=None)  # a slow machine is no failure
settings.load_profile("no-deadline")

Batch = tuple[Tensor, Tensor]


class Toy(nn.Module):
    """Four searched layers between a first and a last one, batch norm and dropout: 8 x 8 images."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.small = nn.Conv2d(4, 4, 3, padding=1)
        self.wide = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.hidden = nn.Linear(8, 12)
        self.last = nn.Linear(12, 3)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.first(x)))
        x = F.relu(self.small(x)) + x
        x = F.relu(self.bn2(self.wide(x)))
        x = F.relu(self.deep(x)).mean((2, 3))
        x = F.relu(self.hidden(F.dropout(x, self.dropout, self.training)))
        return self.last(x)


def _batches(count: int = 6, size: int = 16, seed: int = 0) -> list[Batch]:
    """Three classes: a bright row, a bright column, or neither, under noise."""
    rng = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        labels = torch.randint(3, (size,), generator=rng)
        images = 0.5 * torch.randn(size, 1, 8, 8, generator=rng)
        images[labels == 0, :, 3] += 1.5
        images[labels == 1, :, :, 5] += 1.5
        found.append((images, labels))
    return found


@pytest.fixture
def toy() -> Callable[..., Toy]:
    """Return a function that makes the network with the weights of a seed."""

    def make(seed: int = 0, dropout: float = 0.0) -> Toy:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Toy(dropout)

    return make


@pytest.fixture
def batches() -> Callable[..., list[Batch]]:
    return _batches


@pytest.fixture
def sample() -> Tensor:
    return torch.zeros(1, 1, 8, 8)


@pytest.fixture
def refuses() -> Callable[..., "pytest.RaisesExc[RequestError]"]:
    """Return a function that expects a RequestError whose message has the fragments in order."""

    def expect(*fragments: str) -> "pytest.RaisesExc[RequestError]":
        return pytest.raises(RequestError, match=".*".join(re.escape(f) for f in fragments))

    return expect


@pytest.fixture
def all_of() -> Callable[[Any, str], Tensor]:
    """Return a function that reads every image of a part of the splits."""

    def read(splits: Any, part: str) -> Tensor:
        images = getattr(splits, part)
        return torch.as_tensor(images.images.take(torch.arange(len(images))))

    return read


@pytest.fixture
def real_root() -> Path:
    """Return the folder of the real data sets; the test is skipped where there is none."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    root = Path(os.environ.get("SDQ_DATA", default))
    if not root.is_dir():
        pytest.skip("no SDQ_DATA and no ../shared/data")
    return root
