"""torch.fx with a sample at hand: decisions by shape are taken, others refused with their line."""

import copy
import linecache
import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from sdq.errors import RequestError
from sdq.refusals import KINDS, advice, has_layers, source_of
from sdq.stand_ins import StandIn, of_shapes

_REFUSED_CALLS: dict[Any, str] = {
    getattr(nn.functional, name): f"functional.{name}"
    for name in (
        "linear", "bilinear", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "embedding", "embedding_bag",
        "multi_head_attention_forward",
    )
}  # fmt: skip

_PRODUCTS = {
    torch.matmul, torch.mm, torch.bmm, torch.mv, torch.addmm, torch.baddbmm, torch.einsum,
    torch.tensordot, torch.inner, torch.linalg.multi_dot, operator.matmul, "inner", "matmul",
    "mm", "bmm", "mv", "addmm", "baddbmm",
}  # fmt: skip
"""With a parameter in them they are layers."""

TRACE_ERRORS = (
    fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError, LookupError,
    AssertionError, ArithmeticError, ImportError, NameError,
)  # fmt: skip
"""What a network's own code raises when it meets what it does not expect."""


def reason_of(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]


def inside(module: nn.Module, shape: tuple[int, ...] | None) -> fx.GraphModule | None:
    """Return what a module that is kept whole does in evaluation; None if nothing can follow it.

    Args:
        module: left as it is.
        shape: of its input, if that is known.
    """
    root = copy.deepcopy(module).eval()
    with suppress(*TRACE_ERRORS, KeptWhole):  # RequestError is a ValueError
        if shape is not None:
            tracer = Tracer(torch.zeros(shape), set())
            return fx.GraphModule(root, tracer.trace(root))
    with suppress(*TRACE_ERRORS, KeptWhole):
        return fx.symbolic_trace(root)
    return None


class _Untraceable(Exception):
    """Carries a refusal through torch.fx."""


class KeptWhole(Exception):
    """Carries the path of a module that is to be kept whole."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class Tracer(fx.Tracer):
    """Follows a network with a sample at hand."""

    def __init__(self, sample: Tensor, whole: set[str]) -> None:
        super().__init__()
        self.sample, self.whole = sample, whole
        self.asked_mode: set[str] = set()
        self._values: list[dict[fx.Node, Any]] = [{}, {}]
        self._evaluating = self._classing = False
        self._failed_in = ""

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        """Follow a network from its input; RequestError where that is impossible."""
        with self._watching(root):
            try:
                return super().trace(root, concrete_args)
            except _Untraceable as error:
                raise RequestError(str(error)) from None
            except TRACE_ERRORS as error:
                if self._failed_in and not has_layers(root.get_submodule(self._failed_in)):
                    raise KeptWhole(self._failed_in) from error
                frames = traceback.extract_tb(error.__traceback__)
                places = [_place(f.filename, f.lineno or 0) for f in frames if _users(f.filename)]
                module = source_of(self._failed_in, root.get_submodule(self._failed_in))
                raise RequestError(
                    f"model: {module}{(places or [''])[-1]} cannot be traced by torch.fx: "
                    f"{reason_of(error)}{advice(self._failed_in)}"
                ) from error

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Give the network its one input; arguments with a default keep it."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module is a step of its own."""
        leaf = super().is_leaf_module(m, module_qualified_name)
        inside = type(m) not in KINDS and has_layers(m)  # as in torch's own transformer layers
        return module_qualified_name in self.whole or (leaf and not inside)

    def create_arg(self, a: Any) -> Any:
        """Return what stands for an argument in the graph."""
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)  # before any isinstance

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """Add a step, or refuse it."""
        node = super().create_node(*args, **kwargs)
        if not self._evaluating:
            self._check_node(node)
        return node

    def _check_node(self, node: fx.Node) -> None:
        """Refuse weights that would stay in float unseen, and numbers out of tensors."""
        where = f"is called in forward ({node.name}) and would stay in float unseen"
        if node.op == "call_function" and node.target in _REFUSED_CALLS:
            self.refuse(f"{_REFUSED_CALLS[node.target]} {where}; use the module that does the same")
        for read in node.all_input_nodes:
            owner = str(read.target).rpartition(".")[0]
            if read.op == "get_attr" and type(self.root.get_submodule(owner)) in KINDS:
                self.refuse(
                    f"{read.target} must be read by its own layer alone, or would stay in float "
                    "unseen"
                )
        called = node.op in ("call_function", "call_method")
        weights = [n for n in node.all_input_nodes if called and self._of_parameters(n)]
        others = len(node.all_input_nodes) - len(weights)
        if weights and others and node.target in _PRODUCTS:
            self.refuse(
                f"a product with a parameter ({weights[0].name}) {where}; use nn.Linear or a "
                "convolution"
            )
        if weights and not _from_libraries(node.target):
            self.refuse(f"a function that torch.fx does not look into, with a parameter, {where}")
        if node.op == "call_method" and node.target in ("item", "tolist", "numpy"):
            self.concrete(node, "a number")

    def _of_parameters(self, node: fx.Node) -> bool:
        """Tell whether a value follows from parameters alone, through no module."""
        if node.op == "get_attr":
            return isinstance(self.attribute(node), nn.Parameter)
        inputs = node.all_input_nodes
        calls = node.op in ("call_function", "call_method")
        return calls and bool(inputs) and all(self._of_parameters(read) for read in inputs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Follow a module, or take it as a step."""
        if self._evaluating:
            return forward(*args, **kwargs)
        if m not in (self.submodule_paths or ()):  # made in forward
            if has_layers(m) or any(True for _ in m.parameters()):
                self.refuse(f"a {type(m).__name__} in forward must be a submodule of the network")
            return forward(*args, **kwargs)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self._failed_in = self._failed_in or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute: a parameter as a step, unless something is being computed."""
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Return a stand-in for a step's value."""
        return StandIn(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Decide by a value that follows from shapes."""
        return bool(self.concrete(obj.node, "a decision"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """Run over a value of which the length follows from shapes."""
        values = [self.evaluate(obj.node, k) for k in (0, 1)]
        if isinstance(values[0], Mapping):
            return iter(values[0])
        count, other = (len(v) if hasattr(v, "__len__") else 0 for v in values)
        if count != other:
            self.refuse("a loop must not run over the images of a batch")
        return iter([obj[i] for i in range(count)])  # type: ignore[index]

    def concrete(self, node: fx.Node, what: str) -> Any:
        """Return the value of a node that follows from shapes alone."""
        if not of_shapes(node):
            self.refuse(f"{what} must not depend on the values of a tensor")
        first, other = (self.evaluate(node, k) for k in (0, 1))
        if first != other:
            self.refuse(f"{what} must not depend on the number of images")
        return first

    def class_of(self, proxy: fx.Proxy) -> type:
        """Return Tensor if the proxy stands for one, else the proxy's own class."""
        if proxy.node.op == "placeholder":
            return Tensor
        if self._evaluating or self._classing or proxy.node.graph is not self.graph:
            return type(proxy)
        self._classing = True
        try:
            tensor = isinstance(self.evaluate(proxy.node, 0), Tensor)
        except TRACE_ERRORS:  # what is wrong will show where it is computed
            tensor = False
        finally:
            self._classing = False
        return Tensor if tensor else type(proxy)

    def refuse(self, rule: str) -> None:
        """Raise, naming the line of the user's code that is being traced."""
        frame, place = sys._getframe(), ""
        while frame is not None:
            if _users(frame.f_code.co_filename):
                place = _place(frame.f_code.co_filename, frame.f_lineno)
                break
            frame = frame.f_back  # type: ignore[assignment]
        path = self.scope.module_path
        module = self.root.get_submodule(path)
        raise _Untraceable(f"model: {source_of(path, module)}{place}: {rule}{advice(path)}")

    @torch.no_grad()
    def evaluate(self, node: fx.Node, which: int = 0) -> Any:
        """Compute a node for the sample (0), or for twice as many images (1)."""
        values = self._values[which]
        self._evaluating = True
        try:
            for earlier in node.graph.nodes:  # in order, so that arguments are there
                if earlier not in values:
                    values[earlier] = self._compute(earlier, values, which)
                if earlier is node:
                    break
        finally:
            self._evaluating = False
        return values[node]

    def _compute(self, node: fx.Node, values: dict[fx.Node, Any], which: int) -> Any:
        if node.op == "placeholder":
            return torch.cat([self.sample] * (which + 1))
        args = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "get_attr":
            return self.attribute(node)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def attribute(self, node: fx.Node) -> Any:
        """Return the parameter or buffer that a node reads."""
        before, self._evaluating = self._evaluating, True
        try:
            return operator.attrgetter(str(node.target))(self.root)
        finally:
            self._evaluating = before

    @contextmanager
    def _watching(self, root: nn.Module) -> Iterator[None]:
        """Note which modules ask whether they train, and let torch.as_tensor take a stand-in."""
        paths = {id(module): path for path, module in root.named_modules()}

        def get(module: nn.Module) -> bool:
            if id(module) in paths and not self._evaluating:
                self.asked_mode.add(paths[id(module)])
            mode: bool = module.__dict__["training"]
            return mode

        def put(module: nn.Module, mode: bool) -> None:
            module.__dict__["training"] = mode

        as_tensor: Any = torch.as_tensor

        def same(x: Any, *args: Any, **kwargs: Any) -> Any:
            return x if isinstance(x, fx.Proxy) else as_tensor(x, *args, **kwargs)

        nn.Module.training = property(get, put)  # type: ignore[assignment]
        torch.as_tensor = same  # type: ignore[assignment]
        try:
            yield
        finally:
            del nn.Module.training
            torch.as_tensor = as_tensor


def _from_libraries(function: Any) -> bool:
    """Tell whether a function is one of torch's or Python's, and no function of the user's."""
    module = getattr(function, "__module__", None) or "torch"  # methods are named only
    return module.partition(".")[0] in ("torch", "_operator", "builtins", "math")


_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def _users(filename: str) -> bool:
    """Tell whether a file is the user's: neither torch's, nor ours, nor generated."""
    ours = filename.startswith(_LIBRARIES) and "models" not in Path(filename).parts
    return not ours and not filename.startswith("<")


def _place(filename: str, line: int) -> str:
    text = linecache.getline(filename, line).strip()
    return f" at {filename}:{line}" + (f", `{text}`" if text else "")
