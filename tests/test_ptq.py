"""After-training quantization: equations by hand, blocks, what learned rounding is worth."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq.apply_policy import apply_policy_
from sdq.blocks import split
from sdq.calibration import calibrate_, in_float
from sdq.config import PtqConfig, QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.ptq import ptq_, soft_labelled
from sdq.quant_model import QuantModel, quantize
from sdq.rounding import (
    SoftRounding,
    annealed_beta,
    inverse_rectified_sigmoid,
    rectified_sigmoid,
    rounding_regularizer,
)
from sdq.search import search

QUICK = PtqConfig(steps=60, batch_size=16, lr=5e-2)


@pytest.fixture
def images(batches) -> Tensor:
    return torch.cat([x for x, _ in batches()])


@pytest.fixture
def quantized(toy, images, sample):
    """Return a function that makes the calibrated network at one bitwidth."""

    def make(bits: int = 3, act_bits: int = 8, **config: object) -> QuantModel:
        qmodel = quantize(toy(), QuantConfig(act_bits=act_bits, **config), sample=sample)
        calibrate_(qmodel, [(images, images)])
        wanted = {b.name: bits for b in qmodel.policy if b.searched}
        apply_policy_(qmodel, qmodel.policy.with_weight_bits(wanted))
        return qmodel

    return make


# ------------------------------------------------------------------------------------ equations


def test_rectified_sigmoid_by_hand():
    # sigmoid(log 3) = 3/4; 3/4 * 1.2 - 0.1 = 0.8
    v = torch.tensor([-100.0, -math.log(11), 0.0, math.log(3), math.log(11), 100.0])
    expected = torch.tensor([0.0, 0.0, 0.5, 0.8, 1.0, 1.0])
    torch.testing.assert_close(rectified_sigmoid(v), expected)


def test_inverse_gives_the_share_back_and_is_finite_at_the_ends():
    h = torch.linspace(0, 1, 11)
    v = inverse_rectified_sigmoid(h)
    assert torch.isfinite(v).all()
    torch.testing.assert_close(rectified_sigmoid(v), h)


def test_regularizer_by_hand():
    h = torch.tensor([0.0, 0.25, 0.5, 1.0])
    # 0, 1 - (1/2)^2, 1, 0
    assert float(rounding_regularizer(h, 2.0)) == pytest.approx(1.75)
    assert float(rounding_regularizer(h, 20.0)) == pytest.approx(2 - 0.5**20)


def test_beta_goes_from_start_to_end():
    assert [annealed_beta(p, 20, 2) for p in (0.0, 0.5, 1.0)] == pytest.approx([20, 11, 2])


def test_soft_rounding_begins_at_the_float_weight(quantized):
    qmodel = quantized(4)
    weight, quantizer = qmodel.weight("hidden"), qmodel.weight_quantizer("hidden")
    scale = quantizer.scale
    inside = (weight / scale > -8) & (weight / scale < 7)
    values = SoftRounding(weight, quantizer)(weight)[0]
    torch.testing.assert_close(values[inside], weight[inside])


# --------------------------------------------------------------------------------------- blocks


def test_blocks_are_cut_where_one_tensor_goes_on(quantized):
    # `small` stands inside a residual addition, and `first` gives it its input
    layers = [block.layers for block in split(quantized())]
    assert layers == [("first",), ("small",), ("wide",), ("deep",), ("hidden",), ("last",)]


def test_blocks_one_after_another_are_the_network(quantized, images):
    qmodel = quantized().eval()
    x = images
    for block in split(qmodel):
        x = block.module(x)
    assert torch.equal(x, qmodel(images))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.again = nn.Linear(6, 6), nn.Linear(6, 6)
        self.between, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.first(x))))
        return self.last(F.relu(self.again(F.relu(self.between(x)))))


def test_a_layer_that_is_called_twice_is_in_one_block():
    qmodel = quantize(Twice(), QuantConfig(), sample=torch.zeros(1, 6))
    assert [b.layers for b in split(qmodel)] == [("first",), ("again", "between"), ("last",)]
    ptq_(qmodel, torch.randn(20, 6), PtqConfig(steps=3))


def test_more_than_one_output_is_refused():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.layer(x)
            return x, self.other(x)

    qmodel = quantize(Two(), QuantConfig(), sample=torch.zeros(1, 4))
    with pytest.raises(RequestError, match="must map one tensor to one tensor"):
        split(qmodel)


# ------------------------------------------------------------------------------------- rounding


def test_learned_rounding_beats_nearest_where_inputs_are_correlated():
    """Inputs that are nearly equal see a neuron's sum alone, which nearest rounding ignores."""
    rng = torch.Generator().manual_seed(1)
    net = nn.Sequential(nn.Linear(16, 8, bias=False), nn.ReLU(), nn.Linear(8, 2))
    net[0].weight.data.normal_(generator=rng)
    common = torch.randn(256, 1, generator=rng)
    images = common + 0.1 * torch.randn(256, 16, generator=rng)
    errors = {}
    for rounding in ("nearest", "learned"):
        config = QuantConfig(first_last_bits=None, bit_choices=(3,), input_bits=32, act_bits=32)
        qmodel = quantize(net, config, sample=images[:1])
        report = ptq_(qmodel, images, QUICK.replaced(rounding=rounding, steps=100))[0]
        errors[rounding] = report.error
    assert errors["learned"] < errors["nearest"] / 4


CONFIGS = [
    {"weight_scale": "per_channel"},
    {"weight_scale": "per_tensor"},
    {"restrict_scale": "power_of_two"},
    {"weight_scale": "per_tensor", "restrict_scale": "power_of_two"},
]


@pytest.mark.parametrize("rounding", ["learned", "nearest"])
@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_weights_are_on_neighbouring_levels_and_reproduce_themselves(
    quantized, images, config, bits, rounding
):
    qmodel = quantized(bits, **config)
    before = {b.name: qmodel.weight(b.name).clone() for b in qmodel.policy}
    scales = {name: qmodel.weight_quantizer(name).scale.clone() for name in before}
    ptq_(qmodel, images, QUICK.replaced(rounding=rounding, steps=10))
    for bit in qmodel.policy:
        weight, quantizer = qmodel.weight(bit.name), qmodel.weight_quantizer(bit.name)
        codes = quantizer.codes(weight)
        assert torch.equal(quantizer.scale, scales[bit.name])
        assert torch.equal(quantizer(weight)[0], weight)
        assert torch.equal(codes * quantizer.scale, weight)
        if bit.weight_bits == 1:
            assert set(codes.flatten().tolist()) <= {-1.0, 1.0}
        else:
            low, high = -(2 ** (bit.weight_bits - 1)), 2 ** (bit.weight_bits - 1) - 1
            position = before[bit.name] / quantizer.scale
            floor, ceil = (x.clamp(low, high) for x in (position.floor(), position.ceil()))
            assert ((codes == floor) | (codes == ceil)).all()


def test_some_weights_are_not_rounded_to_nearest(quantized, images):
    learned, nearest = quantized(2), quantized(2)
    ptq_(learned, images, QUICK)
    ptq_(nearest, images, QUICK.replaced(rounding="nearest"))
    assert not torch.equal(learned.weight("hidden"), nearest.weight("hidden"))


def test_the_network_is_nearer_to_the_float_one(quantized, images):
    qmodel = quantized(2)
    with in_float(qmodel), torch.no_grad():
        wanted = qmodel.eval()(images)
    nearest = copy.deepcopy(qmodel)
    ptq_(nearest, images, PtqConfig(rounding="nearest"))
    ptq_(qmodel, images, QUICK)
    with torch.no_grad():
        errors = [float((net.eval()(images) - wanted).square().mean()) for net in (qmodel, nearest)]
    assert errors[0] < errors[1] / 2


def test_channels_of_different_bits(quantized, images):
    qmodel = quantized(4)
    budget = Budget(avg_weight_bits=2.5)
    found = search(qmodel, [(images, images)], budget=budget, method="random",
                   config=SearchConfig(granularity="channel"))  # fmt: skip
    apply_policy_(qmodel, found)
    ptq_(qmodel, images, QUICK)
    for bits in qmodel.policy:
        weight = qmodel.weight(bits.name)
        assert torch.equal(qmodel.weight_quantizer(bits.name)(weight)[0], weight)


def test_layers_in_float_and_float_activations_pass(quantized, images):
    qmodel = quantized(4, act_bits=32, pins=(("wide", 32),))
    before = qmodel.weight("wide").clone()
    reports = ptq_(qmodel, images, QUICK)
    assert torch.equal(qmodel.weight("wide"), before)
    assert [r.layers for r in reports][2] == ("wide",)


def state(qmodel: QuantModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}


def test_the_same_seed_gives_the_same_network(quantized, images):
    nets = [quantized(2) for _ in range(3)]
    torch.manual_seed(1)
    ptq_(nets[0], images, QUICK)
    torch.manual_seed(2)
    ptq_(nets[1], images, QUICK)
    ptq_(nets[2], images, QUICK.replaced(seed=1))
    first, second, third = map(state, nets)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_the_model_is_left_as_trainable_as_it_was(quantized, images):
    qmodel = quantized().train()
    qmodel.weight("wide").requires_grad_(False)
    ptq_(qmodel, images, QUICK.replaced(steps=2))
    frozen = [name for name, p in qmodel.named_parameters() if not p.requires_grad]
    assert frozen == ["net.wide.weight"]
    assert qmodel.training


def test_uncalibrated_activations_are_calibrated(toy, images, sample):
    qmodel = quantize(toy(), QuantConfig(), sample=sample)
    ptq_(qmodel, images, PtqConfig(rounding="nearest"))
    assert qmodel.calibrated


def test_batch_norm_is_estimated_from_the_quantized_network(quantized, images):
    qmodel = quantized(8, act_bits=8)
    ptq_(qmodel, images[:64], PtqConfig(rounding="nearest", batch_norm=True))
    with torch.no_grad():
        (block, *_) = split(qmodel)
        x = F.conv2d(images[:64], qmodel.weight("first"), padding=1)
    torch.testing.assert_close(
        qmodel.net.get_submodule("bn1").running_mean, x.mean((0, 2, 3)), atol=1e-2, rtol=0
    )
    assert not block.module.training


def test_reports_reach_who_watches(quantized, images):
    seen = []
    reports = ptq_(quantized(), images, QUICK.replaced(steps=3), watch=seen.append)
    ends = [r.end_of_epoch for r in seen if r.end_of_epoch is not None]
    assert [r.epoch for r in seen] == sorted(3 * list(range(6)))
    assert [end["error"] for end in ends] == [r.error for r in reports]


@pytest.mark.parametrize("kind", ["dorefa", "entropy"])
def test_weights_behind_a_transform_are_refused(quantized, images, kind):
    with pytest.raises(RequestError, match="weight_quantizer must be 'lsq'"):
        ptq_(quantized(2, weight_quantizer=kind), images)


@pytest.mark.parametrize("config", [{}, {"weight_scale": "per_tensor"}])
def test_activation_scales_can_be_learned(quantized, images, config):
    qmodel = quantized(4, act_bits=2, **config)
    before = {path: float(q.scale.detach()) for path, q in qmodel.act_quantizers().items()}
    fixed = copy.deepcopy(qmodel)
    reports = ptq_(qmodel, images, QUICK.replaced(act_lr=1e-2))
    assert any(
        float(q.scale.detach()) != before[path] for path, q in qmodel.act_quantizers().items()
    )
    assert sum(r.error for r in reports) < sum(r.error for r in ptq_(fixed, images, QUICK))


def test_a_shared_activation_scale_is_learned_once(quantized, images, recwarn):
    """Operands of an addition have one quantizer; stepped twice it would go twice as far."""
    qmodel = quantized(4, act_bits=2, integer_datapath=True)
    gains = [q.gain for q in qmodel.act_quantizers().values()]
    assert len(set(gains)) < len(gains)
    one_step = QUICK.replaced(act_lr=1e-2, steps=1)
    ptq_(qmodel, images, one_step)
    moved = torch.stack([(g.detach() - 1).abs().max() for g in set(gains)])
    assert moved.max() > 0
    assert moved.max() < 1.5e-2  # Adam's first step is the learning rate
    assert not [w for w in recwarn if "duplicate" in str(w.message)]


def test_no_images_are_refused(quantized, images):
    with pytest.raises(RequestError, match="images must be at least 1"):
        ptq_(quantized(), images[:0])


# ---------------------------------------------------------------------------------- no labels


@pytest.mark.parametrize("method", ["sdq", "greedy", "hessian", "sensitivity"])
def test_search_has_the_float_networks_outputs_for_labels(toy, quantized, images, method):
    net, qmodel = toy(), quantized(8)
    data = soft_labelled(net, images)
    torch.testing.assert_close(data[0][1], net.eval()(images[:32]).softmax(1))
    config = SearchConfig(train_weights=False, epochs=1)
    before = state(qmodel)
    policy = search(
        qmodel, data, budget=Budget(avg_weight_bits=3.0), teacher=net, config=config, method=method
    )
    assert policy.avg_weight_bits <= 3
    assert all(torch.equal(before[name], tensor) for name, tensor in state(qmodel).items())


class Tied(nn.Module):
    """Two layers, one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
        self.c.weight = self.b.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(F.relu(self.b(F.relu(self.a(x)))))).mean((2, 3)))


def test_layers_of_one_weight_are_refused(images, sample):
    qmodel = quantize(Tied(), QuantConfig(act_bits=8), sample=sample)
    before = qmodel.weight("b").clone()
    with pytest.raises(RequestError, match=r"ptq: every layer must have .* c shares that of b"):
        ptq_(qmodel, images, QUICK)
    assert torch.equal(qmodel.weight("b"), before)


def test_one_image_left_over_joins_the_others(sample):
    """Batch normalisation over features has no variance of a single image."""
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(65, 1, 8, 8, generator=rng)
    data = soft_labelled(net, images)
    assert [len(x) for x, _ in data] == [32, 33]
    torch.testing.assert_close(torch.cat([y for _, y in data]), net(images).softmax(1))
    qmodel = quantize(net, QuantConfig(act_bits=8), sample=sample)
    config = SearchConfig(epochs=1, train_weights=False)
    policy = search(qmodel, data, budget=Budget(avg_weight_bits=4), teacher=net, config=config)
    apply_policy_(qmodel, policy)
    ptq_(qmodel, images, QUICK.replaced(steps=5, batch_norm=True))
    assert torch.isfinite(qmodel(images)).all()


def test_what_stays_in_float_may_share_its_weight(images, sample):
    """Neither layer is put on levels; and a parametrized weight is a new tensor at each look."""
    net = Tied()
    qmodel = quantize(net, QuantConfig(act_bits=8, skip=("b", "c")), sample=sample)
    before = qmodel.weight("b").clone()
    ptq_(qmodel, images, QUICK.replaced(steps=2))
    assert torch.equal(qmodel.weight("b"), before)
    normed = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), *(
            nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)) for _ in range(3)
        ), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    ).eval()  # fmt: skip
    skipped = QuantConfig(act_bits=8, skip=("2", "3", "4"))
    ptq_(quantize(normed, skipped, sample=sample), images, QUICK.replaced(steps=2))
