"""From a network to a torch.fx graph that computes the same, or a refusal that says where and why.

What torch.fx cannot follow by itself and is followed here: decisions by the shape of a tensor,
taken as they fall for the sample; modules that ask whether they train, or do what torch.fx cannot
follow, kept whole where nothing in them is quantized; functional dropout; operations in place.
"""

import copy
import keyword
import linecache
import math
import operator
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils import _pytree

from sdq.errors import RequestError, nearest

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Linear: "linear",
}
"""Layers that are quantized."""

_REFUSED = (
    nn.Conv3d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
    nn.Embedding, nn.EmbeddingBag, nn.modules.lazy.LazyModuleMixin,
)  # fmt: skip

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
    torch.tensordot, operator.matmul, "matmul", "mm", "bmm", "mv", "addmm", "baddbmm",
}  # fmt: skip
"""With a parameter in them they are layers."""

_DROPOUTS: dict[Any, type[nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
    nn.functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}

TRACE_ERRORS = (
    fx.proxy.TraceError, TypeError, RuntimeError, ValueError, AttributeError, LookupError,
    AssertionError, ArithmeticError, ImportError, NameError,
)  # fmt: skip
"""What a network's own code raises when it meets what it does not expect."""

SAME = 1e-4
"""The traced network may differ from the given one by this share of its largest output: the same
operations in the same order, so by nothing at all, unless a library chooses other kernels."""


def trace(model: nn.Module, sample: Tensor, skip: tuple[str, ...] = ()) -> fx.GraphModule:
    """Trace a copy of a network, in evaluation mode.

    Args:
        model: left as it is.
        sample: an input ``(N, ...)``; what depends on its shape is taken as it falls for it.
        skip: patterns (as in a shell) of modules that are kept whole and in float.

    Raises:
        RequestError: a layer that cannot be quantized and is not skipped, a decision that depends
            on a tensor's values or on the number of images, or what torch.fx cannot follow.
    """
    skipped = whole = _skipped(model, skip)
    _check_layers(model, whole)
    _check_names(model, whole)
    root = copy.deepcopy(model).eval()
    images = torch.rand(2, *sample.shape[1:], generator=torch.Generator().manual_seed(0)).to(sample)
    outputs = _accepted(root, images)
    _plain_layers_(root, whole)
    while True:
        tracer = _Tracer(sample, whole)
        try:
            traced = tracer.trace(root)
        except _KeptWhole as kept:  # torch.fx cannot follow it, and nothing in it is quantized
            whole = whole | {kept.path}
            continue
        for node in list(traced.nodes):
            if node.op == "get_attr" and not node.users:  # asked for its shape alone
                traced.erase_node(node)
        net = fx.GraphModule(root, traced, type(root).__name__)
        asking = {p for p in tracer.asked_mode if p and not has_layers(root.get_submodule(p))}
        if asking <= whole:
            break
        whole = whole | asking  # traced, they would never train
    _check_skipped(net, skipped)
    _note_inputs_(net, tracer)
    _out_of_place(net)
    _module_dropout(net)
    net.eval()
    try:
        same = _equal(outputs, _outputs(net, images))
    except TRACE_ERRORS as error:
        raise RequestError(
            f"model: {type(model).__name__} must compute the same when it is traced by torch.fx, "
            f"but: {_reason_of(error)}; leave that part in float (--skip)"
        ) from error
    if not same and _equal(outputs, _outputs(copy.deepcopy(model).eval(), images)):
        raise RequestError(
            f"model: {type(model).__name__} must compute the same when it is traced by torch.fx, "
            "but gives other outputs: something in its forward looks at more than its input's "
            "values; leave that part in float (--skip)"
        )
    return net.train(model.training)


def source_of(path: str, module: nn.Module) -> str:
    """Return how messages call a module."""
    return f"layer {path!r} ({type(module).__name__})" if path else type(module).__name__


def _reason_of(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _skipped(model: nn.Module, skip: tuple[str, ...]) -> set[str]:
    """Return the paths of the outermost modules that match."""
    paths = [path for path, _ in model.named_modules() if path]
    for pattern in skip:
        if not any(_matches(path, (pattern,)) for path in paths):
            raise RequestError(
                f"model: skip: {pattern!r} must match a module; {nearest(pattern, paths)}"
            )
    found: set[str] = set()
    for path in paths:
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and _matches(path, skip):
            module = model.get_submodule(path)
            if not isinstance(module, nn.ModuleList | nn.ModuleDict):
                found.add(path)
            elif not all(_matches(f"{path}.{name}", skip) for name, _ in module.named_children()):
                raise _uncalled(path)
    return found


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _uncalled(path: str) -> RequestError:
    return RequestError(
        f"model: skip: {path!r} must be called as a module, but only what is in it is; "
        f"skip that: --skip {path + '.*'!r}"
    )


def _within(path: str, outer: set[str]) -> bool:
    return any(path == o or path.startswith(f"{o}.") for o in outer)


def _check_layers(model: nn.Module, whole: set[str]) -> None:
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise RequestError(
                f"model: {source_of(path, module)} is compiled by torch.jit, which cannot be "
                "followed, nor copied and trained: give the module it was made from"
            )
        if any(isinstance(hook, _COMPUTING) for hook in module._forward_pre_hooks.values()):
            raise RequestError(
                f"model: {source_of(path, module)} has a weight that a hook computes and that "
                "cannot be copied once it trains: call torch.nn.utils.remove_weight_norm, "
                "remove_spectral_norm or torch.nn.utils.prune.remove first"
            )
        if _within(path, whole):
            continue
        reason = _reason(module)
        if reason:
            raise RequestError(f"model: {source_of(path, module)} {reason}{_advice(path)}")


def _reason(module: nn.Module) -> str | None:
    """Return why a module cannot be quantized, or None."""
    kind = type(module)
    if isinstance(module, tuple(KINDS)):
        if parametrize.is_parametrized(module):
            return (
                "has a parametrized weight, whose formula would be lost: call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        base = next(k for k in KINDS if isinstance(module, k))
        if any(getattr(kind, name) is not getattr(base, name) for name in _COMPUTES[base]):
            return f"computes something else than torch's {base.__name__}"
    elif isinstance(module, _REFUSED):
        return f"cannot be quantized; what can is {', '.join(k.__name__ for k in KINDS)}"
    if isinstance(module, tuple(KINDS)) and (module._forward_hooks or module._forward_pre_hooks):
        return "has forward hooks, which would be lost: remove them"
    return None


_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that leave what they compute in the module, as a tensor with a history."""


_COMPUTES = {
    kind: [n for n in ("forward", "_conv_forward", "_output_padding") if hasattr(kind, n)]
    for kind in KINDS
}


def _advice(path: str) -> str:
    if not path:
        return "; move it into a module of its own, which can be left in float (--skip)"
    return f"; to leave it in float: --skip {path!r}, or QuantConfig(skip=({path!r},))"


INPUT_SHAPE = "sdq_input_shape"
"""Where a node's ``meta`` has the shape of what enters a module that is kept whole."""


def inside(module: nn.Module, shape: tuple[int, ...] | None) -> fx.GraphModule | None:
    """Return what a module that is kept whole does in evaluation; None if nothing can follow it.

    Args:
        module: left as it is.
        shape: of its input, if that is known.
    """
    root = copy.deepcopy(module).eval()
    with suppress(*TRACE_ERRORS):  # RequestError is a ValueError
        if shape is not None:
            tracer = _Tracer(torch.zeros(shape), set())
            return fx.GraphModule(root, tracer.trace(root))
    with suppress(*TRACE_ERRORS):
        return fx.symbolic_trace(root)
    return None


def has_layers(module: nn.Module) -> bool:
    """Tell whether a module is, or has in it, what is quantized or refused."""
    return any(isinstance(part, (*KINDS, *_REFUSED)) for part in module.modules())


def _check_names(model: nn.Module, whole: set[str]) -> None:
    """Refuse names that the code which torch.fx writes cannot have."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    for path in dict.fromkeys(path for path, _ in named if path):
        owner, _, name = path.rpartition(".")
        taken = not owner and (hasattr(fx.GraphModule, name) or name == "meta")
        if (taken or keyword.iskeyword(name)) and not _within(owner, whole):
            raise RequestError(
                f"model: {path!r} must have another name: torch.fx cannot use {name!r}; rename it"
            )


def _plain_layers_(root: nn.Module, whole: set[str]) -> None:
    """Let a layer of a subclass that computes what torch's class does be of that class.

    Padding by name becomes numbers where it is the same on both sides: onnxruntime does not know
    it for dilated convolutions.
    """
    for path, module in root.named_modules():
        base = next((kind for kind in KINDS if isinstance(module, kind)), None)
        if base is None or _within(path, whole):
            continue
        module.__class__ = base
        if isinstance(module, nn.Conv1d | nn.Conv2d) and isinstance(module.padding, str):
            named = zip(module.dilation, module.kernel_size, strict=True)
            both = [d * (k - 1) * (module.padding == "same") for d, k in named]
            if not any(total % 2 for total in both):
                module.padding = tuple(total // 2 for total in both)


# -------------------------------------------------------------------------- following the network


class _Untraceable(Exception):
    """Carries a refusal through torch.fx."""


class _KeptWhole(Exception):
    """Carries the path of a module that is to be kept whole."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


class _Tracer(fx.Tracer):
    """Follows a network with a sample at hand."""

    def __init__(self, sample: Tensor, whole: set[str]) -> None:
        super().__init__()
        self.sample, self.whole = sample, whole
        self.asked_mode: set[str] = set()
        self._values: list[dict[fx.Node, Any]] = [{}, {}]
        self._evaluating = self._classing = False
        self._failed_in = ""

    def trace(self, root: nn.Module, concrete_args: Any = None) -> fx.Graph:  # type: ignore[override]
        with self._watching(root):
            try:
                return super().trace(root, concrete_args)
            except _Untraceable as error:
                raise RequestError(str(error)) from None
            except TRACE_ERRORS as error:
                if self._failed_in and not has_layers(root.get_submodule(self._failed_in)):
                    raise _KeptWhole(self._failed_in) from error
                frames = traceback.extract_tb(error.__traceback__)
                places = [_place(f.filename, f.lineno or 0) for f in frames if _users(f.filename)]
                module = source_of(self._failed_in, root.get_submodule(self._failed_in))
                raise RequestError(
                    f"model: {module}{(places or [''])[-1]} cannot be traced by torch.fx: "
                    f"{_reason_of(error)}{_advice(self._failed_in)}"
                ) from error

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Give the network its one input; arguments with a default keep it."""
        return root_fn, [self.root, self.create_proxy("placeholder", "x", (), {})]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        leaf = super().is_leaf_module(m, module_qualified_name)
        inside = type(m) not in KINDS and has_layers(m)  # as in torch's own transformer layers
        return module_qualified_name in self.whole or (leaf and not inside)

    def create_arg(self, a: Any) -> Any:
        return a.node if isinstance(a, fx.Proxy) else super().create_arg(a)  # before any isinstance

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
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
            return isinstance(self._attribute(node), nn.Parameter)
        inputs = node.all_input_nodes
        calls = node.op in ("call_function", "call_method")
        return calls and bool(inputs) and all(self._of_parameters(read) for read in inputs)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
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
        if self._evaluating:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.concrete(obj.node, "a decision"))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
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
        except Exception:  # noqa: BLE001  what is wrong will show where it is computed
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
        raise _Untraceable(f"model: {source_of(path, module)}{place}: {rule}{_advice(path)}")

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
            return self._attribute(node)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _attribute(self, node: fx.Node) -> Any:
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


class _Concrete(fx.Proxy):
    """A value that Python may ask for a number, where it follows from shapes."""

    def _number(self) -> Any:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        return tracer.concrete(self.node, "a number")

    def __int__(self) -> int:
        return int(self._number())

    def __index__(self) -> int:
        return operator.index(self._number())

    def __float__(self) -> float:
        return float(self._number())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.asarray(self._number(), dtype)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self._number(), digits)

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __len__(self) -> int:
        tracer = self.tracer
        assert isinstance(tracer, _Tracer)
        return sum(1 for _ in tracer.iter(self))


class _Proxy(_Concrete):
    def __getattr__(self, name: str) -> Any:
        known = name in _SHAPE_ATTRIBUTES or name in _SHAPE_METHODS
        if self.node.op == "get_attr" and known and isinstance(self.tracer, _Tracer):
            return getattr(self.tracer._attribute(self.node), name)
        if name == "ndim":  # may be a key of a dict, and never changes
            return int(_Attribute(self, name))
        if name.startswith("__"):  # what NumPy and others look for does not exist
            raise AttributeError(name)
        return _Attribute(self, name)

    def dim(self) -> int:
        return int(_Attribute(self, "ndim"))

    @property  # type: ignore[misc]  # what isinstance asks
    def __class__(self) -> Any:
        return self.tracer.class_of(self) if isinstance(self.tracer, _Tracer) else type(self)


def _in_place(name: str) -> Callable[[_Proxy, Any], Any]:
    def method(x: _Proxy, other: Any) -> Any:
        if of_shapes(x.node):  # a number has no place
            return getattr(operator, name)(x, other)
        return x.tracer.create_proxy("call_function", getattr(operator, f"i{name}"), (x, other), {})

    return method


_IN_PLACE = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
for _name in _IN_PLACE:  # torch.fx has none: Python would take ``x += y`` for ``x = x + y``
    setattr(_Proxy, f"__i{_name}__", _in_place(_name))


class _Attribute(_Concrete, fx.proxy.Attribute):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Attribute(self, name)


_SHAPE_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"}
_SHAPE_METHODS = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous",
    "is_floating_point", "get_device",
}  # fmt: skip
_SHAPE_FUNCTIONS = {len, torch.numel, torch.is_floating_point}


def of_shapes(node: fx.Node) -> bool:
    """Tell whether a value follows from the shapes of tensors, whatever is in them."""
    if node.op == "call_function":
        if node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES:
            return True
        if node.target in _SHAPE_FUNCTIONS:
            return True
    elif node.op == "call_method":
        if node.target in _SHAPE_METHODS:
            return True
    else:
        return False
    return bool(node.all_input_nodes) and all(of_shapes(n) for n in node.all_input_nodes)


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


# ---------------------------------------------------------------------- the graph, once it is there


def _check_skipped(net: fx.GraphModule, skipped: set[str]) -> None:
    """Refuse to skip what is not called itself: only calls can be left as they are."""
    called = {str(node.target) for node in net.graph.nodes if node.op == "call_module"}
    for path in sorted(skipped):
        if any(call.startswith(f"{path}.") for call in called):
            raise _uncalled(path)


def _note_inputs_(net: fx.GraphModule, tracer: _Tracer) -> None:
    """Note the shape of what enters a module that is kept whole, for those who look into it."""
    for node in net.graph.nodes:
        if node.op == "call_module" and str(node.target) in tracer.whole:
            values = [tracer.evaluate(read) for read in node.all_input_nodes]
            if len(values) == 1 and isinstance(values[0], Tensor):
                node.meta[INPUT_SHAPE] = tuple(values[0].shape)


_IN_PLACE_OPERATORS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in _IN_PLACE}


def _out_of_place(net: fx.GraphModule) -> None:
    """Let whoever reads a tensor after it was changed in place read the result of the change.

    A quantizer that stands between the two would hide the change.
    """
    order = {node: i for i, node in enumerate(net.graph.nodes)}
    changing = {path: m for path, m in net.named_modules() if getattr(m, "inplace", False) is True}
    for node in net.graph.nodes:
        if node.op == "call_module":
            found = node.target in changing
        else:
            found = node.op in ("call_function", "call_method") and _replaced(node)
        changed = node.args[0] if node.args else node.kwargs.get("input")
        if not found or not isinstance(changed, fx.Node):
            continue
        for user in list(changed.users):
            if order[user] > order[node]:
                user.replace_input_with(changed, node)
    for module in changing.values():
        module.inplace = False
    net.recompile()


def _replaced(node: fx.Node) -> bool:
    """Replace a call that works in place by one that does not; tell whether it was one."""
    if node.op == "call_method":
        name = str(node.target)
        if not name.endswith("_") or name.endswith("__"):
            return False
        if callable(getattr(Tensor, name[:-1], None)):  # not zero_, copy_ and the like
            node.target = name[:-1]
        return True
    if node.target in _IN_PLACE_OPERATORS:
        node.target = _IN_PLACE_OPERATORS[node.target]
        return True
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    name = getattr(node.target, "__name__", "")
    plain = getattr(torch, name[:-1], getattr(nn.functional, name[:-1], None))
    if name.endswith("_") and not name.endswith("__") and callable(plain):
        node.target = plain
        return True
    return False


def _module_dropout(net: fx.GraphModule) -> None:
    """Turn ``F.dropout`` and its kin into modules: tracing has frozen their ``training``."""
    for node in list(net.graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            name = f"{node.name}_module"
            net.add_submodule(name, _DROPOUTS[node.target](p).eval())
            with net.graph.inserting_after(node):
                new = net.graph.call_module(name, tuple(node.all_input_nodes))
            node.replace_all_uses_with(new)
            net.graph.erase_node(node)
    net.recompile()


def _accepted(network: nn.Module, images: Tensor) -> list[Tensor]:
    try:
        return _outputs(network, images)
    except TRACE_ERRORS as error:
        raise RequestError(
            f"model: must accept a sample of shape {(1, *images.shape[1:])} (N, C, H, W), "
            f"but: {_reason_of(error)}"
        ) from error


@torch.no_grad()
def _outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    leaves = _pytree.tree_leaves(network(images.clone()))  # it may change its input in place
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(
        (a.shape, a.dtype) == (b.shape, b.dtype)
        and torch.allclose(a, b, rtol=0, atol=SAME * float(a.abs().max()) + math.ulp(0.0))
        for a, b in zip(ours, theirs, strict=True)
    )
