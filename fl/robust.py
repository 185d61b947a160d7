"""Means that a few wrong clients cannot move far, and updates that are far too large.

A median or a trimmed mean is taken of each number by itself, and every client counts the same:
whoever may say how much it counts could say so much that it is the median.

Source: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates",
ICML 2018, definitions 1 and 2, https://arxiv.org/abs/1803.01498.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from fl.record import Failure, Reply, Tensors

HARDLY = 1e-3
"""Part of a model's norm below which no change is large: about the precision of a float16."""


@dataclass(frozen=True)
class Aggregation:
    """How several clients' numbers become one.

    Args:
        kind: ``mean``, weighted; ``median``; ``trimmed_mean``.
        share: of ``trimmed_mean``: the part of the clients that is cut off at either end, see
            :func:`robust_mean`.
    """

    kind: Literal["mean", "median", "trimmed_mean"]
    share: float = 0.0

    @classmethod
    def parsed(cls, text: str) -> "Aggregation":
        """Read ``mean``, ``median`` or ``trimmed_mean:0.2``; ValueError if it is none.

        >>> Aggregation.parsed("trimmed_mean:0.2").share
        0.2
        """
        kind, colon, share = text.partition(":")
        if kind in ("mean", "median") and not colon:
            return cls(kind)  # type: ignore[arg-type]
        try:
            cut = float(share)
        except ValueError:
            cut = math.nan
        if kind == "trimmed_mean" and 0 < cut < 0.5:
            return cls("trimmed_mean", cut)
        raise ValueError("must be mean, median or trimmed_mean:SHARE with a share in (0, 0.5)")


def robust_mean(
    states: Sequence[Mapping[str, Tensor]], rule: Aggregation, geometric: Sequence[str] = ()
) -> Tensors:
    """Return the median or trimmed mean of tensors by name.

    Of an even number of clients the median is the mean of the two in the middle. ``trimmed_mean``
    cuts off ``int(share * clients)`` at either end, but at least one of three clients or more: with
    none cut off it would be the plain mean. Tensors that are not floating-point are the
    median, the lower of two.

    Args:
        states: of equal names, shapes and dtypes.
        rule: which.
        geometric: see :func:`fl.state.weighted_mean`.
    """
    found: Tensors = {}
    count = len(states)
    most = (count - 1) // 2
    # as decimals have it: 0.29 of 100 are 29
    cut = most if rule.kind == "median" else min(most, max(1, int(rule.share * count + 1e-9)))
    for name, first in states[0].items():
        values = torch.stack([s[name] for s in states])  # (clients, ...)
        if not first.is_floating_point():
            # torch has no median of truth values
            found[name] = values.long().median(0).values.to(first.dtype)
            continue
        in_log = any(fnmatchcase(name, pattern) for pattern in geometric)
        values = values.double().log() if in_log else values.double()
        mean = values.sort(0).values[cut : count - cut].mean(0)
        found[name] = (mean.exp() if in_log else mean).to(first.dtype)
    return found


def too_large(
    replies: Sequence[Reply],
    sent: Mapping[int, Mapping[str, Tensor]],
    images: Mapping[int, float],
    names: Iterable[str],
    factor: float,
) -> list[Failure]:
    """Return the clients whose change is far larger than those of the others.

    A change's size is its Euclidean norm. It may be ``factor`` times the median of this round's,
    and for a client with more images than the median client as many times that: it takes as many
    times the steps. Of two medians the lower counts, so that of two clients either may be refused.
    Where most clients hardly move, having learned all they can, the median is taken for
    ``HARDLY`` of the model's norm.

    Args:
        replies: with the clients' models.
        sent: by client, what it started from.
        images: by client, how many it has, as it told before the first round.
        names: of the tensors that are compared.
        factor: see above.
    """
    if not replies:
        return []
    names = list(names)
    norms = torch.tensor([change_norm(r.model, sent[r.client], names) for r in replies])
    # counts that are told with noise may be 0
    counts = torch.tensor([images.get(r.client, 1.0) for r in replies]).clamp_min(1)
    started = sent[replies[0].client]
    still = {n: torch.zeros_like(started[n]) for n in names}
    typical = max(float(norms.median()), HARDLY * change_norm(started, still, names))
    allowed = factor * typical * (counts / counts.median()).clamp_min(1)
    return [
        Failure(
            reply.client,
            f"its change of the model has a norm of {norm:.3g}; with the median client's "
            f"{float(norms.median()):.3g} at most {limit:.3g} is accepted (max_update_ratio "
            f"{factor:g})",
        )
        for reply, norm, limit in zip(replies, norms.tolist(), allowed.tolist(), strict=True)
        if norm > limit
    ]


def change_norm(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], names: Iterable[str]
) -> float:
    """Return the norm of a change, of all tensors together."""
    return math.sqrt(sum(float((after[n] - before[n]).double().square().sum()) for n in names))
