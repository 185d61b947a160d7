"""Divide one labelled data set among clients."""

import numpy as np
import torch
from torch import Tensor

from sdq.errors import RequestError


def iid(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Give every client a random share of the same size (to within one example).

    Args:
        labels: int64 ``(N,)``.
        clients: number of clients, at most N.
        seed: of the shuffle.

    Returns:
        One sorted int64 index tensor a client; together they are 0..N-1, none twice.
    """
    _check(labels, clients)
    order = np.random.default_rng(seed).permutation(len(labels))
    return [torch.from_numpy(np.sort(part)) for part in np.array_split(order, clients)]


def dirichlet(
    labels: Tensor, clients: int, alpha: float, seed: int, *, min_examples: int = 1
) -> list[Tensor]:
    """Divide each class among the clients in shares drawn from a Dirichlet distribution.

    Args:
        labels: int64 ``(N,)``.
        clients: number of clients.
        alpha: concentration; small values give clients with few classes.
        seed: of the draw.
        min_examples: draw again until every client has at least so many.

    Returns:
        One sorted int64 index tensor a client; together they are 0..N-1, none twice.

    Raises:
        RequestError: alpha is not positive, or 1,000 draws leave a client with too few examples.

    Source: Hsu et al., 2019, section 3.1 (shares drawn class by class, as in Yurochkin et al.,
    ICML 2019), https://arxiv.org/abs/1909.06335.
    """
    _check(labels, clients)
    if not 0 < alpha < float("inf"):
        raise RequestError(f"partition: alpha must be positive and finite, got {alpha}")
    rng = np.random.default_rng(seed)
    classes = labels.numpy()
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in np.unique(classes):
            members = rng.permutation(np.flatnonzero(classes == c))
            shares = rng.dirichlet(np.full(clients, alpha))
            cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(int)
            for part, chunk in zip(parts, np.split(members, cuts), strict=True):
                part.append(chunk)
        merged = [np.sort(np.concatenate(part)) for part in parts]
        if min(map(len, merged)) >= min_examples:
            return [torch.from_numpy(part) for part in merged]
    raise RequestError(
        f"partition: every client must get {min_examples} of {len(labels)} examples, but no draw "
        f"with alpha {alpha} and {clients} clients did; raise alpha or take fewer clients"
    )


def _check(labels: Tensor, clients: int) -> None:
    if not 1 <= clients <= len(labels):
        raise RequestError(
            f"partition: clients must be from 1 to the {len(labels)} examples, got {clients}"
        )
