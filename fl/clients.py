"""A data set with its parts, divided among clients: each gets train, val and test images.

The set's own parts are kept: a client's training images are training images of the set, and its
test images test images, so that whoever measures the server's model on the set's test part
measures it on images that no client trained on. Val and test are divided in the shares in which
train was: a client is tested on the mix of classes it has.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fl import count_tables
from fl.method import ClientData
from fl.partition import by_shares, dirichlet_with_shares, iid, in_shares
from sdq.data import ImageSet, Splits, divide
from sdq.errors import RequestError

HELD_OUT = 0.2
"""Share of a client's images that is held out for a part that the set lacks."""

VALIDATION = 0.1

Divide = Callable[[ImageSet], list[Tensor]]


@dataclass(frozen=True)
class Partition:
    """How a set is divided.

    Args:
        kind: ``natural``, by centre; ``iid``; ``dirichlet``; ``counts``, as a published federation.
        alpha: of ``dirichlet``.
        table: of ``counts``, see :mod:`fl.count_tables`.
        shares: of ``iid``, one a client, by their proportions; none for clients of one size.
    """

    kind: Literal["natural", "iid", "dirichlet", "counts"]
    alpha: float = math.nan
    table: str = ""
    shares: tuple[float, ...] = ()

    @classmethod
    def parsed(cls, text: str) -> "Partition":
        """Read ``natural``, ``iid``, ``iid:1,4,5``, ``dirichlet:0.3`` or ``counts:ich10``.

        Raises:
            RequestError: it is none of them.

        >>> Partition.parsed("dirichlet:0.3").alpha
        0.3
        """
        kind, _, value = text.partition(":")
        if kind == "natural" and not value:
            return cls("natural")
        if kind == "iid" and not value:
            return cls("iid")
        if kind == "counts" and value in count_tables.TABLES:
            return cls("counts", table=value)
        try:
            if kind == "dirichlet":
                return cls("dirichlet", alpha=float(value))
            if kind == "iid" and value:
                return cls("iid", shares=tuple(map(float, value.split(","))))
        except ValueError:
            pass  # the sentence below says what it must be
        tables = ", ".join(f"counts:{name}" for name in count_tables.TABLES)
        raise RequestError(
            "--partition: must be natural, iid, iid:SHARE,SHARE,..., dirichlet:ALPHA or one of "
            f"{tables}, got {text!r}"
        )


def clients_of(
    splits: Splits, partition: Partition, clients: int | None, seed: int
) -> list[ClientData]:
    """Divide a set among clients.

    Args:
        splits: the set; for ``natural`` it must say which centre each image is from. Images of
            which that is not known are left out.
        partition: how.
        clients: how many; None where the partition says it.
        seed: of the division.

    Returns:
        The clients. One may have no images of a part, but all of them together have some to train
        on. Parts that the set lacks are held out from each client's training images.

    Raises:
        RequestError: the set or the number does not go with the partition.
    """
    divide_part, names = _division(splits, partition, clients, seed)
    parts = {
        name: [images.subset(i).plain() for i in divide_part(images)]
        for name, images in (("train", splits.train), ("val", splits.val), ("test", splits.test))
        if images is not None
    }
    nothing: list[ImageSet | None] = [None] * len(names)
    made = zip(
        names, parts["train"], parts.get("val", nothing), parts.get("test", nothing), strict=True
    )
    return [_with_held_out(ClientData(*client), splits, seed) for client in made]


def _division(
    splits: Splits, partition: Partition, clients: int | None, seed: int
) -> tuple[Divide, tuple[str, ...]]:
    """Return what divides a part into one index tensor a client, and the clients' names."""
    if partition.kind == "natural":
        names = splits.centre_names
        if splits.train.centres is None or not names:
            raise RequestError(
                "--partition natural: data must say which centre each image is from, got none; "
                "give --clients SPLIT.csv, a CSV with a column centre, or another partition"
            )
        _check_number(partition.kind, clients, len(names))
        return (lambda images: _by_centre(images, len(names))), names
    labels = splits.train.labels
    if partition.kind == "counts":
        shares = count_tables.shares(partition.table, labels)
        _check_number(f"counts:{partition.table}", clients, shares.shape[1])
        names = count_tables.CENTRES.get(partition.table) or _numbered(shares.shape[1])
        return (lambda images: by_shares(images.labels, shares, seed)), names
    if partition.shares:
        _check_number("iid:SHARE,...", clients, len(partition.shares))
        names = _numbered(len(partition.shares))
        return (lambda images: in_shares(images.labels, partition.shares, seed)), names
    if clients is None:
        raise RequestError("--clients: must say how many, for this partition; pass --clients N")
    if partition.kind == "iid":
        iid(labels, clients, seed)  # refuses a number that is too large
        return (lambda images: _dealt(len(images), clients, seed)), _numbered(clients)
    train, shares = dirichlet_with_shares(labels, clients, partition.alpha, seed)

    def by_drawn_shares(images: ImageSet) -> list[Tensor]:
        return train if images is splits.train else by_shares(images.labels, shares, seed)

    return by_drawn_shares, _numbered(clients)


def _numbered(clients: int) -> tuple[str, ...]:
    return tuple(f"client {k}" for k in range(clients))


def _check_number(kind: str, given: int | None, has: int) -> None:
    if given not in (None, has):
        raise RequestError(
            f"--clients: must be {has} for --partition {kind}, got {given}; leave it out"
        )


def _by_centre(images: ImageSet, centres: int) -> list[Tensor]:
    of = images.centres if images.centres is not None else torch.full((len(images),), -1)
    return [(of == c).nonzero()[:, 0] for c in range(centres)]


def _dealt(count: int, clients: int, seed: int) -> list[Tensor]:
    """Deal images out at random; where there are fewer than clients, some get none."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.tensor_split(clients)]


def _or_none(images: ImageSet | None) -> ImageSet | None:
    return images if images is not None and len(images) else None


def _with_held_out(client: ClientData, splits: Splits, seed: int) -> ClientData:
    """Hold out training images for the parts that the set lacks."""
    train, test, val = client.train, client.test, client.val
    if splits.test is None and len(train):
        keep, held = divide(train.labels, (1 - HELD_OUT, HELD_OUT), seed)
        train, test = train.subset(keep), train.subset(held)
    if splits.val is None and len(train):
        keep, held = divide(train.labels, (1 - VALIDATION, VALIDATION), seed + 1)
        train, val = train.subset(keep), train.subset(held)
    return replace(client, train=train, val=_or_none(val), test=_or_none(test))
