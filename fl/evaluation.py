"""Generalization and specialization, with metrics that do not hide the rare classes.

*Generalization* (G): the server's model on the test images of all clients together.
*Specialization* (S): each client's model, after its local training, on its own test images; their
mean, and the worst client. Figures of the two kinds are never mixed.

A client that never saw a class cannot have learned it, and its logit may win all the same. Masked
figures leave out, at test time, the classes that a client never trained on; both are reported, and
the plain ones count. Segmentation has neither variants nor absent classes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fl.losses import log_prior
from fl.method import View
from fl.network import Network
from sdq.batches import Loader
from sdq.data import TaskName
from sdq.metrics import predict
from sdq.task import CLASSIFICATION, task_of

MAIN: dict[TaskName, str] = {"classification": "balanced_accuracy", "segmentation": "dice"}
"""The metric by which rounds and clients are compared."""
MASK_METRICS = ("dice", "iou", "hd95")
"""What is reported of each client in segmentation."""


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
    loaders: Mapping[int, Loader],
    counts: Tensor,
    *,
    adjust: float = 0.0,
    by_client: bool = False,
) -> dict[str, Any]:
    """Return metrics of each view, in each variant.

    Args:
        network: as it is.
        views: ways to predict, the one that counts first.
        loaders: of ``(images, labels)``, by client; their images count together.
        counts: ``(classes,)``, the images of each class that the network was trained on: for the
            mask and the prior.
        adjust: see :func:`variants`.
        by_client: in segmentation, report :data:`MASK_METRICS` of each client's images too.

    Returns:
        ``{view: {variant: metrics}}``; the first view and its ``plain`` variant are the result. By
        client, metrics have ``clients``, and ``client_mean`` over them.
    """
    found = {}
    for name, view in views.items():
        parts = {k: predict(_Viewed(network, view), loader) for k, loader in loaders.items()}
        logits, labels = (torch.cat(each) for each in zip(*parts.values(), strict=True))
        task = task_of(logits)
        classifying = task is CLASSIFICATION
        changed = variants(logits, counts, adjust) if classifying else {"plain": logits}
        found[name] = {variant: task.metrics(z, labels) for variant, z in changed.items()}
        if by_client and not classifying:
            each = {str(k): of_masks(task.metrics(*part)) for k, part in parts.items()}
            mean = _means(list(each.values()))
            found[name]["plain"] |= {"clients": each, "client_mean": mean}
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
        lists likewise, ``worst_client`` and ``worst_balanced_accuracy``, ``clients`` (number and
        balanced accuracy of each), and ``views``: means of every view and variant. A client with
        no absent class counts with its plain figures where others have masked ones. In
        segmentation it is ``worst_dice``, and ``clients`` has :data:`MASK_METRICS` of each.
    """
    clients = sorted(evaluations)
    plain = {k: primary(evaluations[k]) for k in clients}
    segmenting = MAIN["segmentation"] in plain[clients[0]]
    main = MAIN["segmentation" if segmenting else "classification"]
    worst = min(clients, key=lambda k: plain[k][main])
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
        f"worst_{main}": plain[worst][main],
        "clients": {
            str(k): of_masks(plain[k]) if segmenting else plain[k][main] for k in clients
        },
        "views": views,
    }  # fmt: skip


def of_masks(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the metrics that are reported of each client in segmentation."""
    return {name: metrics[name] for name in MASK_METRICS}


def _means(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return means of numbers and, place by place, of lists; images are added up."""
    found: dict[str, Any] = {}
    for name, first in metrics[0].items():
        values = [m[name] for m in metrics]
        if name == "num_examples":
            found[name] = sum(values)
        elif isinstance(first, list):
            found[name] = [_mean(each) for each in zip(*values, strict=True)]
        else:
            found[name] = _mean(values)
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(torch.tensor(known, dtype=torch.float64).mean()) if known else None
