"""Divide one labelled data set among clients."""

from collections.abc import Sequence

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


def in_shares(labels: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Give clients random parts of given sizes, with the set's mix of classes.

    Args:
        labels: int64 ``(N,)``.
        shares: one a client; they count by their proportions.
        seed: of which images a client gets.

    Returns:
        As :func:`by_shares`.

    Raises:
        RequestError: there is no share, or one is not positive and finite.
    """
    given = np.array(shares, dtype=float)
    if not len(given) or not (np.isfinite(given) & (given > 0)).all():
        raise RequestError(
            f"partition: shares must be positive and finite, got {list(shares)}; give one number "
            "for each client"
        )
    classes = int(labels.max()) + 1 if len(labels) else 0
    return by_shares(labels, np.tile(given / given.sum(), (classes, 1)), seed)


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
    return dirichlet_with_shares(labels, clients, alpha, seed, min_examples=min_examples)[0]


def dirichlet_with_shares(
    labels: Tensor, clients: int, alpha: float, seed: int, *, min_examples: int = 1
) -> tuple[list[Tensor], np.ndarray]:
    """Return what :func:`dirichlet` does, and the shares it drew, ``(classes, clients)``.

    Raises:
        RequestError: as of :func:`dirichlet`.
    """
    _check(labels, clients)
    if not 0 < alpha < float("inf"):
        raise RequestError(f"partition: alpha must be positive and finite, got {alpha}")
    rng = np.random.default_rng(seed)
    classes = labels.numpy()
    shares = np.full((classes.max() + 1, clients), 1 / clients)  # of classes without an image
    for _ in range(1000):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for c in np.unique(classes):
            members = rng.permutation(np.flatnonzero(classes == c))
            shares[c] = rng.dirichlet(np.full(clients, alpha))
            _deal(parts, members, shares[c])
        merged = _merged(parts)
        if min(map(len, merged)) >= min_examples:
            return merged, shares
    raise RequestError(
        f"partition: every client must get {min_examples} of {len(labels)} examples, but no draw "
        f"with alpha {alpha} and {clients} clients did; raise alpha or take fewer clients"
    )


def by_shares(labels: Tensor, shares: np.ndarray, seed: int) -> list[Tensor]:
    """Divide each class among the clients in given shares.

    Args:
        labels: int64 ``(N,)``.
        shares: ``(classes, clients)``, each row of sum 1. Classes beyond it are dealt evenly.
        seed: of which images a client gets.

    Returns:
        One sorted int64 index tensor a client; together they are 0..N-1, none twice. A client
        whose share comes to less than half an image may have none.
    """
    rng = np.random.default_rng(seed)
    classes = labels.numpy()
    parts: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(shares.shape[1])]
    evenly = np.full(shares.shape[1], 1 / shares.shape[1])
    for c in np.unique(classes):
        of_class = shares[c] if c < len(shares) else evenly
        _deal(parts, rng.permutation(np.flatnonzero(classes == c)), of_class)
    return _merged(parts)


def _deal(parts: list[list[np.ndarray]], members: np.ndarray, shares: np.ndarray) -> None:
    cuts = np.floor(np.cumsum(shares)[:-1] * len(members) + 0.5).astype(int)
    for part, chunk in zip(parts, np.split(members, cuts), strict=True):
        part.append(chunk)


def _merged(parts: list[list[np.ndarray]]) -> list[Tensor]:
    return [torch.from_numpy(np.sort(np.concatenate(part))) for part in parts]


def _check(labels: Tensor, clients: int) -> None:
    if not 1 <= clients <= len(labels):
        raise RequestError(
            f"partition: clients must be from 1 to the {len(labels)} examples, got {clients}"
        )
