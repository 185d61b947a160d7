"""Look-ups by dictionary give what qonnx's own give, whatever is done to the graph in between."""

import random

import numpy as np
import pytest
from onnx import TensorProto, helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.general import SortGraph
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.util import basic

from export.finn_flow import lookup

COUNT = 40


def chain(seed: int) -> ModelWrapper:
    """``x -> Mul -> Mul -> ...`` with nodes out of order, every second shape unknown."""
    draw = random.Random(seed)
    names = ["x", *(f"y{i}" for i in range(COUNT))]
    nodes = [
        helper.make_node("Mul", [names[i], f"w{i}"], [names[i + 1]], f"n{i}") for i in range(COUNT)
    ]
    # what nothing leads to is dropped by sorting; a sum of two earlier tensors is kept
    nodes += [helper.make_node("Identity", ["nothing"], ["loose"], "loose"),
              helper.make_node("Add", ["y3", "y30"], ["sum"], "add")]  # fmt: skip
    draw.shuffle(nodes)
    info = [helper.make_tensor_value_info(x, TensorProto.FLOAT, [1, 900]) for x in names]
    graph = helper.make_graph(
        nodes, "g", info[:1], [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
        value_info=info[2::2],
    )  # fmt: skip
    model = ModelWrapper(helper.make_model(graph))
    for i in range(COUNT):
        model.set_initializer(f"w{i}", np.full(900 if i % 2 else 1, i, np.float32))
    return model


def answers(model: ModelWrapper) -> list[object]:
    """Return all that can be asked of a graph."""
    names = [
        "x",
        "loose",
        "sum",
        *(f"{a}{i}{b}" for i in range(COUNT) for a in "wy" for b in ("", "a")),
    ]
    found: list[object] = []
    for name in names:
        values = model.get_initializer(name)
        info = model.get_tensor_valueinfo(name)
        found += [
            None if values is None else values.tolist(), model.get_tensor_shape(name),
            None if info is None else info.SerializeToString(),
            str(model.get_tensor_datatype(name)),
            basic.get_by_name(model.graph.initializer, name) is None,
        ]  # fmt: skip
    return found


def edit_(model: ModelWrapper, draw: random.Random) -> None:
    """Do one of what qonnx's transformations do to a graph's tensors."""
    initializers, info = model.graph.initializer, model.graph.value_info
    some = draw.randrange(COUNT)
    match draw.randrange(6):
        case 0:
            model.set_initializer(f"w{some}", np.full(3, draw.random(), np.float32))
        case 1 if len(initializers) > COUNT // 2:
            initializers.remove(draw.choice(list(initializers)))
        case 2 if len(info) > COUNT // 4:
            info.remove(draw.choice(list(info)))
        case 3:
            if model.get_tensor_valueinfo(f"w{some}a") is None:
                model.rename_tensor(f"w{some}", f"w{some}a")
        case 4:
            model.set_tensor_shape(f"y{some}", [1, draw.randrange(9)])
        case _:
            info[draw.randrange(len(info))].type.tensor_type.shape.dim[0].dim_value = 7


@pytest.mark.parametrize("seed", range(4))
def test_answers_are_those_of_lists(seed: int) -> None:
    ours, theirs = chain(seed), chain(seed)
    one, other = random.Random(seed), random.Random(seed)
    for _ in range(60):
        edit_(theirs, other)
        expected = answers(theirs)
        with lookup.indexed():
            edit_(ours, one)
            assert answers(ours) == expected


def test_edits_while_dictionaries_stand() -> None:
    ours, theirs = chain(0), chain(0)
    one, other = random.Random(9), random.Random(9)
    with lookup.indexed():
        found = []
        for _ in range(60):
            edit_(ours, one)
            found.append(answers(ours))
    for values in found:
        edit_(theirs, other)
        assert answers(theirs) == values


def test_graphs_are_sorted_the_same() -> None:
    expected = chain(2).transform(SortGraph())
    with lookup.indexed():
        found = chain(2).transform(SortGraph())
    assert [n.name for n in found.graph.node] == [n.name for n in expected.graph.node]
    assert "loose" not in [n.name for n in found.graph.node]


def test_shapes_are_inferred_and_weights_kept() -> None:
    model = chain(3).transform(SortGraph())
    expected = model.transform(InferShapes())
    with lookup.indexed():
        found = model.transform(InferShapes())
    assert found.get_tensor_shape("sum") == [1, 900]
    assert found.model.SerializeToString() == expected.model.SerializeToString()
    assert model.get_initializer("w3").tolist() == [3.0] * 900  # of the graph it was asked of, too


def test_everything_is_as_before_afterwards() -> None:
    before = ModelWrapper.get_initializer, SortGraph.apply, basic.get_by_name
    with pytest.raises(RuntimeError), lookup.indexed():
        raise RuntimeError
    assert (ModelWrapper.get_initializer, SortGraph.apply, basic.get_by_name) == before
