"""A preparation sets what matters to a target, keeps what was chosen, and says what contradicts."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import export
from export.preparation import PREPARATIONS
from sdq import plugins
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.quant_model import quantize

CHOSEN = {
    "finn": {"integer_datapath": True, "batch_norm": "train", "weight_quantizer": "lsq"},
    "hls4ml": {
        "integer_datapath": True, "integer_bias": True, "batch_norm": "fold",
        "weight_scale": "per_tensor", "restrict_scale": "power_of_two",
    },
    "onnxruntime": {
        "integer_datapath": True, "integer_bias": True, "batch_norm": "fold", "act_bits": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PREPARATIONS)
def test_what_nobody_chose_is_set(name: str) -> None:
    config = export.prepare(name)
    assert {field: getattr(config, field) for field in CHOSEN[name]} == CHOSEN[name]
    others = QuantConfig().model_dump()
    assert {k: v for k, v in config.model_dump().items() if k not in CHOSEN[name]} == {
        k: v for k, v in others.items() if k not in CHOSEN[name]
    }


def test_what_was_chosen_stays() -> None:
    mine = QuantConfig(act_bits=5, batch_norm="freeze", restrict_scale="power_of_two", skip=("a",))
    config = export.prepare("finn", mine)
    assert config == mine.replaced(integer_datapath=True)
    assert export.prepare("finn", config) == config  # twice is once


def test_candidates_are_restricted_to_legal_ones() -> None:
    config = QuantConfig(act_choices=(2, 8, 16), layer_choices=(("a", (1, 2)),))
    assert export.prepare("finn", config).act_choices == (2, 8)
    assert export.prepare("finn", config).layer_choices == (("a", (1, 2)),)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("finn", {"integer_datapath": False}, "QuantConfig.integer_datapath: must be True"),
        ("finn", {"batch_norm": "fold"}, "must be one of 'train', 'freeze' to prepare for finn "),
        ("finn", {"weight_quantizer": "entropy"}, "QuantConfig.weight_quantizer: must be 'lsq'"),
        ("finn", {"act_bits": 32}, "QuantConfig.act_bits: must be one of 2, 3, 4, 5, 6, 7, 8 to"),
        ("finn", {"input_bits": 16}, "QuantConfig.input_bits: must be one of 2,"),
        ("finn", {"pins": (("a", 4), ("b", 32))}, "QuantConfig.pins: must be one of 1, 2,"),
        ("finn", {"act_choices": (16,)}, "QuantConfig.act_choices: must be among 2, 3, 4,"),
        ("hls4ml", {"act_bits": 16}, "(--for hls4ml), got 16; drop one of the two"),
        ("onnxruntime", {"batch_norm": "train"}, "QuantConfig.batch_norm: must be 'fold'"),
        ("fin", {}, "--for: unknown name 'fin'; did you mean 'finn'?"),
    ],
)
def test_what_contradicts_is_refused(name: str, config: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as raised:
        export.prepare(name, QuantConfig(**config))
    assert said in str(raised.value)


def test_the_values_that_are_set_are_legal() -> None:
    for preparation in PREPARATIONS.values():
        for field, value in preparation.fields.items():
            assert value in preparation.legal.get(field, (value,))


TAKEN = ("mlp", "vgg_like", "resnet20", "resnet18", "mobilenet_v1", "mobilenet_v2", "vgg16_slim")


@pytest.mark.parametrize("name", [*TAKEN, "unet"])
def test_which_networks_of_ours_finn_takes(name: str) -> None:
    offered = {"num_classes": 7, "in_channels": 3, "image_size": 32, "width": 4}
    built = plugins.call_with_known(plugins.load("sdq.models", name).build, **offered)
    sample = torch.zeros(1, 3, 32, 32)
    qmodel = quantize(built, export.prepare("finn"), sample=sample)
    found = export.check(qmodel, format="finn", sample=sample)
    # of a U-Net every stage has two group norms, and every step up an interpolation and a padding
    kinds = {finding.got for finding in found}
    assert kinds == (set() if name in TAKEN else {"GroupNorm", "Upsample", "pad"})


def test_a_network_in_training_is_left_as_it_is(network: Callable[..., Any]) -> None:
    qmodel = network("residual").train()
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    export.check(qmodel, format="finn", sample=torch.zeros(1, 3, 8, 8))
    assert qmodel.training
    assert all(module.training for module in qmodel.modules() if isinstance(module, nn.Conv2d))
    for name, tensor in qmodel.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_sample_of_another_shape_is_refused(network: Callable[..., Any]) -> None:
    with pytest.raises(RequestError, match="export: sample must fit the network, got shape"):
        export.check(network("plain"), format="finn", sample=torch.zeros(1, 1, 8, 8))
