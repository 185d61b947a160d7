"""MACs and bit operations against figures that the literature prints."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import hw
from sdq.config import QuantConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.models import resnet20
from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits
from sdq.quant_model import QuantModel, quantize
from sdq.search_space import SearchSpace


def resnet20_at(act_bits: int) -> QuantModel:
    sample = torch.zeros(1, 3, 32, 32)
    return quantize(resnet20.build(10), QuantConfig(act_bits=act_bits), sample=sample)


def test_resnet20_has_its_published_size() -> None:
    network = resnet20.build(10)
    assert sum(p.numel() for p in network.parameters()) == 269_722
    layers = resnet20_at(4).layers
    assert len(layers) == 20
    assert sum(spec.num_weights for spec in layers) == 268_336
    # by hand: 1 + 6 convolutions of stage 1, two entries at half, ten others, and the classifier
    assert sum(spec.macs for spec in layers) == (
        27 * 16 * 1024 + 16 * 2_359_296 + 2 * 1_179_648 + 640
    )
    assert sum(spec.macs for spec in layers) / 1e6 == pytest.approx(40.55, abs=0.005)  # printed


@pytest.mark.parametrize(("bits", "bops"), [(4, 0.670), (3, 0.389), (2, 0.189)])
def test_resnet20_bops_with_first_and_last_at_eight(bits: int, bops: float) -> None:
    qmodel = resnet20_at(bits)
    searched = [b.name for b in qmodel.policy if b.searched]
    policy = qmodel.policy.with_weight_bits(dict.fromkeys(searched, bits))
    first, last = qmodel.policy.layers[0], qmodel.policy.layers[-1]
    assert (first.weight_bits, first.act_bits) == (last.weight_bits, last.act_bits) == (8, 8)
    # to the printed digits
    assert hw.total_bops(qmodel.layers, policy) / 1e9 == pytest.approx(bops, abs=0.0005)


def test_resnet20_bops_in_float() -> None:
    qmodel = resnet20_at(4)
    policy = BitwidthPolicy(
        tuple(
            LayerBits(b.name, FLOAT_BITS, FLOAT_BITS, False, b.num_weights) for b in qmodel.policy
        )
    )
    assert hw.total_bops(qmodel.layers, policy) / 1e9 == pytest.approx(41.52, abs=0.005)
    assert hw.total_bops(qmodel.layers, policy) == 1024 * sum(s.macs for s in qmodel.layers)


def basic_stage(in_channels: int, channels: int, stride: int) -> list[nn.Module]:
    """The convolutions of a ResNet-18 stage as layers with the right sizes in a row."""
    found: list[nn.Module] = []
    for c, s in ((in_channels, stride), (channels, 1), (channels, 1), (channels, 1)):
        found.append(nn.Conv2d(c, channels, 3, s, 1, bias=False))
    return found


class ResNet18Sizes(nn.Module):
    """The layers of ResNet-18 in a chain: the same MACs as the network, without its additions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
        self.stages = nn.ModuleList(nn.Sequential(*basic_stage(*w)) for w in widths)
        self.shortcuts = nn.ModuleList(nn.Conv2d(c, k, 1, s, bias=False) for c, k, s in widths[1:])
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stages[0](self.pool(self.conv1(x)))
        for stage, shortcut in zip(list(self.stages)[1:], self.shortcuts, strict=True):
            x = stage(x) + shortcut(x)
        return self.fc(x.mean((2, 3)))


def test_resnet18_bops_are_those_of_fracbits_and_hawq() -> None:
    config = QuantConfig(act_bits=8, bit_choices=(1,))
    qmodel = quantize(ResNet18Sizes(), config, sample=torch.zeros(1, 3, 224, 224))
    for bits, bops in ((3, 22.85), (4, 34.71), (8, 116.1)):
        policy = BitwidthPolicy(
            tuple(
                replace(b, weight_bits=bits, act_bits=bits) if b.searched else b
                for b in qmodel.policy
            )
        )
        # to the printed digits
        assert hw.total_bops(qmodel.layers, policy) / 1e9 == pytest.approx(bops, abs=0.05)


def test_layer_costs_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5, bias=False)
    )
    qmodel = quantize(net, QuantConfig(act_bits=4), sample=torch.zeros(1, 4, 8, 8))
    first, last = hw.layer_costs(qmodel.layers, qmodel.policy)
    # K * C / groups * 3 * 3 weights at 4 x 4 places
    assert (first.name, first.macs, first.params) == ("0", 6 * 2 * 9 * 16, 6 * 2 * 9 + 6)
    assert (first.weight_bytes, first.bops) == (108.0, 1728 * 64)
    assert (last.macs, last.params, last.weight_bytes, last.bops) == (480, 480, 480.0, 480 * 64)


def test_cost_of_bops_budget_and_of_hw_agree() -> None:
    qmodel = resnet20_at(4)
    (constraint,) = Budget(bops=1e9).constraints(SearchSpace.of(qmodel))
    names = [b.name for b in qmodel.policy if b.searched]
    choices = [1, 2, 3, 4, 6, 8] * 3
    policy = qmodel.policy.with_weight_bits(dict(zip(names, choices, strict=True)))
    picks = [0, 1, 2, 3, 4, 5] * 3
    assert constraint.cost(picks) == hw.total_bops(qmodel.layers, policy)


def test_a_policy_of_other_layers_is_refused() -> None:
    qmodel = resnet20_at(4)
    policy = qmodel.policy.layers
    with pytest.raises(RequestError, match=r"in their order, got \S+ for \S+; take"):
        hw.total_bops(qmodel.layers, BitwidthPolicy(policy[::-1]))
    with pytest.raises(RequestError, match="in their order, got 19 of 20"):
        hw.report(qmodel.layers, BitwidthPolicy(policy[:-1]), "bit_fusion")


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_a_demand_is_a_positive_number(value: float) -> None:
    with pytest.raises(RequestError, match="fps must be a positive number"):
        hw.Demand(fps=value)
    with pytest.raises(RequestError, match="latency_s must be a positive number"):
        hw.Demand(latency_s=value)
