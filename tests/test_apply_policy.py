"""A policy applied to a network: what changes with it, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdq import quantizers
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.learned_scale import WeightQuantizer
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.quant_model import QuantModel, quantize


@pytest.fixture
def qmodel(qtoy: Callable[..., QuantModel]) -> QuantModel:
    return qtoy(bit_choices=(2, 4, 8))


def with_layer(qmodel: QuantModel, index: int, **fields: Any) -> BitwidthPolicy:
    layers = [LayerBits(**vars(b)) for b in qmodel.policy]
    layers[index] = LayerBits(**{**vars(layers[index]), **fields})
    return BitwidthPolicy(tuple(layers))


def test_channels_of_a_layer_can_have_bits_of_their_own(qmodel: QuantModel) -> None:
    channels = qmodel.layers[1].weight_shape[0]
    bits = tuple((2, 4, 8)[k % 3] for k in range(channels))
    apply_policy_(qmodel, with_layer(qmodel, 1, weight_bits=8, channel_bits=bits))
    weight = qmodel.weight("small")
    quantizer = qmodel.weight_quantizer("small")
    values, scale = quantizer(weight)[:2]
    codes = quantizer.codes(weight)
    assert torch.equal(values, codes * scale)
    for k, b in enumerate(bits):
        alone = WeightQuantizer(weight[k : k + 1].detach(), b, per_channel=True)
        assert torch.equal(values[k], alone(weight[k : k + 1])[0][0])
        assert float(codes[k].abs().max()) <= 2 ** (b - 1)
    values.sum().backward()  # every kind of channel learns its scale
    assert all(p.grad is not None for p in quantizer.parameters())


@pytest.mark.parametrize("bits", [(2, 4), ()])
def test_channel_bits_are_one_for_each_channel(qmodel: QuantModel, bits: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match="channel_bits"):
        apply_policy_(qmodel, with_layer(qmodel, 1, weight_bits=4, channel_bits=bits))


def test_a_pinned_layer_has_no_channel_bits(
    qmodel: QuantModel, refuses: Callable[..., Any]
) -> None:
    channels = qmodel.layers[0].weight_shape[0]
    wrong = with_layer(qmodel, 0, channel_bits=(8, *(1,) * (channels - 1)))
    with refuses("layer first: is pinned at 8 bits and must have no channel_bits"):
        apply_policy_(qmodel, wrong)


def test_channel_bits_need_scales_of_each_channel(
    toy: Callable[..., nn.Module], sample: Tensor, refuses: Callable[..., Any]
) -> None:
    config = QuantConfig(bit_choices=(2, 4, 8), weight_scale="per_tensor")
    qmodel = quantize(toy(), config, sample=sample)
    bits = (2, 4) * (qmodel.layers[1].weight_shape[0] // 2)
    with refuses("with per_channel scales, got", "per_tensor scales"):
        apply_policy_(qmodel, with_layer(qmodel, 1, weight_bits=4, channel_bits=bits))


def test_pins_and_choices_by_pattern(
    toy: Callable[..., nn.Module], sample: Tensor, refuses: Callable[..., Any]
) -> None:
    config = QuantConfig(
        pins=(("*", 3), ("sm?ll", 2), ("hidden", 32)), layer_choices=(("wide", (1, 2)),)
    )
    qmodel = quantize(toy(), config.replaced(pins=config.pins[1:]), sample=sample)
    found = {b.name: (b.weight_bits, b.act_bits, b.searched) for b in qmodel.policy}
    assert found["small"] == (2, 4, False)
    assert found["hidden"] == (32, 32, False)
    assert found["wide"] == (2, 4, True)
    assert found["deep"] == (8, 4, True)
    assert [qmodel.choices(i) for i, b in enumerate(qmodel.policy) if b.searched] == [
        (1, 2), (1, 2, 3, 4, 6, 8),
    ]  # fmt: skip
    with refuses("layer wide: weight_bits must be one of (1, 2), got 4"):
        apply_policy_(qmodel, qmodel.policy.with_weight_bits({"wide": 4}))
    everything = quantize(toy(), config, sample=sample).policy
    assert [b.weight_bits for b in everything if b.name not in ("small", "hidden")] == [3] * 4
    with refuses("pattern 'layer9.*' must match a layer, but matches none of first, small"):
        quantize(toy(), QuantConfig(pins=(("layer9.*", 4),)), sample=sample)


def test_learned_activations_change_with_the_policy(
    toy: Callable[..., nn.Module], sample: Tensor, refuses: Callable[..., Any]
) -> None:
    qmodel = quantize(toy(), QuantConfig(act_choices=(2, 4, 8)), sample=sample)
    readers = qmodel.searched_acts()
    named = {name for layers in readers.values() for name in layers}
    assert "first" not in named  # the network's input keeps its bits
    assert "last" not in named
    calibrate_(qmodel, [(torch.randn(4, *sample.shape[1:]), torch.zeros(4))])
    path = next(iter(readers))
    first = qmodel.policy.layers.index(qmodel.policy[readers[path][0]])
    policy = qmodel.policy
    for name in readers[path]:
        index = [b.name for b in policy].index(name)
        policy = BitwidthPolicy(
            tuple(
                LayerBits(**{**vars(b), "act_bits": 8 if i == index else b.act_bits})
                for i, b in enumerate(policy)
            )
        )
    apply_policy_(qmodel, policy)
    assert qmodel.act_quantizers()[path].bits == 8
    assert not qmodel.calibrated  # the new quantizer has no scale yet
    with refuses("act_bits must be 8, got 3"):
        apply_policy_(qmodel, with_layer(qmodel, first, act_bits=3))


def test_apply_policy_changes_only_what_changes(qmodel: QuantModel) -> None:
    before = {b.name: qmodel.weight_quantizer(b.name) for b in qmodel.policy}
    before["wide"].gain.data.mul_(1.1)
    policy = qmodel.policy.with_weight_bits({"small": 2})
    apply_policy_(qmodel, policy)
    assert qmodel.policy is policy
    after = {b.name: qmodel.weight_quantizer(b.name) for b in qmodel.policy}
    assert [n for n in after if after[n] is not before[n]] == ["small"]
    assert after["small"].bits == 2
    assert torch.equal(
        after["small"].scale, quantizers.mse_scale(qmodel.weight("small"), 2, True, True)
    )


@pytest.mark.parametrize(
    ("index", "fields", "message"),
    [
        (1, {"weight_bits": 3}, "layer small: weight_bits must be one of (2, 4, 8), got 3"),
        (1, {"weight_bits": 32}, "layer small: weight_bits must be one of (2, 4, 8), got 32"),
        (0, {"weight_bits": 4}, "layer first: is pinned at 8 bits, got 4"),
        (1, {"act_bits": 8}, "layer small: act_bits must be 4, got 8; quantize with"),
        (1, {"searched": False}, "layer small: searched and num_weights must be (True, 144), got"),
        (1, {"num_weights": 145}, "layer small: searched and num_weights must be (True, 144), got"),
        (1, {"name": "other"}, "must name the network's 6 layers in order, got 6 with 'other'"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(
    qmodel: QuantModel,
    index: int,
    fields: dict[str, Any],
    message: str,
    refuses: Callable[..., Any],
) -> None:
    before = qmodel.policy
    state = copy.deepcopy(qmodel.state_dict())
    with refuses(message):
        apply_policy_(qmodel, with_layer(qmodel, index, **fields))
    assert qmodel.policy is before
    assert all(torch.equal(v, state[k]) for k, v in qmodel.state_dict().items())


def test_a_policy_of_another_number_or_order_of_layers_is_refused(
    qmodel: QuantModel, refuses: Callable[..., Any]
) -> None:
    layers = qmodel.policy.layers
    with refuses("must name the network's 6 layers in order, got 5"):
        apply_policy_(qmodel, BitwidthPolicy(layers[1:]))
    with refuses("must name the network's 6 layers in order, got 6 with 'another order"):
        apply_policy_(qmodel, BitwidthPolicy(layers[::-1]))
