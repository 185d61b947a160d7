"""The quantized network: what Brevitas says of it equals what we say, and what is refused."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import quantizers
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.checkpoint import load_tensors
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.learned_scale import ActQuantizer
from sdq.models import resnet20
from sdq.quant_model import QuantModel, quantize

BITS = (1, 2, 3, 4, 6, 8)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(net: nn.Module, images: Tensor, **config: Any) -> QuantModel:
    qmodel = quantize(net, QuantConfig(**config), sample=torch.zeros_like(images[:1]))
    calibrate_(qmodel, [(images, torch.zeros(len(images)))])
    return qmodel.eval()


def at_bits(qmodel: QuantModel, bits: int) -> QuantModel:
    names = [b.name for b in qmodel.policy if b.searched]
    apply_policy_(qmodel, qmodel.policy.with_weight_bits(dict.fromkeys(names, bits)))
    return qmodel


def mixed(qmodel: QuantModel, bits: tuple[int, ...]) -> QuantModel:
    names = [b.name for b in qmodel.policy if b.searched]
    apply_policy_(qmodel, qmodel.policy.with_weight_bits(dict(zip(names, bits, strict=True))))
    return qmodel


# ------------------------------------------------------------------------ agreement with Brevitas


@pytest.mark.parametrize("restrict", ["float", "power_of_two"])
@pytest.mark.parametrize("weight_scale", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("bits", BITS)
def test_brevitas_reads_the_same_integers_scale_and_bits(
    toy: Callable[..., nn.Module], bits: int, weight_scale: str, restrict: str
) -> None:
    qmodel = calibrated(
        toy(), randn(16, 1, 8, 8), weight_scale=weight_scale, restrict_scale=restrict
    )
    at_bits(qmodel, bits)
    for layer_bits in qmodel.policy:
        expected_bits = bits if layer_bits.searched else 8
        layer: Any = qmodel.layer(layer_bits.name)
        with warnings.catch_warnings():
            # Brevitas names its tensors, a torch feature that calls itself a prototype
            warnings.filterwarnings("ignore", message="Named tensors")
            tensor = layer.quant_weight()
        ours: Any = qmodel.weight_quantizer(layer_bits.name)
        weight = qmodel.weight(layer_bits.name)
        codes = quantizers.codes(weight, ours.scale, expected_bits, signed=True)
        assert torch.equal(tensor.int(float_datatype=True), codes)
        assert torch.equal(tensor.value, codes * ours.scale)
        assert torch.equal(tensor.scale, ours.scale)
        assert float(tensor.bit_width) == expected_bits
        assert float(tensor.zero_point) == 0
        assert bool(tensor.signed_t)
        if weight_scale == "per_channel":
            assert tensor.scale.shape == (len(weight), *[1] * (weight.dim() - 1))


def step(x: Tensor, quantizer: ActQuantizer) -> Tensor:
    return quantizers.quantize(x, quantizer.scale, quantizer.bits, quantizer.signed)


@pytest.mark.parametrize("bits", BITS)
def test_the_output_equals_a_hand_built_computation(
    toy: Callable[..., nn.Module], bits: int
) -> None:
    images = randn(16, 1, 8, 8)
    qmodel = at_bits(calibrated(toy(), images, act_bits=4), bits)
    acts = qmodel.act_quantizers()
    net: Any = qmodel.net
    assert list(acts) == [
        "first_input", "small_input", "wide_input", "deep_input", "hidden_input", "last_input",
    ]  # fmt: skip

    def weight(name: str) -> Tensor:
        values: Tensor = qmodel.weight_quantizer(name)(qmodel.weight(name))[0]
        return values

    with torch.no_grad():
        x = F.conv2d(step(images, acts["first_input"]), weight("first"), padding=1)
        x = step(F.relu(net.bn1(x)), acts["small_input"])
        x = F.relu(F.conv2d(x, weight("small"), net.small.bias, padding=1)) + x
        x = F.conv2d(step(x, acts["wide_input"]), weight("wide"), stride=2, padding=1)
        x = step(F.relu(net.bn2(x)), acts["deep_input"])
        x = F.relu(F.conv2d(x, weight("deep"), net.deep.bias, padding=1, groups=2)).mean((2, 3))
        x = F.relu(F.linear(step(x, acts["hidden_input"]), weight("hidden"), net.hidden.bias))
        x = F.linear(step(x, acts["last_input"]), weight("last"), net.last.bias)
        # the same operations on the same values
        assert torch.equal(qmodel(images), x)


def test_eight_bits_come_close_to_the_float_network(toy: Callable[..., nn.Module]) -> None:
    net, images = toy().eval(), randn(64, 1, 8, 8)
    logits = net(images)
    error = (calibrated(net, images, act_bits=8)(images) - logits).abs().max()
    # seven layers at 256 levels: about 1 % of the logits' spread
    assert error < 0.03 * (logits.max() - logits.min())


def test_fewer_bits_are_further_from_the_float_network(toy: Callable[..., nn.Module]) -> None:
    net, images = toy().eval(), randn(64, 1, 8, 8)
    logits = net(images).detach()
    with torch.no_grad():
        quantized = [at_bits(calibrated(net, images, act_bits=8), b)(images) for b in (8, 4, 2, 1)]
    errors = [float((x - logits).square().mean()) for x in quantized]
    assert errors == sorted(errors)


# ---------------------------------------------------------------------- where activations are cut


def test_resnet20_quantizes_each_layer_s_input_once() -> None:
    qmodel = quantize(resnet20.build(10), sample=torch.zeros(1, 3, 32, 32))
    acts = qmodel.act_quantizers()
    # the input, and what enters the 18 convolutions of the blocks and the classifier
    assert list(acts) == [f"{b.name}_input" for b in qmodel.policy]
    assert len(acts) == 20
    assert [q.signed for q in acts.values()] == [True] + [False] * 19
    assert [q.bits for q in acts.values()] == [8] + [4] * 18 + [8]


def test_the_residual_addition_reads_the_quantized_tensor() -> None:
    net = quantize(resnet20.build(10), sample=torch.zeros(1, 3, 32, 32)).net
    users: dict[str, set[str]] = {}
    for node in net.graph.nodes:
        for source in node.all_input_nodes:
            users.setdefault(str(source.target), set()).add(str(node.target))
    # the block's input feeds its first convolution and its addition, and both see the quantized
    for block in ("layer1.0", "layer1.1", "layer2.1"):
        readers = users[f"{block}.conv1_input"]
        assert f"{block}.conv1" in readers
        assert any("add" in u for u in readers)
    # nothing else reads the activation that was quantized
    for node in net.graph.nodes:
        if str(node.target).endswith("_input"):
            (source,) = node.all_input_nodes
            assert list(source.users) == [node]


class Functional(nn.Module):
    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


def pad_negative(x: Tensor) -> Tensor:
    return F.pad(x[:, :, 1:-1, 1:-1].relu(), (1, 1, 1, 1), value=-2.0)


BETWEEN: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    # name: (what stands between two convolutions, whether the result can be negative)
    "relu": (F.relu, False),
    "relu_method": (lambda x: x.relu(), False),
    "torch_relu": (torch.relu, False),
    "relu6": (F.relu6, False),
    "sigmoid": (torch.sigmoid, False),
    "relu_pool": (lambda x: F.max_pool2d(F.relu(x), 3, 1, 1), False),
    "relu_avg": (lambda x: F.avg_pool2d(F.relu(x), 3, 1, 1), False),
    "relu_sum": (lambda x: F.relu(x) + F.relu6(x), False),
    "relu_product": (lambda x: F.relu(x) * torch.sigmoid(x), False),
    "relu_cat": (lambda x: torch.cat([F.relu(x[:, :2]), x[:, 2:].sigmoid()], 1), False),
    "relu_plus_one": (lambda x: F.relu(x) + 1.0, False),
    "nothing": (lambda x: x, True),
    "tanh": (torch.tanh, True),
    "gelu": (F.gelu, True),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), True),
    "silu": (F.silu, True),
    "half_cat": (lambda x: torch.cat([F.relu(x[:, :2]), x[:, 2:]], 1), True),
    "residual": (lambda x: F.relu(x) + x, True),
    "difference": (lambda x: F.relu(x) - torch.sigmoid(x), True),
    "negated": (lambda x: -F.relu(x), True),
    "minus_by_plus": (lambda x: F.relu(x) + (-1.0), True),
    "plus_minus_from_the_left": (lambda x: -1.0 + F.relu(x), True),
    "times_minus": (lambda x: F.relu(x) * -1.0, True),
    "add_alpha": (lambda x: torch.add(F.relu(x), torch.sigmoid(x), alpha=-1), True),
    "pad_negative": (pad_negative, True),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_quantizer_is_unsigned_only_where_nothing_can_be_negative(name: str) -> None:
    between, signed = BETWEEN[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Functional(between)
    qmodel = quantize(net, QuantConfig(act_bits=4), sample=torch.zeros(1, 2, 8, 8))
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, signed]
    seen = between(net.a(randn(8, 2, 8, 8)))
    assert signed == bool((seen < 0).any())  # the table above tells the truth


@pytest.mark.parametrize(
    ("kind", "signed"),
    [
        (nn.ReLU(), False), (nn.ReLU6(), False), (nn.Sigmoid(), False), (nn.Hardtanh(), True),
        (nn.GELU(), True), (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), nn.Upsample(scale_factor=2)),
                            False),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), True),
        (nn.Sequential(nn.ReLU(), nn.Dropout(0.2)), False),
        (nn.Sequential(nn.ReLU(), nn.Upsample(scale_factor=2, mode="bicubic"), nn.AvgPool2d(2)),
         True),  # a cubic overshoots
    ],
)  # fmt: skip
def test_modules_and_their_signs(kind: nn.Module, signed: bool) -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), kind, nn.Conv2d(4, 4, 3, padding=1))
    qmodel = quantize(net, sample=torch.zeros(1, 2, 8, 8))
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, signed]


# ------------------------------------------------------------------------------ unusual networks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "dropout",
    [
        lambda x, training: F.dropout(x, 0.5, training),
        lambda x, training: F.dropout(x, p=0.5, training=training),
        lambda x, training: F.dropout(x, training=training),
        lambda x, training: F.dropout2d(x, 0.5, training),
    ],
    ids=["positional", "keyword", "default", "dropout2d"],
)
def test_functional_dropout_stays_switchable(
    dropout: Callable[[Tensor, bool], Tensor], training: bool
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(dropout(F.relu(self.a(x)), self.training))

    images = randn(4, 1, 8, 8)
    qmodel = quantize(Net().train(training), sample=images[:1])
    calibrate_(qmodel, [(images, torch.zeros(4))])
    qmodel.eval()
    assert torch.equal(qmodel(images), qmodel(images))
    qmodel.train()
    assert not torch.equal(qmodel(images), qmodel(images))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.tanh(self.shared(x))
        return self.last(F.relu(self.shared(x)).mean((2, 3)))


def test_a_layer_called_twice_is_one_layer_with_two_inputs() -> None:
    qmodel = calibrated(Twice(), randn(4, 1, 8, 8))
    assert [s.name for s in qmodel.layers] == ["first", "shared", "last"]
    assert qmodel.layers[1].macs == 2 * 4 * 4 * 9 * 64
    acts = qmodel.act_quantizers()
    assert list(acts) == ["first_input", "shared_input", "shared_input_again", "last_input"]
    assert [q.signed for q in acts.values()] == [True, False, True, False]
    assert qmodel.calibrated


class Shared(nn.Module):
    """Two branches and an addition read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 4, 3, padding=1)
        self.right = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last((self.left(x) + self.right(x) + x).relu().mean((2, 3)))


def test_a_tensor_that_several_layers_read_is_quantized_once() -> None:
    qmodel = quantize(Shared(), sample=torch.zeros(1, 1, 8, 8))
    assert list(qmodel.act_quantizers()) == ["first_input", "left_input", "last_input"]
    node = next(n for n in qmodel.net.graph.nodes if n.target == "left_input")
    assert len(node.users) == 3


def test_readers_of_different_bits_get_the_most_and_the_policy_says_so() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mid = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.first(x))
            return self.mid(x), self.last(x)

    qmodel = quantize(Fork(), QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
    assert [b.act_bits for b in qmodel.policy] == [8, 8, 8]
    assert [q.bits for q in qmodel.act_quantizers().values()] == [8, 8]


def test_first_and_last_may_stay_in_float(toy: Callable[..., nn.Module]) -> None:
    qmodel = calibrated(toy(), randn(8, 1, 8, 8), first_last_bits=32)
    first, *_, last = qmodel.policy
    assert (first.weight_bits, first.act_bits) == (last.weight_bits, last.act_bits) == (32, 32)
    assert type(qmodel.layer("first")) is nn.Conv2d
    assert type(qmodel.layer("last")) is nn.Linear
    assert list(qmodel.act_quantizers()) == [
        "small_input", "wide_input", "deep_input", "hidden_input",
    ]  # fmt: skip
    assert qmodel(randn(2, 1, 8, 8)).shape == (2, 3)


def test_first_and_last_may_be_searched(toy: Callable[..., nn.Module]) -> None:
    qmodel = quantize(
        toy(), QuantConfig(first_last_bits=None, act_bits=3), sample=torch.zeros(1, 1, 8, 8)
    )
    assert all(b.searched for b in qmodel.policy)
    assert [b.act_bits for b in qmodel.policy] == [8, 3, 3, 3, 3, 3]


def test_activations_may_stay_in_float(toy: Callable[..., nn.Module]) -> None:
    net, images = toy().eval(), randn(8, 1, 8, 8)
    qmodel = quantize(
        net, QuantConfig(act_bits=32, input_bits=32, first_last_bits=32),
        sample=torch.zeros(1, 1, 8, 8),
    ).eval()  # fmt: skip
    assert qmodel.act_quantizers() == {}
    assert qmodel.calibrated
    at_bits(qmodel, 8)
    reference = copy.deepcopy(net)
    for name in ("small", "wide", "deep", "hidden"):
        layer = reference.get_submodule(name)
        layer.weight.data = qmodel.weight_quantizer(name)(qmodel.weight(name))[0].detach()
    assert torch.equal(qmodel(images), reference(images))


def test_one_dimensional_convolutions_and_padding_modes() -> None:
    net = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular", dilation=1), nn.ReLU(),
        nn.Conv1d(4, 4, 3, stride=2, groups=2, bias=False), nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    images = randn(4, 2, 8)
    qmodel = quantize(net, QuantConfig(act_bits=8), sample=images[:1])
    calibrate_(qmodel, [(images, torch.zeros(4))])
    assert [s.kind for s in qmodel.layers] == ["conv1d", "conv1d", "linear"]
    assert [s.macs for s in qmodel.layers] == [4 * 2 * 3 * 8, 4 * 2 * 3 * 3, 36]
    logits = net(images)
    # 256 levels in three layers
    assert (qmodel.eval()(images) - logits).abs().max() < 0.05 * logits.abs().max()


# ------------------------------------------------------------------------------ copies and states


def test_the_float_network_is_left_as_it_is(toy: Callable[..., nn.Module]) -> None:
    net = toy().train()
    before = copy.deepcopy(net.state_dict())
    qmodel = calibrated(net, randn(8, 1, 8, 8))
    with torch.no_grad():
        for p in qmodel.parameters():
            p.zero_()
    assert net.training
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_deep_copy_is_independent(toy: Callable[..., nn.Module]) -> None:
    images = randn(8, 1, 8, 8)
    qmodel = mixed(calibrated(toy(), images), (1, 2, 3, 8))
    other = copy.deepcopy(qmodel)
    before = qmodel(images)
    assert torch.equal(other(images), before)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.7)
    assert torch.equal(qmodel(images), before)
    assert not torch.equal(other(images), before)
    at_bits(other, 4)
    assert torch.equal(qmodel(images), before)
    assert [b.weight_bits for b in qmodel.policy] == [8, 1, 2, 3, 8, 8]
    ours = {id(m) for m in qmodel.modules()} | {id(p) for p in qmodel.parameters()}
    assert ours.isdisjoint({id(m) for m in other.modules()} | {id(p) for p in other.parameters()})
    for name in ("small", "wide"):
        assert other.weight_quantizer(name) is not qmodel.weight_quantizer(name)


@pytest.mark.parametrize("weight_scale", ["per_tensor", "per_channel"])
def test_state_dict_round_trip_is_strict_and_exact(
    toy: Callable[..., nn.Module], weight_scale: str
) -> None:
    images = randn(8, 1, 8, 8)
    qmodel = mixed(calibrated(toy(), images, weight_scale=weight_scale), (1, 2, 3, 8))
    with torch.no_grad():
        for p in qmodel.parameters():
            p.add_(0.05 * randn(p.numel(), seed=p.numel()).view_as(p))
    config = QuantConfig(weight_scale=weight_scale)
    other = mixed(quantize(toy(seed=9), config, sample=images[:1]), (1, 2, 3, 8)).eval()
    assert not other.calibrated
    missing, unexpected = other.load_state_dict(qmodel.state_dict(), strict=True)
    assert (missing, unexpected) == ([], [])
    assert other.calibrated
    assert torch.equal(other(images), qmodel(images))
    state = qmodel.state_dict()
    assert state.keys() == other.state_dict().keys()
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())


def test_double_keeps_the_float32_scales_and_codes(toy: Callable[..., nn.Module]) -> None:
    qmodel = mixed(calibrated(toy(), randn(8, 1, 8, 8)), (1, 2, 3, 8))
    with torch.no_grad():
        for name, p in qmodel.named_parameters():
            if name.endswith("gain"):
                p.mul_(1.23456789)
    wide = copy.deepcopy(qmodel).double()
    for b in qmodel.policy:
        ours, theirs = qmodel.weight_quantizer(b.name), wide.weight_quantizer(b.name)
        assert theirs.scale.dtype == torch.float64
        assert torch.equal(theirs.scale, ours.scale.double())
    for ours, theirs in zip(
        qmodel.act_quantizers().values(), wide.act_quantizers().values(), strict=True
    ):
        assert torch.equal(theirs.scale, ours.scale.double())


def test_training_reaches_weights_and_scales(toy: Callable[..., nn.Module]) -> None:
    images = randn(8, 1, 8, 8)
    qmodel = mixed(calibrated(toy(), images), (1, 2, 3, 8)).train()
    qmodel(images).square().mean().backward()
    for name, p in qmodel.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name


# -------------------------------------------------------------------------------------- refusals


class Depends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else self.fc(-x)


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.ConvTranspose3d(1, 1, 2), "ConvTranspose3d"),
        (nn.Conv3d(1, 1, 2), "Conv3d"),
        (nn.LSTM(4, 4), "LSTM"),
        (nn.GRUCell(4, 4), "GRUCell"),
        (nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (nn.Embedding(4, 4), "Embedding"),
    ],
)
def test_layers_that_cannot_be_quantized_are_named(
    layer: nn.Module, kind: str, refuses: Callable[..., Any]
) -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Sequential(nn.ReLU(), layer))
    with refuses(
        f"model: layer '1.1' ({kind}) cannot be quantized", "Conv1d, Conv2d", "--skip '1.1'"
    ):
        quantize(net, sample=torch.zeros(1, 1, 8, 8))


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * 2, self.bias)


class Called(nn.Module):
    def __init__(self, call: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.zeros(shape))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv(x), self.weight)


def test_a_layer_that_would_stay_in_float_unnoticed_is_refused(refuses: Callable[..., Any]) -> None:
    sample = torch.zeros(1, 4, 8, 8)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), Scaled(4, 4, 3), nn.Conv2d(4, 2, 3))
    with refuses("layer '2' (Scaled) computes something else than torch's Conv2d", "--skip '2'"):
        quantize(net, sample=sample)
    normed = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    nn.utils.parametrizations.weight_norm(normed[1])
    with refuses(
        "layer '1' (ParametrizedConv2d) has a parametrized weight", "remove_parametrizations"
    ):
        quantize(normed, sample=sample)
    with refuses("functional.conv2d is called in forward (conv2d)", "would stay in float"):
        quantize(Called(F.conv2d, 4, 4, 1, 1), sample=sample)
    with refuses("functional.linear is called in forward (linear)", "would stay in float"):
        quantize(Called(F.linear, 4, 8), sample=sample)


def test_control_flow_on_data_is_refused(refuses: Callable[..., Any]) -> None:
    with refuses("model: Depends at ", "test_quant_model.py:", "`return self.fc(x) if x.sum() > 0",
                 "a decision must not depend on the values of a tensor"):  # fmt: skip
        quantize(Depends(), sample=torch.zeros(1, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["hidden.weight", "last.bias", "bn1.running_var"])
def test_weights_that_are_not_finite_are_named(
    toy: Callable[..., nn.Module],
    sample: Tensor,
    tensor: str,
    value: float,
    refuses: Callable[..., Any],
) -> None:
    net = toy()
    net.state_dict()[tensor].view(-1)[1] = value
    with refuses(f"model: tensor '{tensor}' must be finite"):
        quantize(net, sample=sample)


def test_a_network_without_layers_is_refused(refuses: Callable[..., Any]) -> None:
    net = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
    with refuses("must have a convolution or linear layer to quantize, got MaxPool2d, ReLU"):
        quantize(net, sample=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("shape", [(1, 2, 8, 8), (1, 8), (1, 1, 1, 1, 1, 1)])
def test_a_sample_that_does_not_fit_is_refused(
    toy: Callable[..., nn.Module], shape: tuple[int, ...], refuses: Callable[..., Any]
) -> None:
    with refuses(f"model: must accept a sample of shape {shape} (N, C, H, W), but: "):
        quantize(toy(), sample=torch.zeros(shape))


# ------------------------------------------------------------------------------ published weights


def test_the_published_checkpoint_loads_exactly(real_root: Path) -> None:
    file = real_root / "resnet20_cifar10.safetensors"
    if not file.is_file():
        pytest.skip("no resnet20_cifar10.safetensors in the data root")
    tensors, _ = load_tensors(file)
    net = resnet20.build(10)
    missing, unexpected = net.load_state_dict(tensors, strict=True)
    assert (missing, unexpected) == ([], [])
    state = net.state_dict()
    assert all(torch.equal(state[name], value) for name, value in tensors.items())
    qmodel = quantize(net, sample=torch.zeros(1, 3, 32, 32))
    for b in qmodel.policy:
        assert torch.equal(qmodel.weight(b.name), tensors[f"{b.name}.weight"])


def test_a_layer_of_another_name_is_refused(toy: Callable[..., nn.Module]) -> None:
    qmodel = quantize(toy(), QuantConfig(), sample=torch.zeros(1, 1, 8, 8))
    for ask in (qmodel.layer, qmodel.weight, qmodel.weight_config):
        with pytest.raises(RequestError, match=r"layer 'hiden': must be one of.*'hidden'"):
            ask("hiden")
