"""Which tensors travel, and how those of several clients become one.

Every tensor of a network has a route. A method names the routes of its kind; the batch-norm policy
is one decision for the whole federation and goes before it.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl.record import Tensors

BatchNormPolicy = Literal["share_all", "share_affine", "local_stats", "local_all"]


class Route(StrEnum):
    """Where a tensor goes.

    ``SHARE``: up and down. ``UPLOAD``: up, for the server's model, but the client goes on with its
    own. ``LOCAL``: it stays with the client. ``HIGH_FREQUENCY_LOCAL``: up and down, but what comes
    down has the client's own high frequencies (the method's aggregation sees to that).
    """

    SHARE = "share"
    UPLOAD = "upload"
    LOCAL = "local"
    HIGH_FREQUENCY_LOCAL = "high_frequency_local"

    @property
    def goes_up(self) -> bool:
        """Tell whether the client sends it."""
        return self is not Route.LOCAL

    @property
    def comes_down(self) -> bool:
        """Tell whether the client receives it."""
        return self in (Route.SHARE, Route.HIGH_FREQUENCY_LOCAL)


def routes(
    network: nn.Module, of_method: Callable[[str], Route], policy: BatchNormPolicy
) -> dict[str, Route]:
    """Return the route of every tensor of a network's state.

    Args:
        network: its ``state_dict`` names the tensors.
        of_method: the method's route of a name.
        policy: of batch normalisation: ``share_all`` leaves factors and statistics to the method;
            ``share_affine``: factors as the method says, each client keeps its own statistics and
            they go up for the server's model alone; ``local_stats``: the same, but they do not
            go up in a round; ``local_all``: factors and statistics do not. A tensor that the
            method keeps local is never sent by a policy. For the evaluation of the server's model
            what is kept so is asked for, unless the federation's ``assemble`` is false.
    """
    affine, statistics = norm_names(network)
    found = {}
    for name in network.state_dict():
        route = of_method(name)
        if route is not Route.LOCAL and policy != "share_all":
            if name in statistics:
                route = Route.UPLOAD if policy == "share_affine" else Route.LOCAL
            elif name in affine and policy == "local_all":
                route = Route.LOCAL
        found[name] = route
    return found


def norm_names(network: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of batch normalisation's factors, and of its statistics."""
    affine: set[str] = set()
    statistics: set[str] = set()
    for path, module in network.named_modules():
        if isinstance(module, _BatchNorm):
            prefix = f"{path}." if path else ""
            affine |= {prefix + n for n, _ in module.named_parameters(recurse=False)}
            statistics |= {prefix + n for n, _ in module.named_buffers(recurse=False)}
    return affine, statistics


def weighted_mean(
    states: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    geometric: Sequence[str] = (),
) -> Tensors:
    r"""Return the mean of tensors by name, :math:`\sum_k w_k t_k / \sum_k w_k`.

    Sums run in float64, in the order given. Tensors that are not floating-point are not averaged:
    they are those of the state with the greatest weight, the first of equals.

    Args:
        states: of equal names, shapes and dtypes.
        weights: not negative, of positive sum.
        geometric: patterns of names of positive tensors whose logarithms are averaged, such as a
            quantizer's scales. (A bitwidth parameter is a log-odds already: its plain mean is it.)
    """
    total = float(sum(weights))
    first = max(range(len(weights)), key=lambda k: (weights[k], -k))
    mean: Tensors = {}
    for name, tensor in states[0].items():
        if not tensor.is_floating_point():
            mean[name] = states[first][name].clone()
            continue
        in_log = any(fnmatchcase(name, pattern) for pattern in geometric)
        found = torch.zeros_like(tensor, dtype=torch.float64)
        for state, weight in zip(states, weights, strict=True):
            value = state[name].double()
            found += (value.log() if in_log else value) * (weight / total)
        mean[name] = (found.exp() if in_log else found).to(tensor.dtype)
    return mean


def moving_names(network: nn.Module, geometric: Sequence[str]) -> set[str]:
    """Return the parameters to which a change may be added.

    They are no statistics: a variance with momentum, or with what rounding or noise does to it,
    could become negative. What is averaged in logarithms (``geometric``) could too.
    """
    return {
        name
        for name, parameter in network.named_parameters()
        if parameter.is_floating_point()
        and not any(fnmatchcase(name, pattern) for pattern in geometric)
    }


def load_(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into a network by name; those not named stay."""
    state = network.state_dict()
    with torch.no_grad():
        for name, tensor in tensors.items():
            state[name].copy_(tensor)
