"""What integer hardware stores between layers is quantized, and what it adds has one scale."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import export
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import SearchConfig
from sdq.cost import Budget
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.quant_model import QuantModel
from sdq.search import search

SAMPLE = torch.zeros(1, 3, 12, 12)


class Head(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def scales(qmodel: QuantModel) -> list[set[str]]:
    """Return the paths of the quantizers that share a scale."""
    found: dict[int, set[str]] = {}
    for path, quantizer in qmodel.act_quantizers().items():
        found.setdefault(id(quantizer), set()).add(path)
    return list(found.values())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = Head()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        return self.head(self.c(F.relu(self.b(x) + x)))


class PassedOn(Residual):
    """The shortcut is a module that does nothing, as in torchvision's networks."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(x)))
        return self.head(self.c(F.relu(self.b(x) + self.same(x))))


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool = nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(self.pool(x)))))
        return self.last(x).mean((2, 3))


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.c, self.head = nn.Conv2d(8, 8, 1), Head()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(torch.cat([F.relu(self.a(x)), self.b(x).tanh()], 1))))


class Chained(nn.Module):
    """Every layer reads all before it: one concatenation in the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.layers = nn.ModuleList(nn.Conv2d(4 * i, 4, 3, padding=1) for i in (1, 2, 3))
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x))], 1)
        return self.head(x)


class Upsampled(nn.Module):
    """The first upsampling mixes pixels, the second repeats them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample(F.relu(self.a(x))).amax((2, 3), keepdim=True)
        return self.c(F.interpolate(F.relu(x), scale_factor=2)).flatten(1)


DATAPATHS: dict[str, tuple[Callable[[], nn.Module], list[set[str]]]] = {
    "residual": (
        Residual,
        [{"a_input"}, {"b_input", "b_output"}, {"c_input"}, {"c_output"}, {"head.linear_input"}],
    ),
    "squeeze and excitation": (
        Excited,
        [{"a_input"}, {"relu_output"}, {"down_input"}, {"up_input"}, {"sigmoid_output"},
         {"last_input"}, {"last_output"}, {"mean_output"}],
    ),
    "concatenation": (
        Concatenated,
        [{"a_input"}, {"relu_output", "tanh_output", "c_input"}, {"relu_1_output"},
         {"head.linear_input"}],
    ),
    "chain of concatenations": (
        Chained,
        [{"first_input"},
         {"layers.0_input", "relu_1_output", "layers.1_input", "relu_2_output", "layers.2_input",
          "relu_3_output", "cat_2_output"},
         {"head.linear_input"}],
    ),
    "average pool": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1),
            Head(),
        ),
        # what is averaged is stored; the maximum of the averages has their codes
        [{"0_input"}, {"_1_output"}, {"4_input"}, {"_4_output"}, {"5.linear_input"}],
    ),
    "maximum pool and flattening": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(), nn.Flatten(),
            nn.Linear(200, 5),
        ),
        [{"0_input"}, {"5_input"}],
    ),
    "nearest and linear upsampling": (
        Upsampled, [{"a_input"}, {"relu_output"}, {"upsample_output"}, {"c_input"}]
    ),
}  # fmt: skip


def test_what_passes_an_identity_is_one_tensor(
    seeded: Callable[..., nn.Module], quantized: Callable[..., QuantModel]
) -> None:
    qmodel = quantized(seeded(PassedOn), integer_datapath=True)
    assert scales(qmodel) == DATAPATHS["residual"][1]


@pytest.mark.parametrize("name", DATAPATHS)
def test_what_hardware_adds_or_joins_has_one_scale(
    name: str, exact: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module], quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    make, expected = DATAPATHS[name]
    # twice the quantizers, and one scale for tensors of different sizes
    qmodel = exact(seeded(make), images(), integer_datapath=True, error=1e-2)
    assert scales(qmodel) == expected
    plain = quantized(seeded(make))
    assert all(path.endswith("_input") for path in plain.act_quantizers())


@pytest.mark.parametrize("name", ["maximum pool and flattening", "average pool"])
def test_what_passes_codes_on_may_stand_behind_the_quantizer(
    name: str, images: Callable[[], Tensor], seeded: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    make, _ = DATAPATHS[name]
    qmodel = quantized(seeded(make), integer_datapath=True).eval()
    quantizer = qmodel.act_quantizers()[qmodel.input_quantizer("5" if "max" in name else "4")]
    seen: list[Tensor] = []
    layer = qmodel.layer("5" if "max" in name else "4")
    layer.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        qmodel(images())
    codes = seen[0] / quantizer.scale.detach()
    assert (codes - codes.round()).abs().max() < 1e-4
    assert codes.unique().numel() > 4


def test_a_layer_behind_a_pool_is_known_to_read_the_quantizer(
    quantized: Callable[..., QuantModel],
) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    qmodel = quantized(net, integer_datapath=True, act_choices=(2, 4))
    assert qmodel.searched_acts() == {"3_input": ("3",)}
    assert [qmodel.input_quantizer(name) for name in "037"] == ["0_input", "3_input", "7_input"]


@pytest.mark.parametrize("flat", [nn.Flatten(), nn.Sequential(nn.MaxPool2d(2), nn.Flatten())])
def test_the_network_s_input_keeps_its_bits_behind_what_passes_it_on(
    flat: nn.Module, quantized: Callable[..., QuantModel]
) -> None:
    side = SAMPLE.shape[-1] // (1 if isinstance(flat, nn.Flatten) else 2)
    net = nn.Sequential(flat, nn.Linear(3 * side**2, 8), nn.ReLU(), nn.Linear(8, 5))
    qmodel = quantized(net, act_choices=(2, 4), first_last_bits=None)
    assert list(qmodel.searched_acts().values()) == [("3",)]


class Again(nn.Module):
    """A layer that is called with two tensors, one of which another layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d, self.head = nn.Conv2d(4, 4, 1), Head(4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        u, v = F.relu(self.b(x)), F.relu(self.c(x))
        return self.head(F.relu(self.d(F.relu(self.c(u + v)))))


class LastAgain(nn.Module):
    """The first tensor that a layer is called with is what the last layer reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        y = self.c(F.relu(self.c(x)))
        return (self.last(x) + y[:, :1]).mean((2, 3))


@pytest.mark.parametrize("seed", range(4))
def test_what_a_layer_reads_that_is_called_with_several_inputs_keeps_its_bits(
    seed: int, images: Callable[[], Tensor], seeded: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    qmodel = quantized(
        seeded(Again), act_choices=(2, 4, 8), bit_choices=(2, 4, 8), first_last_bits=None
    )
    assert {name for found in qmodel.searched_acts().values() for name in found} == {
        "d", "head.linear",
    }  # fmt: skip
    macs = {spec.name: spec.macs for spec in qmodel.layers}
    limit = 4.5 * 4.5 * sum(macs.values())
    policy = search(
        qmodel, [(images(), torch.zeros(16).long())], budget=Budget(bops=limit), method="random",
        config=SearchConfig(seed=seed),
    )  # fmt: skip
    apply_policy_(qmodel, policy)  # which was refused, for c had other bits than b
    for bits in policy:
        assert bits.act_bits == qmodel.act_quantizers()[qmodel.input_quantizer(bits.name)].bits
    assert sum(macs[b.name] * b.weight_bits * b.act_bits for b in policy) <= limit


def test_a_layer_of_several_inputs_counts_with_the_widest(
    seeded: Callable[..., nn.Module], quantized: Callable[..., QuantModel]
) -> None:
    net = seeded(Again)  # b reads what c reads first; c is called again
    wide = quantized(net, act_bits=4, first_last_bits=None)
    assert wide.policy["c"].act_bits == 4
    head_first = quantized(seeded(LastAgain), act_bits=4)  # its last layer reads the first tensor
    assert head_first.policy["c"].act_bits == 8
    path = head_first.input_quantizer("c")  # of the last call
    assert path is not None
    assert head_first.act_quantizers()[path].bits == 4


def test_a_shared_scale_is_calibrated_on_all_that_share_it(
    images: Callable[[], Tensor], seeded: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    net = seeded(Concatenated)
    with torch.no_grad():  # the branch that is no tanh is ten times larger
        net.a.weight.mul_(10)
    qmodel = quantized(net, integer_datapath=True)
    quantizer = qmodel.act_quantizers()["tanh_output"]
    with torch.no_grad():
        largest = F.relu(net.a(images())).max()
    assert quantizer.signed  # for tanh is
    assert float(quantizer.scale.detach()) * 127 > 0.5 * float(largest)


def test_operands_share_the_codes_of_an_integer_addition(
    images: Callable[[], Tensor], seeded: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    qmodel = quantized(seeded(Residual), integer_datapath=True).eval()
    seen: list[Tensor] = []
    modules, quantizer = qmodel.act_modules(), qmodel.act_quantizers()["b_input"]
    for path in ("b_input", "b_output"):
        modules[path].register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        qmodel(images())
    for x in seen:  # whole multiples of one step
        steps = x / quantizer.scale.detach()
        assert (steps - steps.round()).abs().max() < 1e-4
    assert not torch.equal(seen[0], seen[1])


def test_learned_bits_of_a_shared_scale_change_for_all(
    tmp_path: Any, refuses: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module], quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    qmodel = quantized(
        seeded(Chained), integer_datapath=True, act_choices=(2, 4, 8), first_last_bits=None
    ).eval()
    searched = qmodel.searched_acts()
    assert searched == {
        "layers.0_input": ("layers.0", "layers.1", "layers.2"),
        "head.linear_input": ("head.linear",),
    }

    def with_acts(**bits: int) -> BitwidthPolicy:
        names = {name.replace("_", "."): b for name, b in bits.items()}
        return BitwidthPolicy(
            tuple(
                LayerBits(**{**vars(b), "act_bits": names.get(b.name, b.act_bits)})
                for b in qmodel.policy
            )
        )

    with refuses("layers layers.0, layers.1, layers.2: act_bits must be the same", "[4, 8]"):
        apply_policy_(qmodel, with_acts(layers_0=4))
    apply_policy_(qmodel, with_acts(layers_0=4, layers_1=4, layers_2=4))
    shared = {path for group in scales(qmodel) if "layers.0_input" in group for path in group}
    assert len(shared) == 7
    assert {qmodel.act_quantizers()[path].bits for path in shared} == {4}
    calibrate_(qmodel, [(images(), torch.zeros(16))])
    for name in ("onnx", "qonnx"):
        export.write(qmodel, tmp_path, format=name, sample=SAMPLE)
        report = export.verify(qmodel, tmp_path, format=name, inputs=images())
        assert report.verified, report.reason
