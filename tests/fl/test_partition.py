"""Dividing one set among clients: a partition, of the right shape, repeatable."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fl.partition import by_shares, dirichlet, dirichlet_with_shares, iid, in_shares
from sdq.errors import RequestError


def labels(n: int, classes: int, seed: int = 0) -> Tensor:
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def is_partition(parts: list[Tensor], count: int) -> None:
    assert torch.cat(parts).sort().values.tolist() == list(range(count))
    for part in parts:
        assert part.dtype == torch.int64
        assert part.tolist() == sorted(part.tolist())


@settings(deadline=None)
@given(n=st.integers(1, 200), clients=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_iid_is_a_partition_into_equal_parts(n: int, clients: int, seed: int) -> None:
    clients = min(clients, n)
    parts = iid(labels(n, 3), clients, seed)
    assert len(parts) == clients
    is_partition(parts, n)
    sizes = [len(p) for p in parts]
    assert max(sizes) - min(sizes) <= 1


def test_shares_are_of_every_class() -> None:
    y = torch.arange(300) % 3
    parts = in_shares(y, [1, 4, 5], 0)
    is_partition(parts, 300)
    assert [y[p].bincount().tolist() for p in parts] == [[10] * 3, [40] * 3, [50] * 3]
    again, other = in_shares(y, [0.1, 0.4, 0.5], 0), in_shares(y, [1, 4, 5], 1)
    assert all(map(torch.equal, parts, again))
    assert not torch.equal(parts[0], other[0])


@pytest.mark.parametrize("shares", [[], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_shares_that_are_none(shares: list[float]) -> None:
    with pytest.raises(RequestError, match="shares must be positive and finite"):
        in_shares(labels(10, 2), shares, 0)


def test_iid_shuffles() -> None:
    a, b = iid(labels(1000, 2), 2, 0), iid(labels(1000, 2), 2, 1)
    assert not torch.equal(a[0], b[0])
    assert torch.equal(a[0], iid(labels(1000, 2), 2, 0)[0])
    # half of the first part from each half of the set: five deviations of a hypergeometric
    assert abs(int((a[0] < 500).sum()) - 250) < 5 * np.sqrt(1000 / 16)


@settings(deadline=None)
@given(
    n=st.integers(30, 200),
    clients=st.integers(1, 5),
    alpha=st.floats(0.3, 100),
    seed=st.integers(0, 2**31),
)
def test_dirichlet_is_a_partition(n: int, clients: int, alpha: float, seed: int) -> None:
    parts = dirichlet(labels(n, 4), clients, alpha, seed)
    assert len(parts) == clients
    is_partition(parts, n)
    assert min(map(len, parts)) >= 1


def test_dirichlet_repeats_with_its_seed() -> None:
    y = labels(500, 5)
    first, again, other = (dirichlet(y, 4, 0.3, seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def shares(y: Tensor, parts: list[Tensor], classes: int) -> np.ndarray:
    counts = np.stack([np.bincount(y[p].numpy(), minlength=classes) for p in parts])
    return counts / counts.sum(axis=0)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 10.0])
def test_shares_have_the_moments_of_the_dirichlet_distribution(alpha: float) -> None:
    clients, classes = 5, 40
    y = torch.arange(classes).repeat_interleave(200)
    drawn = np.concatenate(
        [shares(y, dirichlet(y, clients, alpha, seed), classes).ravel() for seed in range(10)]
    )
    # mean 1 / m exactly (each class is divided whole), variance (m - 1) / (m^2 (m alpha + 1))
    assert drawn.mean() == pytest.approx(1 / clients)
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    # 2,000 shares: the variance is known to some 5 %; rounding to 1 / 200 adds 2e-6
    assert drawn.var() == pytest.approx(variance, rel=0.2)


def test_small_alpha_gives_clients_few_classes() -> None:
    y = labels(4000, 10)
    effective = {}
    for alpha in (0.05, 100.0):
        parts = dirichlet(y, 5, alpha, 0)
        mixes = np.stack([np.bincount(y[p].numpy(), minlength=10) / len(p) for p in parts])
        entropy = -(mixes * np.log(np.maximum(mixes, 1e-12))).sum(1)
        effective[alpha] = float(np.exp(entropy).mean())
    assert effective[0.05] < 5
    assert effective[100.0] > 9.5


def test_every_client_gets_its_minimum() -> None:
    y = labels(400, 4)
    assert min(map(len, dirichlet(y, 5, 0.3, 0, min_examples=30))) >= 30


def test_an_impossible_division_is_refused() -> None:
    with pytest.raises(RequestError, match=r"every client must get 21 of 100 examples.*alpha 1"):
        dirichlet(labels(100, 2), 5, 1.0, 0, min_examples=21)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_is_positive(alpha: float) -> None:
    with pytest.raises(RequestError, match="alpha must be positive"):
        dirichlet(labels(10, 2), 2, alpha, 0)


@pytest.mark.parametrize("clients", [0, -1, 11])
def test_there_are_no_more_clients_than_examples(clients: int) -> None:
    with pytest.raises(RequestError, match="clients must be from 1 to the 10 examples"):
        iid(labels(10, 2), clients, 0)
    with pytest.raises(RequestError, match="clients must be from 1 to the 10 examples"):
        dirichlet(labels(10, 2), clients, 1.0, 0)


def test_a_class_that_training_images_lack_is_dealt_evenly() -> None:
    train, test = torch.tensor([0, 2] * 20), torch.tensor([0, 1, 2, 3] * 6)
    shares = dirichlet_with_shares(train, 3, 0.5, 0)[1]
    for seed in range(3):
        parts = by_shares(test, shares, seed)
        is_partition(parts, len(test))
        for missing in (1, 3):
            assert [int((test[part] == missing).sum()) for part in parts] == [2, 2, 2]
