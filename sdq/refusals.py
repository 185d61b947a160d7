"""Which modules are quantized, which are refused, and what a refusal says.

A refusal names a layer by path and type, and the option that leaves it in float.
"""

import keyword
from fnmatch import fnmatchcase

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sdq.errors import RequestError, nearest

KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.Linear: "linear",
}
"""Layers that are quantized."""

REFUSED = (
    nn.Conv3d, nn.ConvTranspose3d, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
    nn.Embedding, nn.EmbeddingBag, LazyModuleMixin,
)  # fmt: skip

_COMPUTES = {
    kind: [n for n in ("forward", "_conv_forward", "_output_padding") if hasattr(kind, n)]
    for kind in KINDS
}

_COMPUTING = (WeightNorm, SpectralNorm, BasePruningMethod)
"""Hooks that leave what they compute in the module, as a tensor with a history."""


def source_of(path: str, module: nn.Module) -> str:
    """Return how messages call a module."""
    return f"layer {path!r} ({type(module).__name__})" if path else type(module).__name__


def advice(path: str) -> str:
    """Return the end of a refusal: how to leave a module in float."""
    if not path:
        return "; move it into a module of its own, which can be left in float (--skip)"
    return f"; to leave it in float: --skip {path!r}, or QuantConfig(skip=({path!r},))"


def has_layers(module: nn.Module) -> bool:
    """Tell whether a module is, or has in it, what is quantized or refused."""
    return any(isinstance(part, (*KINDS, *REFUSED)) for part in module.modules())


def skipped_modules(model: nn.Module, skip: tuple[str, ...]) -> set[str]:
    """Return the paths of the outermost modules that match.

    Raises:
        RequestError: a pattern matches nothing, or a list of modules of which only some match.
    """
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


def within(path: str, outer: set[str]) -> bool:
    """Tell whether a path is one of others, or inside one."""
    return any(path == o or path.startswith(f"{o}.") for o in outer)


def check_layers(model: nn.Module, whole: set[str]) -> None:
    """Refuse the first layer outside ``whole`` that cannot be quantized."""
    for name, parameter in model.named_parameters():
        if parameter.dtype in (torch.float16, torch.bfloat16):
            raise RequestError(
                f"model: {name} must be float32, got {parameter.dtype}, in which scales and "
                "rounding are too coarse: call model.float() first"
            )
    for path, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" and hasattr(module, "_orig_mod"):
            raise RequestError(
                f"model: {path or 'it'} is compiled by torch.compile, which cannot be followed: "
                "give the module it was made from (model._orig_mod)"
            )
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
        if within(path, whole):
            continue
        reason = _reason(module)
        if reason:
            raise RequestError(f"model: {source_of(path, module)} {reason}{advice(path)}")


def _reason(module: nn.Module) -> str | None:
    """Return why a module cannot be quantized, or None."""
    kind = type(module)
    if isinstance(module, LazyModuleMixin):
        return "has no shape until it has run: pass a sample through the network first"
    if isinstance(module, tuple(KINDS)):
        if parametrize.is_parametrized(module):
            return (
                "has a parametrized weight, whose formula would be lost: call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        base = next(k for k in KINDS if isinstance(module, k))
        if any(getattr(kind, name) is not getattr(base, name) for name in _COMPUTES[base]):
            return f"computes something else than torch's {base.__name__}"
    elif isinstance(module, REFUSED):
        return f"cannot be quantized; what can is {', '.join(k.__name__ for k in KINDS)}"
    if isinstance(module, tuple(KINDS)) and (module._forward_hooks or module._forward_pre_hooks):
        return "has forward hooks, which would be lost: remove them"
    return None


def check_names(model: nn.Module, whole: set[str]) -> None:
    """Refuse names that the code which torch.fx writes cannot have."""
    named = (*model.named_modules(), *model.named_parameters(), *model.named_buffers())
    for path in dict.fromkeys(path for path, _ in named if path):
        owner, _, name = path.rpartition(".")
        taken = not owner and (hasattr(fx.GraphModule, name) or name == "meta")
        if (taken or keyword.iskeyword(name)) and not within(owner, whole):
            raise RequestError(
                f"model: {path!r} must have another name: torch.fx cannot use {name!r}; rename it"
            )


def check_skipped(net: fx.GraphModule, skipped: set[str]) -> None:
    """Refuse to skip what is not called itself: only calls can be left as they are."""
    called = {str(node.target) for node in net.graph.nodes if node.op == "call_module"}
    for path in sorted(skipped):
        if any(call.startswith(f"{path}.") for call in called):
            raise _uncalled(path)
