"""What stands between layers, as devices see it."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sdq.config import QuantConfig
from sdq.layers import Between, LayerSpec
from sdq.quant_model import quantize
from sdq.run_folder import RunFolder, read_layers


class Net(nn.Module):
    """A residual block, three poolings, a concatenation and an interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, (3, 5), stride=2, padding="valid", dilation=(1, 2))
        self.third = nn.Conv2d(4, 4, 3, padding="same")
        self.fourth = nn.Conv2d(8, 4, 1)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        x = F.relu(self.first(x))  # (N, 4, 16, 16)
        y = self.second(F.max_pool2d(x, 3, 1, padding=1))  # (N, 4, 7, 4)
        z = self.third(y) + y
        z = torch.cat([z, F.relu(z)], 1)
        z = F.interpolate(self.fourth(z), scale_factor=2)  # (N, 4, 14, 8)
        return self.last(F.avg_pool2d(z, 2).mean((2, 3)))


def layers(net: nn.Module, sample: torch.Tensor) -> tuple[LayerSpec, ...]:
    return quantize(net, QuantConfig(), sample=sample).layers


def test_operations_are_charged_to_the_next_layer() -> None:
    found = layers(Net(), torch.zeros(1, 3, 16, 16))
    assert [[op.kind for op in spec.before] for spec in found] == [
        [],
        ["max_pool"],
        ["fork"],
        ["add", "fork", "concat"],
        ["upsample", "avg_pool", "global_pool"],
    ]
    big, small = (4, 16, 16), (4, 7, 4)
    assert found[1].before == (Between("max_pool", big, big, (3, 3), (1, 1), (2, 2)),)
    assert found[3].before[2] == Between("concat", small, (8, 7, 4))
    assert found[4].before == (
        Between("upsample", small, (4, 14, 8)),
        Between("avg_pool", (4, 14, 8), small, (2, 2), (2, 2), (0, 0)),
        Between("global_pool", small, (4,), (7, 4), (7, 4), (0, 0)),
    )


@pytest.mark.parametrize("function", [False, True])
def test_adaptive_pooling_has_windows_as_they_fall(function) -> None:
    """12 x 8 in 3 x 2 parts: windows of 4 x 4, whether a module or a function does it."""

    class Adaptive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Linear(24, 2)
            self.pool = nn.AdaptiveAvgPool2d((3, 2))

        def forward(self, x):
            x = F.relu(self.first(x))
            x = F.adaptive_avg_pool2d(x, (3, 2)) if function else self.pool(x)
            return self.last(x.flatten(1))

    found = layers(Adaptive(), torch.zeros(1, 3, 12, 8))
    pool, _ = found[1].before
    assert pool == Between("avg_pool", (4, 12, 8), (4, 3, 2), (4, 4), (4, 4), (0, 0))


def test_geometry_of_convolutions() -> None:
    found = layers(Net(), torch.zeros(1, 3, 16, 16))
    assert [(s.stride, s.padding, s.dilation) for s in found] == [
        ((1, 1), (2, 2), (1, 1)),
        ((2, 2), (0, 0), (1, 2)),
        ((1, 1), (2, 2), (1, 1)),  # "same"
        ((1, 1), (0, 0), (1, 1)),
        ((), (), ()),
    ]


def test_products_of_transposed_convolutions() -> None:
    """By hand: each of 4 x 8 x 6 inputs meets 3 rows of 2 x 2 weights; 8 groups of one to one."""
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.ReLU(), nn.Conv2d(6, 8, 1), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, groups=8),
    )  # fmt: skip
    first, middle, last = layers(net, torch.zeros(1, 4, 8, 6))
    assert (first.macs, middle.macs) == (4 * 8 * 6 * 3 * 4, 16 * 12 * 6 * 8)
    assert last.macs == 8 * 16 * 12 * 9


def test_a_size_that_is_asked_for_is_no_reader() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = F.relu(self.a(x))
            return self.b(x).view(x.size(0), -1)

    assert layers(Sized(), torch.zeros(1, 3, 4, 4))[1].before == ()


def test_layers_json_keeps_them_and_reads_what_was_written_before(tmp_path) -> None:
    found = layers(Net(), torch.zeros(1, 3, 16, 16))
    with RunFolder.create(tmp_path / "r", {}, resume=False) as run:
        run.write_layers(found)
    path = tmp_path / "r" / "layers.json"
    assert read_layers(path) == found
    document = json.loads(path.read_text())
    for layer in document["layers"]:
        for key in ("stride", "padding", "dilation", "before"):
            del layer[key]
    path.write_text(json.dumps(document))
    assert [spec.before for spec in read_layers(path)] == [()] * 5
