"""Generalization and specialization, with metrics that do not hide the rare classes.

*Generalization* (G): the server's model on the test images of all clients together.
*Specialization* (S): each client's model, after its local training, on its own test images; their
mean, and the worst client. Figures of the two kinds are never mixed.

A client that never saw a class cannot have learned it, and its logit may win all the same. Masked
figures leave out, at test time, the classes that a client never trained on; both are reported, and
the plain ones count.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fl.losses import log_prior
from fl.method import View
from fl.network import Network
from sdq.batches import Loader
from sdq.metrics import classification_metrics, predict

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc")


class _Viewed(nn.Module):
    """A network with one way to predict, as a module."""

    def __init__(self, network: Network, view: View) -> None:
        super().__init__()
        self.network = network
        self.view = view

    def forward(self, images: Tensor) -> Tensor:
        return self.view(self.network, images)


def evaluate(
    network: Network,
    views: Mapping[str, View],
    loaders: Sequence[Loader],
    counts: Tensor,
    *,
    adjust: float = 0.0,
) -> dict[str, Any]:
    """Return metrics of each view, in each variant.

    Args:
        network: as it is.
        views: ways to predict, the one that counts first.
        loaders: of ``(images, labels)``; their images count together.
        counts: ``(classes,)``, the images of each class that the network was trained on: for the
            mask and the prior.
        adjust: see :func:`variants`.

    Returns:
        ``{view: {variant: metrics}}``; the first view and its ``plain`` variant are the result.
    """
    found = {}
    for name, view in views.items():
        logits, labels = predict(_Viewed(network, view), chain.from_iterable(loaders))
        found[name] = {
            variant: classification_metrics(changed, labels)
            for variant, changed in variants(logits, counts, adjust).items()
        }
    return found


def variants(logits: Tensor, counts: Tensor, adjust: float = 0.0) -> dict[str, Tensor]:
    """Return logits as they are and changed at test time.

    Args:
        logits: ``(N, classes)``.
        counts: ``(classes,)``, of the training images.
        adjust: tau of logit adjustment, 0 for none.

    Returns:
        ``plain``; ``masked``, if a class is absent from the training images; ``adjusted``,
        ``z - tau log prior`` with absent classes masked, if ``adjust`` is positive.

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, equation 9,
    https://arxiv.org/abs/2007.07314.
    """
    found = {"plain": logits}
    absent = counts <= 0
    if bool(absent.any()) and not bool(absent.all()):
        found["masked"] = logits.masked_fill(absent, -math.inf)
    if adjust > 0:
        # an absent class would gain 20.7 tau and win everywhere
        shifted = logits - adjust * log_prior(counts.clamp_min(0))
        found["adjusted"] = shifted.masked_fill(absent, -math.inf)
    return found


def primary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metrics that count: the first view's plain ones."""
    found: dict[str, Any] = next(iter(evaluation.values()))["plain"]
    return found


def specialization(evaluations: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """Return means over clients, and the worst client.

    Args:
        evaluations: by client, what :func:`evaluate` gives.

    Returns:
        The primary view's plain metrics (means over the clients for which they exist),
        ``per_class_recall`` likewise, ``worst_client`` and ``worst_balanced_accuracy``,
        ``clients`` (number and balanced accuracy of each), and ``views``: means of every view and
        variant. A client with no absent class counts with its plain figures where others have
        masked ones.
    """
    clients = sorted(evaluations)
    plain = {k: primary(evaluations[k]) for k in clients}
    worst = min(clients, key=lambda k: plain[k]["balanced_accuracy"])
    views: dict[str, dict[str, Any]] = {}
    for view in evaluations[clients[0]]:
        names = {v: None for k in clients for v in evaluations[k][view]}
        views[view] = {
            name: _means([evaluations[k][view].get(name, evaluations[k][view]["plain"])
                          for k in clients])
            for name in names
        }  # fmt: skip
    return {
        **_means(list(plain.values())),
        "worst_client": worst,
        "worst_balanced_accuracy": plain[worst]["balanced_accuracy"],
        "clients": {str(k): plain[k]["balanced_accuracy"] for k in clients},
        "views": views,
    }


def _means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    recalls = zip(*(m["per_class_recall"] for m in metrics), strict=True)
    return {
        **{name: _mean([m[name] for m in metrics]) for name in METRICS},
        "ece": _mean([m["ece"] for m in metrics]),
        "per_class_recall": [_mean(list(values)) for values in recalls],
        "num_examples": sum(m["num_examples"] for m in metrics),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(torch.tensor(known, dtype=torch.float64).mean()) if known else None
