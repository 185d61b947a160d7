"""What FINN takes and what it does not: each row is a network, its verdict, and FINN's own."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import graph
from export.finn_flow import environment
from export.finn_rules import check
from export.format import SCHEMA
from sdq.apply_policy import apply_policy_
from sdq.errors import RunError
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel

SAMPLE = torch.zeros(1, 3, 8, 8)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch copies the image


def block(
    in_channels: int, out_channels: int, kernel: Any = 3, *, stride: int = 1, padding: Any = None,
    norm: Callable[[int], nn.Module] | None = nn.BatchNorm2d,
    act: Callable[[], nn.Module] | None = nn.ReLU, **conv: Any,
) -> list[nn.Module]:  # fmt: skip
    """Return a convolution, a normalisation and an activation."""
    padding = kernel // 2 if padding is None else padding
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=norm is None, **conv)
    ]
    layers += [norm(out_channels)] if norm else []
    return layers + ([act()] if act else [])


def between(*middle: nn.Module, channels: int = 4, side: int = 8) -> nn.Module:
    """Return a network with some modules between a first block of 4 channels and a head."""
    head = [nn.Flatten(), nn.Linear(channels * side * side, 5)]
    return nn.Sequential(*block(3, 4), *middle, *head)


def conv(*middle: nn.Module, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: between(*block(4, 4, **settings), *middle)


def act(kind: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: between(*block(4, 4, act=kind))


class Residual(nn.Module):
    """A block with the shortcut ``identity``, ``down`` (a convolution) or ``pad`` (option A)."""

    def __init__(self, shortcut: str = "identity", *, relu: bool = True) -> None:
        super().__init__()
        width, stride = (4, 1) if shortcut == "identity" else (8, 2)
        self.stem = nn.Sequential(*block(3, 4))
        self.body = nn.Sequential(*block(4, width, stride=stride), *block(width, width, act=None))
        self.down = nn.Sequential(*block(4, 8, 1, stride=2, act=None)) if stride == 2 else None
        self.shortcut, self.relu = shortcut, relu
        self.last = nn.Sequential(*block(width, 4))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.shortcut == "down":
            y = self.down(x)
        elif self.shortcut == "pad":
            y = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        else:
            y = x
        x = self.body(x) + y
        x = self.last(F.relu(x) if self.relu else x)
        return self.head(self.pool(x).flatten(1))


class Dense(nn.Module):
    """Every layer reads all before it, normalised (DenseNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*block(3, 4))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, 4, 3, padding=1, bias=False))
            for n in (4, 8)
        )
        self.norm, self.head = nn.BatchNorm2d(12), nn.Linear(12, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(self.pool(F.relu(self.norm(x))).flatten(1))


class Inverted(nn.Module):
    """Two blocks of MobileNetV2: linear bottlenecks, of which one is added to the other."""

    def __init__(self) -> None:
        super().__init__()

        def bottleneck() -> nn.Sequential:
            return nn.Sequential(
                *block(4, 8, 1, act=nn.ReLU6), *block(8, 8, groups=8, act=nn.ReLU6),
                *block(8, 4, 1, act=None),
            )  # fmt: skip

        self.stem, self.a, self.b = nn.Sequential(*block(3, 4)), bottleneck(), bottleneck()
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.stem(x))
        return self.head((x + self.b(x)).flatten(1))


class Joined(nn.Module):
    """Two branches in one concatenation; the deeper one may be at half the size."""

    def __init__(self, up: nn.Module | None = None, dim: int = 1) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(*block(3, 4)), nn.Sequential(*block(4, 4))
        self.up, self.dim = up, dim
        self.c = nn.Sequential(*block(8 if dim == 1 else 4, 4))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = self.b(x) if self.up is None else self.up(self.b(F.max_pool2d(x, 2)))
        return self.head(self.c(torch.cat([x, y], self.dim)))


class Head(nn.Module):
    """Any function of the first block's result, and a linear layer."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], width: int, **parts: nn.Module
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Sequential(*block(3, 4)), nn.Linear(width, 5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.stem(x)))


class Plus(nn.Module):
    """Adds a number."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x + self.number


class Gated(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.pool = nn.Sequential(*block(3, 4)), nn.AdaptiveAvgPool2d(1)
        self.gate, self.head = nn.Conv2d(4, 4, 1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x * torch.sigmoid(self.gate(self.pool(x)))).flatten(1))


class Attention(nn.Module):
    """Rows attend to rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(24, 8), nn.Linear(24, 8), nn.Linear(24, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2).reshape(-1, 8, 24)
        y = (self.q(x) @ self.k(x).transpose(1, 2)).softmax(-1)
        return self.head((y @ self.v(x)).mean(1))


class Twice(nn.Module):
    """A convolution that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Sequential(*block(3, 4)), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.again(self.stem(x)))))
        return self.head(x.flatten(1))


class Signal(nn.Module):
    """Convolutions of one dimension, on the rows of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(24, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.a(x.flatten(1, 2))))).flatten(1))


@dataclass(frozen=True)
class Row:
    """A network, how it is quantized, and what is to be found: (layer, got, repair) fragments."""

    net: Callable[[], nn.Module]
    config: dict[str, Any] = field(default_factory=dict)
    found: tuple[tuple[str, str, str], ...] = ()


DATAPATH = {"integer_datapath": True}


def row(net: Callable[[], nn.Module], *found: tuple[str, str, str], **config: Any) -> Row:
    return Row(net, {**DATAPATH, **config}, found)


PASSES: dict[str, Row] = {
    "a plain network": row(conv()),
    "mixed weight bits": row(
        lambda: between(*block(4, 4), *block(4, 4)), pins=(("3", 5), ("6", 3)), act_bits=3
    ),
    "weights of one bit": row(conv(), bit_choices=(1,), act_bits=2),
    "weights of 8 bits": row(conv(), bit_choices=(8,), act_bits=8),
    "power-of-two scales": row(conv(), restrict_scale="power_of_two"),
    "a scale a tensor": row(conv(), weight_scale="per_tensor"),
    "a bias in an inner layer": row(conv(norm=None)),
    "folded normalisation": row(conv(), batch_norm="fold"),
    "frozen normalisation": row(conv(), batch_norm="freeze"),
    "normalised input": row(lambda: nn.Sequential(nn.BatchNorm2d(3), *between(*block(4, 4)))),
    "depthwise and pointwise": row(lambda: between(*block(4, 4, groups=4), *block(4, 4, 1))),
    "dilated": row(conv(dilation=2, padding=2)),
    "7 x 7 with a stride": row(lambda: between(*block(4, 4, 7, stride=2), side=4)),
    "a kernel that is not square": row(conv(kernel=(3, 1), padding=(1, 0))),
    "no activation between": row(act(nn.Identity)),
    "ReLU6": row(act(nn.ReLU6)),
    "dropout": row(conv(nn.Dropout(0.3))),
    "maximum pooling": row(lambda: between(nn.MaxPool2d(2), *block(4, 4), side=4)),
    "padded maximum pooling": row(lambda: between(nn.MaxPool2d(3, 2, 1), *block(4, 4), side=4)),
    "maximum pooling, layers' inputs only": row(
        lambda: between(nn.MaxPool2d(2), *block(4, 4), side=4), integer_datapath=False
    ),
    "average pooling": row(lambda: between(nn.AvgPool2d(2), *block(4, 4), side=4)),
    "global average pooling": row(
        lambda: nn.Sequential(
            *block(3, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 5)
        )
    ),
    "a mean over pixels": row(lambda: Head(lambda x: x.mean((2, 3)), 4)),
    "residual": row(Residual),
    "residual without ReLU": row(lambda: Residual(relu=False)),
    "residual with a convolution": row(lambda: Residual("down")),
    "residual with padded channels": row(lambda: Residual("pad")),
    "linear bottlenecks": row(Inverted),
    "concatenation": row(Joined),
    "dense concatenations": row(Dense),
    "an added number": row(lambda: between(*block(4, 4, act=None), Plus(0.5), nn.ReLU())),
    "padded average pooling": row(lambda: between(nn.AvgPool2d(3, 1, 1), *block(4, 4))),
    "adaptive average pooling": row(lambda: between(nn.AdaptiveAvgPool2d(2), side=2)),
    "levels without zero": row(conv(), weight_quantizer="dorefa", bit_choices=(3,)),
    "a decoder without a shortcut": row(
        lambda: between(nn.MaxPool2d(2), *block(4, 4), nn.Upsample(scale_factor=2), *block(4, 4))
    ),
    "nearest upsampling": row(lambda: Joined(nn.Upsample(scale_factor=2))),
    "an even kernel, padded on one side": row(conv(kernel=2, padding="same")),
    "a map of classes": row(lambda: nn.Sequential(*block(3, 4), nn.Conv2d(4, 2, 1))),
    "linear layers on rows": row(
        lambda: nn.Sequential(
            nn.Flatten(2), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Flatten(),
            nn.Linear(24, 5),
        )
    ),
    "linear layers alone": row(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(192, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(),
            nn.Linear(8, 5),
        )
    ),
}  # fmt: skip
"""FINN takes them, and computes what PyTorch computes."""

REFUSED: dict[str, Row] = {
    "activations of 16 bits": row(conv(), ("2", "16 bits", "--act-bits 8"), act_bits=16),
    "activations in float": row(conv(), ("3", "in float", "--act-bits 8"), act_bits=32),
    "input in float": row(conv(), ("0", "input in float", "input_bits 8"), input_bits=32),
    "first and last layer in float": row(
        conv(), ("0", "left in float", "--first-last-bits"), ("7", "left in float", "--skip"),
        first_last_bits=32,
    ),
    "a skipped layer": row(
        conv(), ("3", "left in float", "--skip"), skip=("3",)
    ),
    "a skipped module": row(
        lambda: between(nn.Sequential(*block(4, 4))), ("3", "a Sequential left in float", "--skip"),
        skip=("3",),
    ),
    "groups": row(conv(groups=2), ("3", "2 groups of 4 channels to 4", "groups=1")),
    "depthwise with more channels": row(
        lambda: between(*block(4, 8, groups=4), channels=8), ("3", "4 groups", "groups=4")
    ),
    "reflected padding": row(
        conv(padding_mode="reflect"), ("3", "padding_mode='reflect'", "'zeros'")
    ),
    "transposed convolution": row(
        lambda: Joined(nn.Sequential(nn.ConvTranspose2d(4, 4, 2, 2), nn.ReLU())),
        ("up.0", "a ConvTranspose2d", "mode='nearest'"),
    ),
    "one dimension": row(
        Signal, ("a", "a Conv1d", "nn.Conv2d"), ("b", "a Conv1d", "nn.Conv2d")
    ),
    "leaky ReLU": row(act(lambda: nn.LeakyReLU(0.1)), ("5", "LeakyReLU", "nn.ReLU")),
    "PReLU": row(act(nn.PReLU), ("5", "PReLU", "nn.ReLU")),
    "SiLU": row(act(nn.SiLU), ("5", "SiLU", "nn.ReLU")),
    "sigmoid": row(act(nn.Sigmoid), ("5", "Sigmoid", "nn.ReLU")),
    "GELU": row(act(nn.GELU), ("5", "GELU", "nn.ReLU")),
    "Hardtanh": row(act(nn.Hardtanh), ("5", "Hardtanh", "nn.ReLU")),
    "clamp from below zero": row(
        lambda: Head(lambda x: (x - 1).clamp(-1, 1).flatten(1), 256),
        ("clamp", "clamp", "nn.ReLU"),
    ),
    "group normalisation": row(
        conv(norm=lambda n: nn.GroupNorm(2, n)), ("4", "GroupNorm", "nn.BatchNorm2d")
    ),
    "instance normalisation": row(
        conv(norm=nn.InstanceNorm2d), ("4", "InstanceNorm2d", "nn.BatchNorm2d")
    ),
    "normalisation behind the ReLU": row(
        lambda: between(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), *block(4, 4)),
        ("5", "floating point", "before the ReLU"),
    ),
    "pooling before the ReLU": row(
        lambda: between(nn.Conv2d(4, 4, 1), nn.MaxPool2d(2), nn.ReLU(), side=4),
        ("4", "quantized later", "activation before the pooling"),
    ),
    "pooling of rounded-up size": row(
        lambda: between(nn.MaxPool2d(3, ceil_mode=True), *block(4, 4), side=3),
        ("3", "ceil_mode", "leave them out"),
    ),
    "a residual sum in float": row(
        Residual, ("add", "operands in float", "--integer-datapath"),
        ("pool", "activations in float", "--integer-datapath"), integer_datapath=False,
    ),
    "a concatenation in float": row(
        Joined, ("cat", "operands in float", "--integer-datapath"), integer_datapath=False
    ),
    "a concatenation of rows": row(
        lambda: Joined(dim=2), ("cat", "another dimension", "dim=1")
    ),
    "interpolation": row(
        lambda: Joined(nn.Upsample(scale_factor=2, mode="bilinear")),
        ("up", "Upsample", "mode='nearest'"),
    ),
    "a difference": row(
        lambda: Head(lambda x: (F.max_pool2d(x, 3, 1, 1) - x).flatten(1), 256),
        ("sub", "sub", "learn the sign"),
    ),
    "squeeze and excitation": row(
        Gated, ("sigmoid", "sigmoid", "nn.ReLU"), ("mul", "mul", "squeeze-and-excitation")
    ),
    "attention": row(
        Attention, ("transpose", "transpose", "convolutions"), ("matmul", "matmul", "attention"),
        ("softmax", "softmax", "attention"),
        ("mean", "other dimensions", "AdaptiveAvgPool2d(1)"),
    ),
    "probabilities": row(
        lambda: nn.Sequential(between(), nn.Softmax(1)), ("1", "Softmax", "return logits")
    ),
    "a layer called twice": row(Twice, ("again", "several times", "a layer of its own")),
    "padded rows": row(
        lambda: Head(lambda x: F.pad(x, (1, 1, 1, 1)).flatten(1), 400),
        ("pad", "pad", "its padding"),
    ),
    "half of the channels": row(
        lambda: Head(lambda x: x[:, :2].flatten(1), 128), ("getitem", "getitem", "with a stride")
    ),
}  # fmt: skip
"""FINN does not, or only in floating point; what is said, in the order of the network."""


@pytest.mark.parametrize("name", PASSES)
def test_what_finn_takes_has_no_findings(name: str, network: Callable[..., QuantModel]) -> None:
    case = PASSES[name]
    assert check(network(case.net(), **case.config), SAMPLE) == ()


@pytest.mark.parametrize("name", REFUSED)
def test_what_finn_cannot_take_is_said_by_layer_with_a_repair(
    name: str, network: Callable[..., QuantModel]
) -> None:
    case = REFUSED[name]
    found = check(network(case.net(), **case.config), SAMPLE)
    assert [finding.layer for finding in found] == [layer for layer, _, _ in case.found]
    for finding, (_, got, repair) in zip(found, case.found, strict=True):
        assert finding.rule.startswith("must ")
        assert got in finding.got
        assert repair in finding.repair


# ---------------------------------------------------------------------------------- in FINN itself


@dataclass(frozen=True)
class Built:
    """What FINN makes of a network, up to layers chosen for an FPGA.

    Args:
        software: operators outside the hardware, in order.
        floats: hardware in floating point between the first thresholds and the last layer.
        difference: from PyTorch's output, over its range.
    """

    software: tuple[str, ...]
    floats: tuple[str, ...]
    difference: float


class Endless(Exception):
    """FINN did not end."""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def end(*_: object) -> None:
        raise Endless(f"{seconds} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def build(qmodel: QuantModel, folder: Path) -> Built:
    """Go through FINN's front end, whatever our rules say."""
    from export.finn_runtime import Executor
    from export.formats import finn

    images = torch.randn(2, *SAMPLE.shape[1:], generator=torch.Generator().manual_seed(1))
    finn.write(qmodel, folder, sample=SAMPLE, metadata={"schema": SCHEMA})
    file = folder / finn.FILE
    with torch.no_grad():
        expected = qmodel(images)
    model = finn._front_end(file, graph.load(file), finn.CONVERTED)
    output = model.graph.output[0].name
    with environment.finn_environment():
        found = torch.from_numpy(Executor(model.model, [output])(images.numpy())[output])
    difference = float(
        (found.reshape(expected.shape) - expected).abs().max() / np.ptp(expected.numpy())
    )
    software = [n.op_type for n in model.graph.node if not n.domain.startswith("finn.custom_op")]
    floats = _floats(model)
    with environment.finn_environment() as work:
        from finn.builder import build_dataflow_steps as steps
        from finn.builder.build_dataflow_config import DataflowBuildConfig

        settings = DataflowBuildConfig(
            output_dir=str(work), standalone_thresholds=True, generate_outputs=[],
            fpga_part="xc7z020clg400-1", synth_clk_period_ns=10.0,
        )  # fmt: skip
        for step in (
            steps.step_create_dataflow_partition, steps.step_minimize_bit_width_initial,
            steps.step_specialize_layers,
        ):  # fmt: skip
            model = step(model, settings)
    return Built(tuple(software), tuple(floats), difference)


def _floats(model: Any) -> list[str]:
    """Return the hardware that reads floating-point numbers, but for scales at the two ends.

    The mean of a global pooling is one: a sum of codes, times a scale, on its way to thresholds.
    """
    nodes = list(model.graph.node)
    first = next(i for i, n in enumerate(nodes) if n.op_type == "Thresholding")
    functions = [n.op_type for n in nodes if n.op_type in ("HWSoftmax", "PWPolyF")]
    last = max(i for i, n in enumerate(nodes) if n.op_type in ("MVAU", "VVAU"))
    pooled = set[str]()
    found = []
    for node in nodes[first + 1 : last]:
        before = model.find_producer(node.input[0])
        if before is not None and (before.op_type == "GlobalAccPool" or before.name in pooled):
            pooled.add(node.name)
            continue
        kinds = [
            model.get_tensor_datatype(x) for x in node.input if model.get_initializer(x) is None
        ]
        if any("FLOAT" in kind.name for kind in kinds):
            found.append(node.op_type)
    return found + functions


FEW = ("a plain network", "residual with padded channels", "nearest upsampling")


@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in PASSES]
)
def test_finn_takes_it_and_computes_the_same(
    name: str, network: Callable[..., QuantModel], tmp_path: Path
) -> None:
    if environment.missing():
        pytest.skip("FINN+ is not installed")
    case = PASSES[name]
    with at_most(100):
        built = build(network(case.net(), **case.config).eval(), tmp_path)
    assert built.floats == ()
    assert set(built.software) <= {"Transpose", "Flatten", "BatchNormalization", "Mul", "Add"}
    assert built.difference < 1e-5


@pytest.mark.slow
def test_channels_with_bits_of_their_own_become_one_weight(
    network: Callable[..., QuantModel], tmp_path: Path
) -> None:
    if environment.missing():
        pytest.skip("FINN+ is not installed")
    qmodel = network(conv()(), **DATAPATH).eval()
    each = {"weight_bits": 8, "channel_bits": (1, 2, 6, 8)}
    layers = [replace(x, **each) if x.name == "3" else x for x in qmodel.policy]
    apply_policy_(qmodel, BitwidthPolicy(tuple(layers)))
    assert check(qmodel, SAMPLE) == ()
    assert build(qmodel, tmp_path).difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_finn_does_not_take_what_is_refused(
    name: str, network: Callable[..., QuantModel], tmp_path: Path
) -> None:
    if environment.missing():
        pytest.skip("FINN+ is not installed")
    from finn.util.exception import FINNUserError

    case = REFUSED[name]
    try:
        with at_most(100):
            built = build(network(case.net(), **case.config).eval(), tmp_path)
    except (RunError, FINNUserError, Endless, ValueError):  # the last in its Python layers
        return
    inside = set(built.software) & {"MatMul", "Conv"}
    assert built.floats or inside or built.difference > 1e-5
