"""Weights that a user gives: whether they fit the network, and what to do if they do not."""

import torch
from torch import Tensor, nn

from sdq.errors import RequestError


def load_weights_(
    model: nn.Module, tensors: dict[str, Tensor], where: str, classes: int | None = None
) -> None:
    """Load a state dict that must fit exactly; RequestError names the first tensor that does not.

    Wrappers' prefixes (``module.`` of DataParallel) are removed.

    Args:
        model: changed in place.
        tensors: by name.
        where: they come from, for messages.
        classes: of the data that the network was built for, if it was.
    """
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    own = model.state_dict()
    counters = {name for name in own if name.endswith("num_batches_tracked")}
    missing = sorted(set(own) - set(tensors) - counters)
    unknown = sorted(set(tensors) - set(own))
    if missing or unknown:
        first = f"no {missing[0]!r}" if missing else f"{unknown[0]!r}, which the network has not"
        raise RequestError(
            f"{where}: must hold the weights of this architecture, but has {first} "
            f"({len(missing)} missing, {len(unknown)} unknown); name the --model they belong to"
        )
    _check_shapes(own, tensors, where, classes)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RequestError(
                f"{where}: {name!r} must be finite, got NaN or infinity; train it again"
            )
    model.load_state_dict({**{name: own[name] for name in counters}, **tensors})


def _check_shapes(
    own: dict[str, Tensor], tensors: dict[str, Tensor], where: str, classes: int | None
) -> None:
    wrong = [name for name, tensor in tensors.items() if tensor.shape != own[name].shape]
    if not wrong:
        return
    repair = "check the number of classes and channels"
    pairs = [(own[name].shape, tensors[name].shape) for name in wrong]
    counts = {theirs[:1] for _, theirs in pairs}
    heads = all(ours[:1] == (classes,) and ours[1:] == theirs[1:] for ours, theirs in pairs)
    if classes is not None and heads and len(counts) == 1:
        ((others,),) = counts
        repair = (
            f"the data have {classes} classes and these weights {others}: give data of {others} "
            f"classes, or first train a head of {classes} with `sdq train --model "
            f"FILE.py:FUNCTION`, whose function loads all but {', '.join(map(repr, wrong))} "
            "(docs/networks.md)"
        )
    name = wrong[0]
    raise RequestError(
        f"{where}: {name!r} must have shape {tuple(own[name].shape)}, "
        f"got {tuple(tensors[name].shape)}; {repair}"
    )
