"""What every target owes: costs of every layer, their sums, legal bits, no gain from more bits."""

import functools
import json
import math
import random
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch

import hw
from hw.target import Demand, choices_of, cost_fn
from sdq import plugins
from sdq.config import QuantConfig
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy
from sdq.quant_model import quantize

TARGETS = plugins.names("hw.targets")
MODELS = plugins.names("sdq.models")
QUICK = {"mlp", "vgg_like", "resnet20", "mobilenet_v2", "unet"}
NETWORKS = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
SIDE = 16


@functools.cache
def network(name: str) -> tuple[tuple[LayerSpec, ...], BitwidthPolicy]:
    module = plugins.call_with_known(
        plugins.load("sdq.models", name).build,
        num_classes=5, in_channels=3, image_size=SIDE, width=8,
    )  # fmt: skip
    qmodel = quantize(module, QuantConfig(), sample=torch.zeros(1, 3, SIDE, SIDE))
    draw = random.Random(0)
    bits = {b.name: draw.choice((1, 2, 3, 4, 6, 8)) for b in qmodel.policy if b.searched}
    return qmodel.layers, qmodel.policy.with_weight_bits(bits)


def test_there_are_targets() -> None:
    assert {"bit_fusion", "pynq_z2", "cortex_m7", "a100", "loom"} <= set(TARGETS)
    assert set(MODELS) >= QUICK


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_costs_of_a_network(name: str, target: str) -> None:
    layers, policy = network(name)
    found = hw.report(layers, policy, target)
    device = hw.target(target).under(layers, Demand(), choices_of(policy))
    assert device.cost(layers, policy) == found
    assert "latency_s" in device.costs
    assert [layer.name for layer in found.layers] == [spec.name for spec in layers]
    for layer in found.layers:
        assert all(math.isfinite(value) and value >= 0 for value in layer.costs.values())
        assert layer.costs["latency_s"] > 0
        assert layer.pace_s > 0
    paces = [layer.pace_s for layer in found.layers]
    assert paces[found.bottleneck] == max(paces)
    for cost in device.costs:
        function = cost_fn(device, cost)
        assert function.__name__ == cost
        values = [
            function(spec, bits.weight_bits, bits.act_bits)
            for spec, bits in zip(layers, policy, strict=True)
        ]
        assert values == [layer.costs[cost] for layer in found.layers]
        assert found.totals[cost] == pytest.approx(sum(values), rel=1e-12)
    assert set(found.limits) <= set(found.totals)
    assert set(found.capacity) <= set(found.totals)
    assert found.fits == (not found.over)
    assert all(found.totals[over] > found.limits[over] for over in found.over)
    document = {**asdict(found), "shares": found.shares}
    assert json.loads(json.dumps(document, allow_nan=False))["totals"] == dict(found.totals)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NETWORKS)
def test_bits_are_legal_and_more_of_them_cost_no_less(name: str, target: str) -> None:
    """Where a device lays a layer out in the same way."""
    layers, policy = network(name)
    device = hw.target(target)
    fastest = device.under(layers, Demand(latency_s=1e9, fps=1e-9), choices_of(policy))
    seen, bits_matter = set(), False
    for spec in layers[:8] + layers[-2:]:
        legal = device.legal_weight_bits(spec)
        assert list(legal) == sorted(legal)
        assert set(legal) <= set(device.weight_bits)
        bits_matter |= len(legal) > 1
        for a in (a for a in device.act_bits if a in (2, 4, 8)):
            uses = [fastest.use(spec, w, a) for w in range(1, 9)]
            seen |= {(spec.name, *use.costs.values()) for use in uses}
            for few, more in pairwise(uses):
                if way(few) == way(more):
                    for cost in device.costs:
                        assert few.costs[cost] <= more.costs[cost], (spec.name, cost)
    assert (len(seen) > len({name for name, *_ in seen})) == bits_matter


def way(use: hw.LayerUse) -> dict[str, int | str]:
    """Return how a layer is computed, apart from what follows from its bits and its time."""
    return {key: x for key, x in use.layout.items() if key not in ("stored bits", "bound")}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_asked_becomes_a_limit(target: str) -> None:
    layers, policy = network("vgg_like")
    device = hw.target(target).under(layers, Demand(latency_s=10.0), choices_of(policy))
    assert device.limits["latency_s"] == 10.0
    assert device.cost(layers, policy).latency_s <= 10.0
