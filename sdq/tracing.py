"""From a network to a torch.fx graph that computes the same, or a refusal that says where and why.

What torch.fx cannot follow by itself and is followed here: decisions by the shape of a tensor,
taken as they fall for the sample; modules that ask whether they train, or do what torch.fx cannot
follow, kept whole where nothing in them is quantized; functional dropout; operations in place.
"""

import copy
import math
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from sdq.errors import RequestError
from sdq.refusals import (
    KINDS,
    check_layers,
    check_names,
    check_skipped,
    has_layers,
    skipped_modules,
    within,
)
from sdq.stand_ins import IN_PLACE
from sdq.tracer import TRACE_ERRORS, KeptWhole, Tracer, reason_of

_DROPOUTS: dict[Any, type[nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
    nn.functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}

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
    skipped = whole = skipped_modules(model, skip)
    check_layers(model, whole)
    check_names(model, whole)
    root = copy.deepcopy(model).eval()
    images = torch.rand(2, *sample.shape[1:], generator=torch.Generator().manual_seed(0)).to(sample)
    outputs = _accepted(root, images)
    _plain_layers_(root, whole)
    while True:
        tracer = Tracer(sample, whole)
        try:
            traced = tracer.trace(root)
        except KeptWhole as kept:  # torch.fx cannot follow it, and nothing in it is quantized
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
    check_skipped(net, skipped)
    _note_inputs_(net, tracer)
    _out_of_place(net)
    _module_dropout(net)
    _without_identities_(net, whole)
    net.eval()
    try:
        same = _equal(outputs, _outputs(net, images))
    except TRACE_ERRORS as error:
        raise RequestError(
            f"model: {type(model).__name__} must compute the same when it is traced by torch.fx, "
            f"but: {reason_of(error)}; leave that part in float (--skip)"
        ) from error
    if not same and _equal(outputs, _outputs(copy.deepcopy(model).eval(), images)):
        raise RequestError(
            f"model: {type(model).__name__} must compute the same when it is traced by torch.fx, "
            "but gives other outputs: something in its forward looks at more than its input's "
            "values; leave that part in float (--skip)"
        )
    return net.train(model.training)


def _accepted(network: nn.Module, images: Tensor) -> list[Tensor]:
    try:
        return _outputs(network, images)
    except TRACE_ERRORS as error:
        raise RequestError(
            f"model: must accept a sample of shape {(1, *images.shape[1:])} (N, C, H, W), "
            f"but: {reason_of(error)}"
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


def _plain_layers_(root: nn.Module, whole: set[str]) -> None:
    """Let a layer of a subclass that computes what torch's class does be of that class.

    Padding by name becomes numbers where it is the same on both sides: onnxruntime does not know
    it for dilated convolutions.
    """
    for path, module in root.named_modules():
        base = next((kind for kind in KINDS if isinstance(module, kind)), None)
        if base is None or within(path, whole):
            continue
        module.__class__ = base
        if isinstance(module, nn.Conv1d | nn.Conv2d) and isinstance(module.padding, str):
            named = zip(module.dilation, module.kernel_size, strict=True)
            both = [d * (k - 1) * (module.padding == "same") for d, k in named]
            if not any(total % 2 for total in both):
                module.padding = tuple(total // 2 for total in both)


INPUT_SHAPE = "sdq_input_shape"
"""Where a node's ``meta`` has the shape of what enters a module that is kept whole."""


def _note_inputs_(net: fx.GraphModule, tracer: Tracer) -> None:
    """Note the shape of what enters a module that is kept whole, for those who look into it."""
    for node in net.graph.nodes:
        if node.op == "call_module" and str(node.target) in tracer.whole:
            values = [tracer.evaluate(read) for read in node.all_input_nodes]
            if len(values) == 1 and isinstance(values[0], Tensor):
                node.meta[INPUT_SHAPE] = tuple(values[0].shape)


_IN_PLACE_OPERATORS = {getattr(operator, f"i{name}"): getattr(operator, name) for name in IN_PLACE}


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


def _without_identities_(net: fx.GraphModule, kept: set[str]) -> None:
    """Let a tensor that passes ``nn.Identity`` be one tensor: two would have two quantizers."""
    for node in list(net.graph.nodes):
        if node.op != "call_module" or str(node.target) in kept or len(node.args) != 1:
            continue
        if type(net.get_submodule(str(node.target))) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            net.graph.erase_node(node)
    net.recompile()


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
