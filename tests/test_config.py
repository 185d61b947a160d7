"""Configurations are checked when made, frozen, and survive JSON."""

import re
from typing import Any

import pytest

from sdq.config import Config, QuantConfig, SearchConfig, TrainConfig
from sdq.errors import RequestError

ALL = (QuantConfig, TrainConfig, SearchConfig)


@pytest.mark.parametrize("kind", ALL)
def test_json_round_trip(kind: type[Config]) -> None:
    made = kind()
    assert kind(**kind.model_validate_json(made.model_dump_json()).model_dump()) == made


def test_tuples_survive_json() -> None:
    made = QuantConfig(bit_choices=(2, 4, 8), weight_scale="per_tensor", first_last_bits=None)
    assert QuantConfig.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize("kind", ALL)
def test_a_configuration_is_frozen(kind: type[Config]) -> None:
    made = kind()
    field = next(iter(kind.model_fields))
    with pytest.raises(ValueError, match="frozen"):
        setattr(made, field, 3)


def test_replaced_checks_again_and_leaves_the_original() -> None:
    made = TrainConfig(epochs=3)
    assert (made.replaced(epochs=5).epochs, made.epochs) == (5, 3)
    assert made.replaced(epochs=5).lr == made.lr
    with pytest.raises(RequestError, match=r"TrainConfig\.epochs"):
        made.replaced(epochs=-1)


WRONG: list[tuple[type[Config], dict[str, Any], str]] = [
    (QuantConfig, {"bit_choices": ()}, "bit_choices: must be ascending bitwidths"),
    (QuantConfig, {"bit_choices": (4, 2)}, "bit_choices: must be ascending bitwidths"),
    (QuantConfig, {"bit_choices": (2, 2, 4)}, "bit_choices: must be ascending bitwidths"),
    (QuantConfig, {"bit_choices": (0, 2)}, "bit_choices.0: "),
    (QuantConfig, {"bit_choices": (2, 9)}, "bit_choices.1: "),
    (QuantConfig, {"act_bits": 1}, "act_bits: "),
    (QuantConfig, {"act_bits": 9}, "act_bits: must be at most 8, 16, or 32 for float, got 9"),
    (QuantConfig, {"act_bits": 33}, "act_bits: "),
    (QuantConfig, {"input_bits": 12}, "input_bits: must be at most 8, 16, or 32 for float"),
    (QuantConfig, {"first_last_bits": 0}, "first_last_bits: "),
    (QuantConfig, {"first_last_bits": 16}, "first_last_bits: must be at most 8, or 32"),
    (TrainConfig, {"seed": 2**32}, "seed: input should be less than 4294967296"),
    (SearchConfig, {"seed": -1}, "seed: input should be greater than or equal to 0"),
    (QuantConfig, {"first_last_bits": 12}, "first_last_bits: must be at most 8, or 32"),
    (QuantConfig, {"weight_scale": "per_row"}, "weight_scale: "),
    (QuantConfig, {"restrict_scale": "int"}, "restrict_scale: "),
    (QuantConfig, {"bits": 4}, "bits: must be a field, got 4; did you mean 'act_bits'? Known: "),
    (TrainConfig, {"epochs": -1}, "epochs: "),
    (TrainConfig, {"epochs": 1.5}, "epochs: "),
    (TrainConfig, {"lr": 0}, "lr: "),
    (TrainConfig, {"lr": float("nan")}, "lr: "),
    (TrainConfig, {"lr": float("inf")}, "lr: "),
    (TrainConfig, {"bin_weight": float("inf")}, "bin_weight: "),
    (SearchConfig, {"temperature": float("inf")}, "temperature: "),
    (TrainConfig, {"weight_decay": -1e-9}, "weight_decay: "),
    (TrainConfig, {"optimizer": "adam"}, "optimizer: "),
    (TrainConfig, {"warmup": 1.0}, "warmup: "),
    (TrainConfig, {"bin_weight": -0.1}, "bin_weight: "),
    (TrainConfig, {"bin_warmup": 1.1}, "bin_warmup: "),
    (TrainConfig, {"seed": "zero"}, "seed: "),
    (SearchConfig, {"epochs": 0}, "epochs: "),
    (SearchConfig, {"temperature": 0}, "temperature: "),
    (SearchConfig, {"start": "lowest"}, "start: "),
    (SearchConfig, {"entry_beta": 0.5}, "entry_beta: "),
    (SearchConfig, {"entry_beta": 0.98}, "rise_threshold: must be above entry_beta (0.98), at"),
    (
        SearchConfig,
        {"entry_beta": 0.95},
        "rise_threshold: must be none where decay_threshold (0.1)",
    ),
    (SearchConfig, {"decay_threshold": 0.5}, "decay_threshold: "),
    (SearchConfig, {"rise_threshold": 0.5}, "rise_threshold: "),
    (SearchConfig, {"settle": 0.9}, "settle: "),
    (SearchConfig, {"bitwidth_lr": 0.0}, "bitwidth_lr: "),
]


@pytest.mark.parametrize(("kind", "fields", "fragment"), WRONG)
def test_a_wrong_value_names_its_field(
    kind: type[Config], fields: dict[str, Any], fragment: str
) -> None:
    message = re.escape(f"{kind.__name__}.{fragment}") + ".*got "
    if "got" in fragment:
        message = re.escape(f"{kind.__name__}.{fragment}")
    with pytest.raises(RequestError, match=message):
        kind(**fields)


RIGHT: list[tuple[type[Config], dict[str, Any]]] = [
    (QuantConfig, {"bit_choices": (1,)}),
    (QuantConfig, {"bit_choices": [2, 4]}),
    (QuantConfig, {"act_bits": 32, "input_bits": 32, "first_last_bits": 32}),
    (QuantConfig, {"act_bits": 2, "first_last_bits": 1}),
    (QuantConfig, {"first_last_bits": None}),
    (TrainConfig, {"epochs": 0, "warmup": 0, "bin_warmup": 1, "seed": 2**32 - 1}),
    (SearchConfig, {"rise_threshold": None, "bitwidth_lr": None, "settle": 0}),
]


@pytest.mark.parametrize(("kind", "fields"), RIGHT)
def test_values_at_the_ends_are_taken(kind: type[Config], fields: dict[str, Any]) -> None:
    made = kind(**fields)
    for name, value in fields.items():
        assert getattr(made, name) == (tuple(value) if isinstance(value, list) else value)
