"""A quantized network's graph, as the rules of a compiler look at it."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from sdq import act_points
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.learned_scale import ActQuantizer
from sdq.modes import evaluating
from sdq.quant_model import QuantModel

_NAMES = {
    torch.nn.functional.max_pool1d: "max_pool1d",  # torch's own name of it is boolean_dispatch
    torch.nn.functional.max_pool2d: "max_pool2d",
}


_POOL = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_PARAMETERS: dict[str, tuple[str, ...]] = {
    "max_pool2d": _POOL,
    "avg_pool2d": (*_POOL[:4], "ceil_mode", "count_include_pad", "divisor_override"),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "mean": ("input", "dim", "keepdim"),
    "clamp": ("input", "min", "max"),
    "clip": ("input", "min", "max"),
    "clamp_min": ("input", "min"),
    "hardtanh": ("input", "min_val", "max_val"),
    "cat": ("tensors", "dim"),
    "concat": ("tensors", "dim"),
    "pad": ("input", "pad", "mode", "value"),
    "getitem": ("input", "index"),
}
"""Of functions and methods, whose own signatures Python cannot read."""


class NetworkGraph:
    """A quantized network's nodes, with the shape of what each gives.

    Args:
        qmodel: need not be calibrated.
        sample: ``(N, C, H, W)``.

    Raises:
        RequestError: the sample does not fit the network.
    """

    def __init__(self, qmodel: QuantModel, sample: Tensor) -> None:
        self.qmodel, self.net = qmodel, qmodel.net
        self.nodes = list(qmodel.net.graph.nodes)
        self.layers = {spec.name: spec for spec in qmodel.layers}
        self.quantizers: dict[str, ActQuantizer] = qmodel.act_quantizers()
        self.shapes = _shapes(qmodel, sample)
        self._integer = self._before_integers()

    def module(self, node: fx.Node) -> nn.Module | None:
        """Return the module that a node calls."""
        return self.net.get_submodule(str(node.target)) if node.op == "call_module" else None

    def layer(self, node: fx.Node) -> LayerSpec | None:
        """Return the quantizable layer that a node calls."""
        return self.layers.get(str(node.target)) if node.op == "call_module" else None

    def quantizer(self, node: fx.Node) -> ActQuantizer | None:
        """Return the activation quantizer that a node is."""
        return self.quantizers.get(str(node.target)) if node.op == "call_module" else None

    def sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the tensors that a node reads."""
        return [source for source in node.all_input_nodes if source in self.shapes]

    def operation(self, node: fx.Node) -> str:
        """Return what a node does: the name of a module's class, a function or a method."""
        module = self.module(node)
        if module is not None:
            return type(module).__name__
        if isinstance(node.target, str):
            return node.target
        return _NAMES.get(node.target, str(getattr(node.target, "__name__", node.target)))

    def label(self, node: fx.Node) -> str:
        """Return what the user calls a node: a module's path, or where an operation stands."""
        if node.op == "call_module":
            return str(node.target)
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack), "")
        return f"{owner} ({self.operation(node)})" if owner else self.operation(node)

    def origin(self, node: fx.Node) -> fx.Node:
        """Return the node that makes the values a quantizer rounds."""
        source = self.sources(node)[0]
        while self.passes_on(source) and self.sources(source):
            source = self.sources(source)[0]
        return source

    def arguments(self, node: fx.Node) -> dict[str, Any]:
        """Return a node's settings by name: a module's attributes, or a function's arguments."""
        module = self.module(node)
        if module is not None:
            return dict(vars(module))
        names = _PARAMETERS.get(self.operation(node), ())
        return {**dict(zip(names, node.args, strict=False)), **node.kwargs}

    def quantized_next(self, node: fx.Node) -> bool:
        """Tell whether quantizers alone read a tensor, themselves or behind what passes it on.

        Layers count as well: what they read is their own affair.
        """
        return bool(node.users) and all(
            self.quantizer(user) is not None
            or self.layer(user) is not None
            or (self.passes_on(user) and len(node.users) == 1 and self.quantized_next(user))
            for user in node.users
        )

    def passes_on(self, node: fx.Node) -> bool:
        """Tell whether a node's values are its input's."""
        return act_points.passes_on(self.net, node)

    def is_last(self, node: fx.Node) -> bool:
        """Tell whether no layer and no quantizer comes behind a node."""
        return node not in self._integer

    def _before_integers(self) -> set[fx.Node]:
        found = set[fx.Node]()
        for node in reversed(self.nodes):
            ends = self.quantizer(node) is not None or self.layer(node) is not None
            if ends or any(user in found for user in node.users):
                found.add(node)
        return found


def _shapes(qmodel: QuantModel, sample: Tensor) -> dict[fx.Node, tuple[int, ...]]:
    """Return the shape of every floating-point tensor, by the node that gives it."""
    parameter = next(qmodel.parameters())
    watch = _Shapes(qmodel)
    try:
        with evaluating(qmodel), torch.no_grad():
            watch.run(sample[:1].to(parameter))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise RequestError(
            f"export: sample must fit the network, got shape {tuple(sample.shape)} "
            f"(N, C, H, W): {str(error).splitlines()[0]}"
        ) from error
    return watch.found


class _Shapes(fx.Interpreter):
    """Notes shapes; activations pass unquantized, for they may not be calibrated."""

    def __init__(self, qmodel: QuantModel) -> None:
        super().__init__(qmodel.net)
        self.quantizers = set(qmodel.act_modules())
        self.found: dict[fx.Node, tuple[int, ...]] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        return args[0] if target in self.quantizers else super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.op != "get_attr" and isinstance(result, Tensor) and result.is_floating_point():
            self.found[n] = tuple(result.shape)
        return result
