"""Who has which images: as `sdq federate` was asked, and again as a run of it says."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fl.clients import Partition, clients_of
from fl.method import ClientData, Supervision
from fl.supervision import parsed, weakened
from sdq.data import Splits
from sdq.errors import RequestError


@dataclass(frozen=True)
class ClientRequest:
    """What was said about the clients: how many there are, or whose each image is."""

    number: int | None
    split_file: str | None
    partition: Partition

    @classmethod
    def of(cls, clients: str | None, partition: str | None) -> "ClientRequest":
        """Read ``--clients`` and ``--partition``.

        A ``SPLIT.csv`` says everything. Without ``--partition`` the images are dealt out at random
        among N clients, or, without a number, divided by the centres that the data name.

        Raises:
            RequestError: they contradict each other, or there is no such file.
        """
        if clients is None:
            return cls(None, None, Partition.parsed(partition or "natural"))
        if clients.isascii() and clients.isdecimal():
            if int(clients) < 1:
                raise RequestError(f"--clients: must be at least 1, got {clients}")
            return cls(int(clients), None, Partition.parsed(partition or "iid"))
        if not Path(clients).is_file():
            raise RequestError(f"--clients: must be a number or a file SPLIT.csv, got {clients!r}")
        if partition not in (None, "natural"):
            raise RequestError(
                f"--partition: must be left out with {clients}, which says whose each image is, "
                f"got {partition!r}"
            )
        return cls(None, os.path.abspath(clients), Partition("natural"))

    def divide(self, splits: Splits, seed: int) -> list[ClientData]:
        """Divide a set; RequestError if it does not go with what was said."""
        return clients_of(splits, self.partition, self.number, seed)


def of_client(
    splits: Splits,
    *,
    number: int,
    clients: str | None,
    partition: str | None,
    seed: int,
    supervision: Supervision = "pixel",
) -> Splits:
    """Return one client's images of a set, as ``sdq federate`` divided it.

    Args:
        splits: the whole set.
        number: of the client, from 0.
        clients: as ``--clients`` was.
        partition: as ``--partition`` was.
        seed: of the division.
        supervision: what it knows of its training images.
    """
    own = ClientRequest.of(clients, partition).divide(splits, seed)[number]
    own = weakened(own, supervision, len(splits.class_names), seed)
    return replace(splits, train=own.train, val=own.val, test=own.test)


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder's name for each client, each another.

    >>> folder_names(["client 0", "a/b", "a b"])
    ['client_0', 'a_b', 'a_b_2']
    """
    found: list[str] = []
    for number, name in enumerate(names):
        plain = re.sub(r"[^\w.-]+", "_", name).strip(".") or "client"
        found.append(f"{plain}_{number}" if plain in found else plain)
    return found


def supervised(
    clients: list[ClientData], supervision: str, splits: Splits, seed: int
) -> list[ClientData]:
    """Return the clients with what ``--supervision`` leaves them of their masks.

    Raises:
        RequestError: the data have no masks, or it does not name a level for each client.
    """
    if splits.task != "segmentation":
        raise RequestError(
            f"--supervision: data must have masks, got {splits.task}; leave it out, or name a set "
            "for segmentation and a model that gives maps"
        )
    levels = parsed(supervision, [client.name for client in clients])
    classes = len(splits.class_names)
    return [
        weakened(client, level, classes, seed)
        for client, level in zip(clients, levels, strict=True)
    ]


def describe_clients(clients: list[ClientData], splits: Splits) -> list[dict[str, Any]]:
    """Return what ``run.json`` says of the clients."""
    classes = len(splits.class_names)
    segmenting = splits.task == "segmentation"
    return [
        {
            "name": client.name,
            "num_examples": {
                part: len(images)
                for part in ("train", "val", "test")
                if (images := getattr(client, part)) is not None
            },
            **(
                {"supervision": client.supervision}
                if segmenting
                else {"class_counts": client.train.labels.bincount(minlength=classes).tolist()}
            ),
        }
        for client in clients
    ]
