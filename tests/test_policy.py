"""Policies: averages by hand, JSON both ways, and every way a file can be wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdq.errors import RequestError
from sdq.policy import SCHEMA, BitwidthPolicy, LayerBits

POLICY = BitwidthPolicy(
    (
        LayerBits("conv1", 8, 8, False, 100),
        LayerBits("block.0.conv", 2, 4, True, 300),
        LayerBits("block.1.conv", 3, 4, True, 100),
        LayerBits("fc", 32, 32, False, 50),
    )
)


def refuses(*fragments: str) -> "pytest.RaisesExc[RequestError]":
    return pytest.raises(RequestError, match=".*".join(re.escape(f) for f in fragments))


def document() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(POLICY.to_json())
    return found


def changed(field: str, value: Any) -> str:
    found = document()
    found["layers"][1][field] = value
    return json.dumps(found)


def test_averages_by_hand() -> None:
    assert POLICY.avg_weight_bits == (300 * 2 + 100 * 3) / 400
    assert POLICY.avg_weight_bits_all == (100 * 8 + 300 * 2 + 100 * 3 + 50 * 32) / 550
    assert POLICY.weight_bytes == (100 * 8 + 300 * 2 + 100 * 3 + 50 * 32) / 8
    pinned = BitwidthPolicy((LayerBits("a", 8, 8, False, 10),))
    assert pinned.avg_weight_bits == 8.0
    assert BitwidthPolicy(()).avg_weight_bits == 0.0


def test_a_policy_is_a_sequence_of_layers() -> None:
    assert len(POLICY) == 4
    assert [layer.name for layer in POLICY] == ["conv1", "block.0.conv", "block.1.conv", "fc"]
    assert POLICY["block.1.conv"].weight_bits == 3
    with pytest.raises(RequestError, match="policy: must have layer"):
        POLICY["conv9"]


def test_with_weight_bits_returns_a_changed_copy() -> None:
    other = POLICY.with_weight_bits({"block.0.conv": 4})
    assert (other["block.0.conv"].weight_bits, POLICY["block.0.conv"].weight_bits) == (4, 2)
    assert other["conv1"] == POLICY["conv1"]
    with refuses("no layer named 'nope'"):
        POLICY.with_weight_bits({"nope": 4})


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.builds(
            LayerBits,
            name=st.text(min_size=1),
            weight_bits=st.sampled_from([*range(1, 9), 32]),
            act_bits=st.sampled_from([*range(2, 9), 32]),
            searched=st.booleans(),
            num_weights=st.integers(1, 10**12),
        ),
        max_size=6,
        unique_by=lambda layer: layer.name,
    )
)
def test_json_round_trip(layers: list[LayerBits]) -> None:
    policy = BitwidthPolicy(tuple(layers))
    assert BitwidthPolicy.from_json(policy.to_json()) == policy


def test_json_is_plain_and_states_its_schema(tmp_path: Path) -> None:
    found = document()
    assert found["schema"] == SCHEMA == "sdq.policy/1"
    assert found["avg_weight_bits"] == POLICY.avg_weight_bits
    assert found["layers"][0] == {
        "name": "conv1", "weight_bits": 8, "act_bits": 8, "searched": False, "num_weights": 100,
    }  # fmt: skip
    file = tmp_path / "policy.json"
    file.write_text(POLICY.to_json())
    assert BitwidthPolicy.load(file) == POLICY


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "text", ["", "{", "[1,", "policy", '{"schema": "sdq.policy/1"', "\ufeff{}"]
)
def test_not_json(text: str) -> None:
    with refuses("my.json: must be JSON", "write it anew"):
        BitwidthPolicy.from_json(text, where="my.json")


def test_json_nested_beyond_reason() -> None:
    with refuses("must be JSON of this schema, got deep nesting"):
        BitwidthPolicy.from_json("[" * 100_000)


def test_json_number_beyond_reason() -> None:
    with refuses("must be JSON"):
        BitwidthPolicy.from_json('{"schema": 1' + "0" * 5000 + "}")


@pytest.mark.parametrize("text", ["[]", "1", "null", '"text"', "{}", '{"layers": {}}'])
def test_not_an_object_with_layers(text: str) -> None:
    with refuses('must be an object with "schema" and a list "layers"'):
        BitwidthPolicy.from_json(text)


@pytest.mark.parametrize("schema", ["sdq.policy/2", "sdq.run/1", None, 1, ["sdq.policy/1"]])
def test_another_schema(schema: object) -> None:
    text = json.dumps({**document(), "schema": schema})
    with refuses("schema must be 'sdq.policy/1', got", repr(schema), "another version"):
        BitwidthPolicy.from_json(text)


@pytest.mark.parametrize("field", ["name", "weight_bits", "act_bits", "searched", "num_weights"])
def test_missing_field(field: str) -> None:
    found = document()
    del found["layers"][2][field]
    with refuses("layer 2: must have the fields name, weight_bits"):
        BitwidthPolicy.from_json(json.dumps(found))


def test_unknown_field() -> None:
    with refuses("layer 1: must have the fields", "surprise"):
        BitwidthPolicy.from_json(changed("surprise", 1))


@pytest.mark.parametrize("layer", [None, 3, "conv", []])
def test_a_layer_that_is_no_object(layer: object) -> None:
    text = json.dumps({**document(), "layers": [layer]})
    with refuses("layer 0: must have the fields"):
        BitwidthPolicy.from_json(text)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("name", 3, "str"), ("name", None, "str"),
        ("weight_bits", True, "int"), ("weight_bits", 2.0, "int"), ("weight_bits", "2", "int"),
        ("act_bits", False, "int"), ("act_bits", None, "int"),
        ("searched", 1, "bool"), ("searched", "yes", "bool"),
        ("num_weights", True, "int"), ("num_weights", 3.5, "int"), ("num_weights", [3], "int"),
    ],
)  # fmt: skip
def test_wrong_type(field: str, value: object, kind: str) -> None:
    with refuses(f"layer 1: {field} must be {kind}, got"):
        BitwidthPolicy.from_json(changed(field, value))


@pytest.mark.parametrize("bits", [0, -1, 9, 15, 31, 33, 10**30])
def test_bits_out_of_range(bits: int) -> None:
    with refuses("layer block.0.conv: weight_bits must be 1 to 8, or 32 for float"):
        BitwidthPolicy.from_json(changed("weight_bits", bits))
    with refuses("layer block.0.conv: act_bits must be 2 to 8 or 16, or 32 for float"):
        BitwidthPolicy.from_json(changed("act_bits", bits))


def test_channel_bits_are_counted_and_survive_json() -> None:
    layer = LayerBits("a", 4, 8, True, 40, (1, 2, 4, 1))
    assert layer.total_weight_bits == 10 * (1 + 2 + 4 + 1)
    policy = BitwidthPolicy((layer, LayerBits("b", 2, 8, True, 40)))
    assert policy.avg_weight_bits == (80 + 80) / 80
    assert policy.weight_bytes == 20
    assert BitwidthPolicy.from_json(policy.to_json()) == policy
    assert policy.with_weight_bits({"a": 3})["a"].channel_bits is None


@pytest.mark.parametrize(
    ("weight_bits", "channels", "message"),
    [
        (4, (1, 2), "weight_bits must be the most of channel_bits, got 4"),
        (4, (4, 9), "channel_bits must be 1 to 8"),
        (4, (4, 1, 1), "channel_bits must divide num_weights evenly, got 3 channels for 40"),
    ],
)
def test_channel_bits_that_cannot_be(
    weight_bits: int, channels: tuple[int, ...], message: str
) -> None:
    with refuses(message):
        LayerBits("a", weight_bits, 8, True, 40, channels)


def test_activations_have_at_least_two_bits() -> None:
    with refuses("act_bits must be 2 to 8"):
        LayerBits("a", 1, 1, True, 10)


@pytest.mark.parametrize("count", [0, -5])
def test_a_layer_has_weights(count: int) -> None:
    with refuses("layer block.0.conv: num_weights must be a positive integer"):
        BitwidthPolicy.from_json(changed("num_weights", count))


def test_booleans_are_no_integers() -> None:
    with refuses("weight_bits must be 1 to 8"):
        LayerBits("a", True, 4, True, 10)
    with refuses("num_weights must be a positive integer"):
        LayerBits("a", 1, 4, True, True)


def test_a_layer_stands_once() -> None:
    with refuses("layer 'conv1' must stand once, got it twice"):
        BitwidthPolicy.from_json(changed("name", "conv1"))


def test_a_file_that_is_absent_or_unreadable(tmp_path: Path) -> None:
    with refuses("policy: no file", "nothing.json"):
        BitwidthPolicy.load(tmp_path / "nothing.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{}")
    with refuses("binary.json: must be JSON in UTF-8"):
        BitwidthPolicy.load(binary)
    with refuses(tmp_path.name):
        BitwidthPolicy.load(tmp_path)


def test_a_name_with_half_a_character_is_refused() -> None:
    text = BitwidthPolicy((LayerBits("conv", 4, 4, True, 9),)).to_json()
    with pytest.raises(RequestError, match=r"layer 0: name must be text, got 'co\\ud800nv'; write"):
        BitwidthPolicy.from_json(text.replace("conv", "co\\ud800nv"))
