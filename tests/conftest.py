"""A small network with every kind of layer the engine quantizes, its data, and shared helpers."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from small_networks import Head
from torch import Tensor, nn

from fl import ClientData
from fl.method import LEVELS
from fl.supervision import weakened
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_, in_float
from sdq.config import QuantConfig
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError
from sdq.quant_model import QuantModel, quantize

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
def qtoy(toy: Callable[..., nn.Module], sample: Tensor) -> Callable[..., QuantModel]:
    """Return a function that quantizes that network, with dropout, under a configuration."""

    def make(**config: Any) -> QuantModel:
        return quantize(toy(dropout=0.2), QuantConfig(**config), sample=sample)

    return make


@pytest.fixture
def refuses() -> Callable[..., "pytest.RaisesExc[RequestError]"]:
    """Return a function that expects a RequestError whose message has the fragments in order."""

    def expect(*fragments: str) -> "pytest.RaisesExc[RequestError]":
        return pytest.raises(RequestError, match=".*".join(re.escape(f) for f in fragments))

    return expect


def _as_if_trained(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give layers weights that keep the spread of what passes, and batch norms their statistics.

    With torch's first weights outputs hardly depend on the image, and without statistics a batch
    normalisation does nothing.
    """
    rng = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3), (module.running_var, 0.5, 2.0),
                (module.weight, 0.5, 1.5), (module.bias, -0.3, 0.3),
            ):  # fmt: skip
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=rng)
        elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=rng)
    return net.eval()


@pytest.fixture
def exact(tmp_path: Path) -> Callable[..., QuantModel]:
    """Return a function that quantizes a network and holds it to what every network must do.

    With everything at 8 bits it is close to float, in float it is the float network, it trains,
    and both files are verified.
    """

    def check(
        net: nn.Module, images: Tensor, *, error: float = 3e-3, bits: int = 8, formats: bool = True,
        **config: Any,
    ) -> QuantModel:  # fmt: skip
        """Return the quantized network after two steps.

        Args:
            net: the float network.
            images: ``(N, C, H, W)``.
            error: most mean squared error of 8 bits, as a share of each output's variance over the
                images. A tensor of 256 levels has a noise of some 1e-4 of its variance, and each
                layer adds its weights' and its input's; one bit less has four times that.
            bits: of the searched weights in the files. At 8 bits onnxruntime cannot load a layer
                that is called twice.
            formats: write and verify both.
            config: of QuantConfig.
        """
        import export

        _as_if_trained(net)
        with torch.no_grad():
            expected = net(images.clone())
        sample = torch.zeros_like(images[:1])
        qmodel = quantize(net, QuantConfig(act_bits=8, **config), sample=sample)
        calibrate_(qmodel, [(images, torch.zeros(len(images)))])
        qmodel.eval()
        with torch.no_grad():
            with in_float(qmodel):
                same = qmodel(images)
            close = qmodel(images)
        assert same.shape == expected.shape
        # the same kernels; folding a batch normalisation rounds each weight once
        assert (same - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (close - expected).square().mean() <= error * expected.var(0).mean()
        assert not torch.equal(close, expected)  # something was quantized
        optimizer = torch.optim.SGD(qmodel.train().parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            qmodel(images).square().mean().backward()
            optimizer.step()
        for name, parameter in qmodel.named_parameters():
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
        qmodel.eval()
        searched = {layer.name: bits for layer in qmodel.policy if layer.searched}
        apply_policy_(qmodel, qmodel.policy.with_weight_bits(searched))
        for name in ("onnx", "qonnx") if formats else ():
            export.write(qmodel, tmp_path / name, format=name, sample=images[:1], overwrite=True)
            report = export.verify(qmodel, tmp_path / name, format=name, inputs=images[:8])
            assert report.verified, f"{name}: {report.reason}"
        return qmodel

    return check


class Between(nn.Module):
    """A function between two convolutions; ``parts`` are what it may use besides."""

    def __init__(self, compute: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.compute(self, self.a(x))).mean((2, 3)))


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def _images() -> Tensor:
    """Noise, and a colour for each image, so that the means of images differ."""
    rng = torch.Generator().manual_seed(1)
    colours = torch.randn(16, 3, 1, 1, generator=rng)
    return colours + torch.randn(16, 3, 12, 12, generator=rng)


@pytest.fixture
def seeded() -> Callable[[Callable[[], nn.Module]], nn.Module]:
    """Return a function that makes a network, always with the same weights."""
    return _seeded


@pytest.fixture
def between() -> Callable[..., nn.Module]:
    """Return a function that makes the network ``Between``, always with the same weights."""
    return lambda compute, **parts: _seeded(lambda: Between(compute, **parts))


@pytest.fixture
def head() -> Callable[[], nn.Module]:
    return Head


@pytest.fixture
def images() -> Callable[[], Tensor]:
    """Return a function that makes sixteen images of 3 x 12 x 12."""
    return _images


@pytest.fixture
def quantized() -> Callable[..., QuantModel]:
    """Return a function that quantizes a network for those images, and calibrates it on them."""

    def make(net: nn.Module, **config: Any) -> QuantModel:
        sample = torch.zeros_like(_images()[:1])
        qmodel = quantize(net, QuantConfig(**{"act_bits": 8, **config}), sample=sample)
        calibrate_(qmodel, [(_images(), torch.zeros(16))])
        return qmodel

    return make


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


HOSPITAL_SHAPE = (1, 6, 6)


class Tiny(nn.Module):
    """A convolution, batch norm and a head on three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(F.relu(self.hidden(x)))


class TinyMaps(nn.Module):
    """Two convolutions and a map for each of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 5, padding=2)
        self.bn = nn.BatchNorm2d(6)
        self.head = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.bn(self.conv(x))))


def _hospital_images(labels: Sequence[int], seed: int, masks: bool = False) -> ImageSet:
    """Class 0 is bright above, class 1 below, class 2 on the left, under noise.

    Masks have 1 to 3 where it is bright.
    """
    rng = torch.Generator().manual_seed(seed)
    y = torch.tensor(labels, dtype=torch.int64)
    pixels = 90 + 30 * torch.randn(len(y), *HOSPITAL_SHAPE, generator=rng)
    pixels[y == 0, :, :3] += 90
    pixels[y == 1, :, 3:] += 90
    pixels[y == 2, :, :, :3] += 90
    found = ImageSet(ArrayImages(pixels.clamp(0, 255).to(torch.uint8)), y)
    if not masks:
        return found
    regions = torch.zeros(len(y), *HOSPITAL_SHAPE, dtype=torch.uint8)
    regions[y == 0, :, :3] = 1
    regions[y == 1, :, 3:] = 2
    regions[y == 2, :, :, :3] = 3
    return replace(found, masks=ArrayImages(regions))


@pytest.fixture
def hospital_images() -> Callable[[Sequence[int], int], ImageSet]:
    return _hospital_images


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Tiny()

    return make


@pytest.fixture
def tiny_maps() -> Callable[..., nn.Module]:
    def make(seed: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return TinyMaps()

    return make


def _hospitals(*counts: tuple[int, int, int], masks: bool = False) -> list[ClientData]:
    counts = counts or ((12, 5, 4), (3, 10, 6), (8, 0, 9))
    clients = []
    held_out = [0, 1, 2] * 3
    for k, per_class in enumerate(counts):
        labels = [c for c, n in enumerate(per_class) for _ in range(n)]
        clients.append(
            ClientData(
                f"h{k}",
                _hospital_images(labels, 10 * k + 1, masks),
                _hospital_images(held_out, 10 * k + 2, masks),
                _hospital_images(held_out, 10 * k + 3, masks),
            )
        )
    return clients


@pytest.fixture
def hospitals() -> Callable[..., list[ClientData]]:
    """Return a function that makes clients from the images of each class that each has."""
    return _hospitals


@pytest.fixture
def hospitals_with_masks() -> Callable[..., list[ClientData]]:
    """Return the same function, of clients whose images have masks."""
    return partial(_hospitals, masks=True)


@pytest.fixture
def mixed_hospitals() -> Callable[..., list[ClientData]]:
    """Return the same function, of clients of which the first has masks and each other less."""

    def make(*counts: tuple[int, int, int]) -> list[ClientData]:
        levels = cycle(LEVELS)
        clients = _hospitals(*counts, masks=True)
        return [weakened(c, level, 3, 0) for c, level in zip(clients, levels, strict=False)]

    return make
