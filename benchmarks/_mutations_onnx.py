"""Mutations of ONNX files: nodes, tensors, metadata and inputs of a graph."""

import random
from typing import Any

from _mutations import change_json, cut


def change_onnx(rng: random.Random, data: bytes) -> bytes:
    """Change a node, a tensor, the metadata or the shape of an ONNX graph."""
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    rng.choice((
        lambda: _change_node_(rng, graph), lambda: _change_node_(rng, graph),
        lambda: _change_tensor_(rng, rng.choice(graph.initializer)),
        lambda: _change_tensor_(rng, rng.choice(graph.initializer)),
        lambda: _change_metadata_(rng, model),
        lambda: _change_input_(rng, graph),
        lambda: model.opset_import[0].__setattr__("version", rng.choice((0, 1, 7, 99, 2**40))),
    ))()  # fmt: skip
    found: bytes = model.SerializeToString()
    return found


def _change_node_(rng: random.Random, graph: Any) -> None:
    node = rng.choice(graph.node)
    way = rng.randrange(9)
    if way == 0:
        graph.node.remove(node)
    elif way == 1:
        node.op_type = rng.choice(
            ("", "Relu", "Loop", "Reshape", "NoSuch", "Quant", "Conv", "Clip")
        )
    elif way == 2 and node.input:
        names = [x for n in graph.node for x in (*n.input, *n.output)]
        node.input[rng.randrange(len(node.input))] = rng.choice((*names, "", "nothing"))
    elif way == 3 and node.input:
        del node.input[rng.randrange(len(node.input)) :]
    elif way == 4 and node.attribute:
        attribute = rng.choice(node.attribute)
        attribute.i = rng.choice((-1, 0, 2**31, 2**62))
        attribute.ints[:] = [rng.choice((-1, 0, 7, 2**40)) for _ in range(rng.randrange(5))]
    elif way == 5 and node.attribute:
        node.attribute.remove(rng.choice(node.attribute))
    elif way == 6:
        node.name = rng.choice(("", "é", *(n.name for n in graph.node)))
    elif way == 7 and node.output:
        names = [x for n in graph.node for x in (*n.input, *n.output)]
        node.output[0] = rng.choice((*names, ""))
    else:
        graph.node.append(node)


def _change_tensor_(rng: random.Random, tensor: Any) -> None:
    way = rng.randrange(7)
    if way == 0:
        tensor.dims[:] = rng.choice(([], [-1], [0], [2**40, 2**20], [1, 1, 1, 1, 1], [3], [2**33]))
    elif way == 1:
        tensor.data_type = rng.choice((0, 1, 2, 3, 7, 8, 10, 16, 17, 99))
    elif way == 2:
        tensor.raw_data = cut(rng, tensor.raw_data)
    elif way == 3:
        tensor.raw_data = bytes(len(tensor.raw_data))
    elif way == 4:
        tensor.raw_data = b"\xff" * len(tensor.raw_data)
    elif way == 5:
        tensor.name = rng.choice(("", "é", "x"))
    else:
        tensor.data_location = 1
        tensor.external_data.add(key="location", value=rng.choice(("../x", "/etc/passwd", "x", "")))


def _change_metadata_(rng: random.Random, model: Any) -> None:
    entry = rng.choice(model.metadata_props)
    if entry.key == "policy" or rng.random() < 0.3:
        entry = next(x for x in model.metadata_props if x.key == "policy")
        entry.value = change_json(rng, entry.value.encode()).decode()
    else:
        entry.value = rng.choice(("", "{}", "null", "sdq.export/9", "é" * 100, '{"mean": "a"}'))


def _change_input_(rng: random.Random, graph: Any) -> None:
    entry = rng.choice((graph.input[0], graph.output[0]))
    way = rng.randrange(4)
    if way == 0:
        entry.name = rng.choice(("", "x"))
    elif way == 1:
        entry.type.tensor_type.elem_type = rng.choice((0, 1, 2, 7, 8, 99))
    elif way == 2:
        for dim in entry.type.tensor_type.shape.dim:
            dim.dim_value = rng.choice((-1, 0, 1, 7, 2**40))
    else:
        del graph.input[:], graph.output[:]
