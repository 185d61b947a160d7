"""An interpreter of ONNX graphs in float64, on torch's functions.

In float64 a low-bit network has no ties to break: two graphs that mean the same have the same
integer codes everywhere, and one wrong code is one too many. Ordinary runtimes have no float64
kernels for many operators; this interpreter has all that our exporters write
(:mod:`export.operators`).
"""

from collections.abc import Collection, Sequence

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from export.graph import PREPROCESSING, QUANTIZER_NODES, remove_unused_
from export.operands import Attributes, attributes, tensor
from export.operators import OPERATORS
from sdq.errors import RunError


class Interpreter:
    """Runs a graph of one input and one output in float64.

    The nodes of the preprocessing stay in float32: they are elementwise, every runtime rounds them
    alike, and the images they give must be those PyTorch was given.

    Args:
        model: an ONNX or QONNX graph.

    Raises:
        RunError: the graph has an operator that is not known here.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        for node in self.nodes:
            if node.op_type not in OPERATORS:
                raise RunError(
                    f"export: node {node.name!r}: operator must be one of "
                    f"{', '.join(sorted(OPERATORS))}, got {node.op_type!r}; "
                    "add it to export/operators.py"
                )
        self.attributes = [attributes(node) for node in self.nodes]
        self.constants = {
            x.name: tensor(x, single=x.name.startswith(PREPROCESSING))
            for x in model.graph.initializer
        }
        self.input = model.graph.input[0].name
        self.output = model.graph.output[0].name
        self.last_reader = {x: i for i, node in enumerate(self.nodes) for x in node.input}

    @torch.no_grad()
    def __call__(self, inputs: Tensor, taps: Collection[str] = ()) -> dict[str, Tensor]:
        """Run the graph.

        Args:
            inputs: float images (taken to float64), or uint8 pixels.
            taps: names of tensors to return besides the output.

        Returns:
            The output and the tapped tensors, by name.
        """
        values = {"": None, self.input: inputs.double() if inputs.is_floating_point() else inputs}
        wanted = {self.output, *taps}
        found: dict[str, Tensor] = {}
        for i, node in enumerate(self.nodes):
            arguments = [self.constants.get(x, values.get(x)) for x in node.input]
            result = self._apply(node, self.attributes[i], arguments)
            for name, value in zip(node.output, result, strict=False):
                values[name] = value
                if name in wanted:
                    found[name] = value
            for x in node.input:
                if self.last_reader[x] == i:
                    values.pop(x, None)
        return found

    def _apply(
        self, node: onnx.NodeProto, options: Attributes, arguments: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        try:
            result = OPERATORS[node.op_type](options, *arguments)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise RunError(f"export: node {node.name!r} cannot be computed: {reason}") from error
        results = result if isinstance(result, tuple) else (result,)
        # the last node of the preprocessing hands over to float64
        if node.name.startswith(PREPROCESSING) and node.op_type != "Transpose":
            return results
        return tuple(x.double() if x.dtype is torch.float32 else x for x in results)


def fold_constants_(model: onnx.ModelProto) -> None:
    """Replace what follows from constants alone: copies, and arithmetic on shapes.

    Values are only copied or computed in integers, so nothing is rounded; the quantizers of the
    weights stay.
    """
    stored = {x.name: x for x in model.graph.initializer}
    for node in list(model.graph.node):
        if not node.output or not all(x in stored for x in node.input if x):
            continue
        arguments = [
            torch.from_numpy(np.array(numpy_helper.to_array(stored[x]))) if x else None
            for x in node.input
        ]
        copies = node.op_type in ("Identity", "Transpose")
        known = node.op_type in OPERATORS and node.op_type not in QUANTIZER_NODES
        if not known or not (copies or _whole(arguments)):
            continue
        value = OPERATORS[node.op_type](attributes(node), *arguments)
        if not isinstance(value, Tensor) or not (copies or _whole([value])):
            continue
        name = node.output[0]
        stored[name] = numpy_helper.from_array(value.contiguous().numpy(), name)
        model.graph.initializer.append(stored[name])
        model.graph.node.remove(node)
    remove_unused_(model)


def _whole(tensors: Sequence[Tensor | None]) -> bool:
    return not any(x is not None and x.is_floating_point() for x in tensors)
