"""Every kind of module is quantized exactly: close at 8 bits, trained, in both files verified."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Case = Callable[[], nn.Module]
CLASSES = 5


def head(channels: int = 8) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def between(*modules: nn.Module, channels: int = 8, into: int = 8) -> nn.Module:
    """Modules between two convolutions."""
    return nn.Sequential(
        nn.Conv2d(3, into, 3, padding=1), *modules, nn.Conv2d(channels, 8, 3, padding=1), head()
    )


class Net(nn.Module):
    """Two convolutions, a head, and a function of them."""

    def __init__(self, compute: Callable[[Any, Tensor], Tensor], channels: int = 8) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = head(channels)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.compute(self, self.a(x)))


class Sequence(nn.Module):
    """One-dimensional layers on an image read row by row."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x.flatten(2)).mean(2))


class SigmoidGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.value(x) * torch.sigmoid(self.gate(x)))


class TokenMlp(nn.Module):
    """A block as of a vision transformer, without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Attention(nn.Module):
    """Self-attention by hand: its products of activations stay in float."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.heads, self.einsum = 2, einsum

    def split(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        return x.view(n, tokens, self.heads, width // self.heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        q, k, v = self.split(self.q(y)), self.split(self.k(y)), self.split(self.v(y))
        if self.einsum:
            weights = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])
            y = torch.einsum("bhij,bhjd->bhid", weights.softmax(-1), v)
        else:
            weights = (q @ k.transpose(-2, -1)) * q.size(-1) ** -0.5
            y = torch.matmul(F.softmax(weights, dim=-1), v)
        y = y.transpose(1, 2).reshape(x.shape)
        return self.head((x + self.out(y)).mean(dim=1))


class Positions(nn.Module):
    """A positional embedding and a learned factor for the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.mix = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 8)
        self.positions = nn.Parameter(0.5 * torch.randn(1, 16, 8))
        self.factor = nn.Parameter(torch.tensor(0.3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head((x + self.factor * self.mix(x)).mean(1))


class Query(nn.Module):
    """A learned query, which is a parameter that enters a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.query = nn.Parameter(torch.randn(1, 2, 8))
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        weights = (self.q(self.query) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((weights @ self.v(x)).mean(1))


class Unet(nn.Module):
    """Upsampled and padded to the size of what is concatenated, an odd one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.down, self.deep = nn.Conv2d(6, 8, 3, 2), nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.out = nn.Conv2d(12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.first(x))
        right = self.up(F.relu(self.deep(F.relu(self.down(left)))))
        high, wide = left.size(2) - right.size(2), left.size(3) - right.size(3)
        right = F.pad(right, [wide // 2, wide - wide // 2, high // 2, high - high // 2])
        return self.out(torch.cat([left, right], dim=1))


class Resized(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.down, self.deep = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.out, self.how = nn.Conv2d(11, 3, 1), how

    def forward(self, x: Tensor) -> Tensor:
        y = F.interpolate(F.relu(self.deep(F.relu(self.down(x)))), size=x.shape[2:], **self.how)
        return self.out(torch.cat((x, y), 1))


def shuffled(net: Any, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = F.relu(x).view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
    return net.b(x)


def squeezed(net: Any, x: Tensor) -> Tensor:
    x = F.relu(x)
    return x * net.excite(x.mean((2, 3), keepdim=True))


class Squeezed(Net):
    def __init__(self) -> None:
        super().__init__(squeezed)
        del self.b
        self.excite = nn.Sequential(
            nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1), nn.Hardsigmoid()
        )


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.right.weight = self.left.weight
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.right(F.relu(self.left(F.relu(self.first(x)))))))


class Loops(nn.Module):
    """Containers in containers, and loops over them; a key that is no Python name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"3x3": nn.Conv2d(8, 8, 3, padding=1), "1x1": nn.Conv2d(8, 8, 1)})
            for _ in range(2)
        )
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(sum(layer(x) for layer in block.values()))  # type: ignore[arg-type]
        return self.head(x)


class Preactivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.conv1(F.relu(self.bn1(x)))
        return self.head(x + self.conv2(F.relu(self.bn2(y))))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        most, mean = F.adaptive_max_pool2d(x, 1), F.adaptive_avg_pool2d(x, 1)
        return self.head(torch.cat([most, mean], 1).flatten(1))


class Vector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(432, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2),
            nn.Linear(12, 12, bias=False), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, CLASSES),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Own(nn.Conv2d):
    """A layer of a subclass that computes what torch's class does."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(channels, width, 3, padding=1, bias=False)


def conv(channels: int = 8, width: int = 8, kernel: int = 3, **how: Any) -> nn.Module:
    return nn.Conv2d(channels, width, kernel, **how)


CASES: dict[str, Case] = {
    "relu6": lambda: between(nn.ReLU6()),
    "silu": lambda: between(nn.SiLU()),
    "hardswish": lambda: between(nn.Hardswish()),
    "sigmoid gate": SigmoidGate,
    "gelu": lambda: between(nn.GELU(), nn.GELU("tanh")),
    "leaky and prelu": lambda: between(nn.LeakyReLU(0.1), nn.PReLU(8), nn.PReLU()),
    "elu celu selu": lambda: between(nn.ELU(), nn.CELU(0.5), nn.SELU()),
    "mish softplus softsign": lambda: between(nn.Mish(), nn.Softplus(), nn.Softsign()),
    "hardtanh hardsigmoid": lambda: between(nn.Hardtanh(), nn.Hardsigmoid()),
    "conv1d": lambda: Sequence(
        nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 5, 2, groups=2, bias=False)
    ),
    "depthwise": lambda: between(conv(padding=1, groups=8), conv(kernel=1), nn.ReLU()),
    "more outputs a channel": lambda: between(conv(8, 16, groups=8), nn.ReLU(), channels=16),
    "grouped and dilated": lambda: between(conv(groups=2, dilation=2, padding=2), nn.ReLU()),
    "asymmetric": lambda: between(
        nn.Conv2d(8, 8, (1, 5), (1, 2), (0, 2)), nn.ReLU(), nn.Conv2d(8, 8, (5, 1), padding=(2, 0))
    ),
    "transposed": lambda: between(
        nn.ReLU(), nn.Conv2d(8, 8, 3, 2), nn.ConvTranspose2d(8, 8, 3, 2, 1, output_padding=1),
        nn.ReLU(), nn.ConvTranspose2d(8, 8, 2, 2, groups=4, bias=False),
    ),
    "transposed and dilated": lambda: between(
        nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, padding=2, dilation=2), nn.ReLU()
    ),
    "transposed 1d": lambda: Sequence(
        nn.Conv1d(3, 8, 3, 2), nn.ReLU(), nn.ConvTranspose1d(8, 8, 3, 2, output_padding=1)
    ),
    "group norm": lambda: between(nn.GroupNorm(2, 8), nn.ReLU(), conv(), nn.GroupNorm(8, 8)),
    "instance norm": lambda: between(nn.InstanceNorm2d(8, affine=True), nn.ReLU(), conv()),
    "layer norm of an image": lambda: between(nn.LayerNorm([8, 12, 12]), nn.ReLU()),
    "tokens": TokenMlp,
    "functional": lambda: Net(
        lambda net, x: torch.cat([F.relu(x), torch.flip(F.relu(net.b(F.relu(x))) + x, [1])], 1), 16
    ),
    "called twice": lambda: Net(lambda net, x: net.b(F.relu(net.b(F.relu(x))))),
    "tied weights": Tied,
    "loops": Loops,
    "unet": Unet,
    "resized nearest": Resized,
    "resized bilinear": lambda: Resized(mode="bilinear", align_corners=False),
    "resized to corners": lambda: Resized(mode="bilinear", align_corners=True),
    "resized bicubic": lambda: Resized(mode="bicubic"),
    "pixel shuffle": lambda: nn.Sequential(conv(3, 12), nn.PixelShuffle(2), conv(3, 4, 1)),
    "pixel unshuffle": lambda: between(nn.PixelUnshuffle(2), nn.ReLU(), channels=32),
    "channel shuffle": lambda: Net(shuffled),
    "glu": lambda: between(nn.GLU(dim=1), channels=4),
    "split gate": lambda: Net(lambda net, x: (lambda y, z: y * torch.tanh(z))(*x.chunk(2, 1)), 4),
    "split into parts": lambda: Net(
        lambda net, x: (lambda y, z: torch.cat([z, F.relu(y)], 1))(*torch.split(x, [3, 5], dim=1))
    ),
    "squeeze and excitation": Squeezed,
    "two pools": Pooled,
    "max pool with ceil": lambda: between(nn.ReLU(), nn.MaxPool2d(2, 2, ceil_mode=True)),
    "average without padding": lambda: between(
        nn.ReLU(), nn.AvgPool2d(3, 2, 1, count_include_pad=False)
    ),
    "attention": lambda: Attention(einsum=False),
    "attention by einsum": lambda: Attention(einsum=True),
    "preactivation": Preactivation,
    "positions and a factor": Positions,
    "mean and sum over dims": lambda: Net(
        lambda net, x: F.relu(x) * (x.mean((2, 3), keepdim=True) + x.sum(1, keepdim=True) / 8)
    ),
    "where and clamp": lambda: Net(
        lambda net, x: net.b(torch.where(x > 0.1, x.clamp(max=1.5), 0.2 * x))
    ),
    "maximum and abs": lambda: Net(lambda net, x: net.b(torch.maximum(x, x.abs() / 2))),
    "identity and dropout": lambda: between(nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.2)),
    "no bias": lambda: nn.Sequential(
        conv(3, 8, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, CLASSES, bias=False),
    ),
    "one pixel": lambda: between(nn.ReLU(), nn.AdaptiveAvgPool2d(1), conv(kernel=1), nn.ReLU()),
    "padding circular and reflect": lambda: between(
        conv(padding=1, padding_mode="circular"), nn.ReLU(),
        conv(padding=2, dilation=2, padding_mode="reflect"),
    ),
    "padding replicate": lambda: between(nn.ReLU(), conv(padding=1, padding_mode="replicate")),
    "padding same": lambda: between(
        conv(kernel=5, padding="same", dilation=2), nn.ReLU(), conv(padding="valid")
    ),
    "padding modules": lambda: between(
        nn.ZeroPad2d((1, 0, 2, 0)), nn.ReflectionPad2d(1), nn.ReplicationPad2d(1)
    ),
    "batch norm of vectors": Vector,
    "subclass of a layer": lambda: nn.Sequential(Own(3, 8), nn.ReLU(), Own(8, 8), head()),
    "in place": lambda: between(nn.ReLU(inplace=True), nn.Hardswish(inplace=True)),
    "transposed to a size": lambda: Net(
        lambda net, x: net.up(F.max_pool2d(F.relu(x), 2), output_size=x.shape[-2:])
    ),
    "softmax over channels": lambda: between(nn.Softmax2d(), nn.Softmax(1)),
}  # fmt: skip

TWICE = {"called twice"}
"""With 8 bits onnxruntime cannot load a layer that is called twice (docs/verification.md)."""

MAPS = {"unet", *(name for name in CASES if name.startswith("resized"))}
"""Each pixel of a map is a decision, and none may differ because onnxruntime rounds biases."""

LOOSE = {"instance norm": 1e-2, "softmax over channels": 1e-2}
"""Those take away most of what tells one image from another, and leave the noise."""


def made(case: Case, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = case()
        if case is CASES["transposed to a size"]:
            net.up = nn.ConvTranspose2d(8, 8, 3, 2, 1)
        return net


def images(side: int = 12) -> Tensor:
    """Noise, and a colour for each image, so that the means of images differ."""
    rng = torch.Generator().manual_seed(1)
    colours = torch.randn(16, 3, 1, 1, generator=rng)
    return colours + torch.randn(16, 3, side, side, generator=rng)


@pytest.mark.parametrize("name", CASES)
def test_a_module_is_quantized_exactly(name: str, exact: Callable[..., Any]) -> None:
    side = {"positions and a factor": 16, "unet": 13}.get(name, 12)
    bits, error = 4 if name in TWICE else 8, LOOSE.get(name, 3e-3)
    config = {"integer_bias": True} if name in MAPS else {}
    exact(made(CASES[name]), images(side), bits=bits, error=error, **config)


@pytest.mark.xfail(
    reason="qonnx takes a quantizer whose input is constant for one of a weight", strict=True
)
def test_a_learned_query_is_quantized_exactly(exact: Callable[..., Any]) -> None:
    exact(made(Query), images(16))


class Signal(nn.Module):
    """A network of signals ``(N, C, L)``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3, 2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x)))).mean(2))


def test_signals_are_close_and_train(exact: Callable[..., Any]) -> None:
    exact(made(Signal), images().flatten(2), formats=False)


@pytest.mark.xfail(reason="verify wants images (N, C, H, W)", strict=True)
def test_signals_are_quantized_exactly(exact: Callable[..., Any]) -> None:
    exact(made(Signal), images().flatten(2))


def test_a_learned_query_is_close_and_trains(exact: Callable[..., Any]) -> None:
    qmodel = exact(made(Query), images(16), formats=False)
    assert "q_input" in qmodel.act_quantizers()
