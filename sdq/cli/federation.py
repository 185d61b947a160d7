"""From the options of ``sdq federate`` to methods, configuration and clients."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fl
from fl.clients import Partition, clients_of
from fl.method import ClientData, Method
from sdq.cli.plan import ConfigFile
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
        return cls(None, clients, Partition("natural"))

    def divide(self, splits: Splits, seed: int) -> list[ClientData]:
        """Divide a set; RequestError if it does not go with what was said."""
        return clients_of(splits, self.partition, self.number, seed)


def make_methods(names: str, hyper: list[str] | None, file: ConfigFile) -> list[Method]:
    """Return the methods that ``--method`` names, with their hyper-parameters.

    Args:
        names: separated by commas.
        hyper: ``key=value``, or ``METHOD.key=value`` where there are several.
        file: its part ``methods`` has ``{METHOD: {key: value}}``.

    Raises:
        RequestError: an unknown method or hyper-parameter, or one that is given twice.
    """
    wanted = [name.strip().lower().replace("-", "_") for name in names.split(",")]
    if len(set(wanted)) < len(wanted):
        raise RequestError(f"--method: every method must be named once, got {names!r}")
    given: dict[str, dict[str, Any]] = {name: {} for name in wanted}
    for name, fields in file.sections.get("methods", {}).items():
        if name not in given or not isinstance(fields, dict):
            raise RequestError(
                f"--config: methods must have an object for each of {', '.join(wanted)}, "
                f"got {name!r}: {fields!r:.60}"
            )
        given[name] |= fields
    for text in hyper or []:
        name, key, value = _hyper(text, wanted)
        if key in given[name]:
            raise RequestError(f"--hyper: {name}.{key} must be given once, got a second")
        given[name][key] = value
    return [fl.method(name, **given[name]) for name in wanted]


def _hyper(text: str, methods: list[str]) -> tuple[str, str, Any]:
    """Read ``key=value`` or ``METHOD.key=value``; the value is JSON, or else text."""
    left, equals, right = text.partition("=")
    first, dot, rest = left.partition(".")
    name, key = (first, rest) if dot else (methods[0], left)
    if not (equals and key) or (not dot and len(methods) > 1) or name not in methods:
        form = "KEY=VALUE" if len(methods) == 1 else f"METHOD.KEY=VALUE of {', '.join(methods)}"
        raise RequestError(f"--hyper: must be {form}, got {text!r}")
    try:
        return name, key, json.loads(right)
    except ValueError:
        return name, key, right


def describe_clients(clients: list[ClientData], classes: int) -> list[dict[str, Any]]:
    """Return what ``run.json`` says of the clients."""
    return [
        {
            "name": client.name,
            "num_examples": {
                part: len(images)
                for part in ("train", "val", "test")
                if (images := getattr(client, part)) is not None
            },
            "class_counts": client.train.labels.bincount(minlength=classes).tolist(),
        }
        for client in clients
    ]
