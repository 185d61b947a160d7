"""Runs the graphs that FINN makes, on FINN's own Python, several images at a time.

FINN's graphs are for one image. Its layers compute on arrays, most of them whatever the batch size;
those that do not are called for each image, or get several as one. Which ones that is, nobody
promises: the first image of the first batch also passes alone, and if anything differs, all do.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

FOR_EACH_IMAGE = ("Im2Col", "ConvolutionInputGenerator", "Shuffle")
"""Their windows come out in the order of a single image, or they have its shape as an attribute."""

ONE_TALL_IMAGE = ("VVAU",)
"""They want one image, and treat each of its pixels alike: several lie one above the other. Each
call of theirs makes a matrix of the depthwise weights that is zero almost everywhere."""

Arrays = dict[str, np.ndarray]


class Executor:
    """Runs a graph of standard operators, qonnx's and FINN's.

    Args:
        model: for a batch of one, with the shape of every tensor.
        wanted: the tensors to return.
    """

    def __init__(self, model: onnx.ModelProto, wanted: Collection[str]) -> None:
        self.model, self.wanted = model, set(wanted)
        self.input = model.graph.input[0].name
        self.alone = _Pass(model, 1)
        self.together: dict[int, _Pass] = {}
        self.checked, self.batches = False, True

    def __call__(self, images: np.ndarray) -> Arrays:
        """Return the wanted tensors for images ``(N, ...)``."""
        count = len(images)
        if count == 1 or not self.batches:
            return self._one_by_one(images)
        if count not in self.together:
            self.together[count] = _Pass(self.model, count)
        if self.checked:
            return self.together[count](images, self.wanted)
        self.checked = True
        first = self.alone(images[:1], self.wanted)
        try:
            found = self.together[count](images, self.wanted)
        except Exception:  # noqa: BLE001 - a layer of FINN's that wants one image
            self.batches = False
            return self._one_by_one(images)
        self.batches = all(
            found[name].shape == (count, *values.shape[1:])
            and np.allclose(found[name][:1], values, rtol=1e-6, atol=0)
            for name, values in first.items()
        )
        return found if self.batches else self._one_by_one(images)

    def _one_by_one(self, images: np.ndarray) -> Arrays:
        found = [self.alone(image[None], self.wanted) for image in images]
        return {name: np.concatenate([values[name] for values in found]) for name in found[0]}


class _Pass:
    """A graph for a batch size."""

    def __init__(self, model: onnx.ModelProto, size: int) -> None:
        from qonnx.custom_op.registry import getCustomOp

        self.model = onnx.ModelProto()
        self.model.CopyFrom(model)
        graph = self.model.graph
        self.size, self.input = size, graph.input[0].name
        self.constants = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
        _set_batch_(graph, self.constants, size)
        self.shapes = {
            entry.name: [d.dim_value for d in entry.type.tensor_type.shape.dim]
            for entry in [*graph.value_info, *graph.output]
        }
        self.last_reader = {x: i for i, node in enumerate(graph.node) for x in node.input}
        self.runs = [
            getCustomOp(node) if node.domain else _session(node, self.model) for node in graph.node
        ]

    def __call__(self, images: np.ndarray, wanted: set[str]) -> Arrays:
        graph = self.model.graph
        context: Arrays = {**self.constants, self.input: images.astype(np.float32)}
        for i, (node, run) in enumerate(zip(graph.node, self.runs, strict=True)):
            self._node(node, run, context)
            for name in node.input:
                done = self.last_reader[name] == i and name not in wanted
                if done and name not in self.constants:
                    context.pop(name, None)
        return {name: context[name] for name in wanted}

    def _node(self, node: onnx.NodeProto, run: Any, context: Arrays) -> None:
        if not node.domain:
            values = run.run(None, {name: context[name] for name in node.input if name})
            context.update(zip(node.output, values, strict=True))
        elif node.op_type in FOR_EACH_IMAGE and self.size > 1:
            self._each(node, run, context)
        elif node.op_type in ONE_TALL_IMAGE and self.size > 1:
            self._stacked(node, run, context)
        else:
            self._custom(node, run, context)

    def _each(self, node: onnx.NodeProto, run: Any, context: Arrays) -> None:
        whole = context[node.input[0]]
        found = []
        for image in whole:
            context[node.input[0]] = image[None]
            self._custom(node, run, context, single=True)
            found.append(context[node.output[0]])
        context[node.input[0]] = whole
        context[node.output[0]] = np.concatenate(found)

    def _stacked(self, node: onnx.NodeProto, run: Any, context: Arrays) -> None:
        whole = context[node.input[0]]
        context[node.input[0]] = whole.reshape(1, -1, *whole.shape[2:])
        self._custom(node, run, context, single=True)
        made = context[node.output[0]]
        context[node.input[0]] = whole
        context[node.output[0]] = made.reshape(*whole.shape[:-1], made.shape[-1])

    def _custom(
        self, node: onnx.NodeProto, run: Any, context: Arrays, *, single: bool = False
    ) -> None:
        for name in node.output:  # some layers look there for their output's shape
            shape = self.shapes[name]
            shape = [1, *shape[1:]] if single else shape
            context[name] = np.broadcast_to(np.float32(0), shape)
        run.execute_node(context, self.model.graph)


def _session(node: onnx.NodeProto, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Return a session of one standard operator, for any shapes."""
    float32 = onnx.TensorProto.FLOAT
    kinds = {x.name: x.data_type for x in model.graph.initializer}
    entries = [*model.graph.input, *model.graph.value_info, *model.graph.output]
    kinds |= {x.name: x.type.tensor_type.elem_type for x in entries}
    inputs, outputs = (
        [helper.make_tensor_value_info(x, kinds.get(x, float32), None) for x in names if x]
        for names in (node.input, node.output)
    )
    graph = helper.make_graph([node], node.name or "node", inputs, outputs)
    opsets = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        options, providers=["CPUExecutionProvider"],
    )  # fmt: skip


def _set_batch_(graph: onnx.GraphProto, constants: Collection[str], size: int) -> None:
    """Change the batch size in shapes, and where hardware layers keep it."""
    for entry in [*graph.input, *graph.output, *graph.value_info]:
        dims = entry.type.tensor_type.shape.dim
        if entry.name not in constants and dims and dims[0].dim_value == 1:
            dims[0].dim_value = size
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "numInputVectors" and attribute.ints:
                attribute.ints[0] = size
