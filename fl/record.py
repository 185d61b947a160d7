"""What travels and what is kept: named tensors in groups, and plain values.

One type serves the request to a client, its reply, what a client keeps between rounds and what
the server keeps. It is what a message of Flower can hold (a group is an ArrayRecord, the values a
JSON text) and what a safetensors file can hold; nothing is pickled.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sdq.checkpoint import load_tensors, save_tensors
from sdq.errors import RequestError, RunError

Tensors = dict[str, Tensor]
Kind = Literal["counts", "train", "adapt", "collect", "own"]

ANEW = "start in a new folder"
"""What to do about a state that is damaged."""


@dataclass(frozen=True)
class Record:
    """Tensors by group and name, and values that JSON can hold.

    The group ``model`` holds tensors of the network by their names in it; a method calls a group
    of its own after itself (``scaffold``).
    """

    tensors: dict[str, Tensors] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def model(self) -> Tensors:
        """Return the tensors of the network."""
        return self.tensors.get("model", {})

    def copy(self) -> "Record":
        """Return a record with dictionaries and tensors of its own."""
        tensors = {g: {n: t.clone() for n, t in ts.items()} for g, ts in self.tensors.items()}
        return Record(tensors, dict(self.values))

    def num_bytes(self) -> int:
        """Return the bytes of the tensors."""
        return sum(t.nbytes for group in self.tensors.values() for t in group.values())


@dataclass(frozen=True)
class Request:
    """What the server asks of one client.

    Args:
        kind: ``counts`` (its class counts, before the first round), ``train``, ``adapt`` (train and
            evaluate, and forget it), ``collect`` (its tensors that do not travel otherwise, for
            the evaluation of the server's model alone) or ``own`` (train and evaluate, and keep the
            result as a model of its own).
        client: its number.
        round: counted from 0.
        record: what comes with it.
    """

    kind: Kind
    client: int
    round: int
    record: Record


@dataclass(frozen=True)
class Reply:
    """What a client sends back.

    ``values`` of a training has ``num_examples`` and ``steps``, or ``sits_out``: why it did not
    train.
    """

    client: int
    record: Record

    @property
    def model(self) -> Tensors:
        """Return the tensors of the network."""
        return self.record.model

    @property
    def sits_out(self) -> str | None:
        """Return why the client did not train, or None if it did."""
        return self.record.values.get("sits_out")

    @property
    def num_examples(self) -> int:
        """Return the images the client trained on."""
        return int(self.record.values["num_examples"])


@dataclass(frozen=True)
class Failure:
    """A client that gave no reply that can be used, and why."""

    client: int
    reason: str


@dataclass(frozen=True)
class Unreached(Failure):
    """The failure of a client that nothing was sent to."""


def save(path: Path, record: Record) -> None:
    """Write a record to one safetensors file, atomically; the values go to its header as JSON.

    The header has a SHA-256 of all: nobody edits such a file by hand, and rounds that go on from a
    damaged one would fail somewhere else, or give another result.

    Raises:
        RunError: a value is NaN or infinite, or JSON cannot hold it.
    """
    flat = {f"{g}/{name}": t for g, group in record.tensors.items() for name, t in group.items()}
    try:
        text = json.dumps(record.values, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RunError(f"{path}: values must be what JSON can hold, but: {error}") from error
    groups = json.dumps(list(record.tensors))
    header = {"values": text, "groups": groups, "sha256": digest(flat, text, groups)}
    save_tensors(path, flat, header)


def load(path: Path) -> Record:
    """Read such a file; RequestError if it is not there or not whole."""
    flat, metadata = load_tensors(path)
    values, groups = metadata.get("values", ""), metadata.get("groups", "")
    if metadata.get("sha256") != digest(flat, values, groups):
        raise RequestError(
            f"{path}: must be a record as it was written, got content with another SHA-256; {ANEW}"
        )
    tensors: dict[str, Tensors] = {group: {} for group in json.loads(groups)}
    for name, tensor in flat.items():
        group, _, own = name.partition("/")
        tensors.setdefault(group, {})[own] = tensor
    return Record(tensors, json.loads(values))


def not_finite(record: Record) -> str | None:
    """Return the name of a tensor or value that is NaN or infinite, or None."""
    for group, tensors in record.tensors.items():
        for name, tensor in tensors.items():
            # the sum is a tenth of the work; a finite tensor whose sum overflows is looked at twice
            if not tensor.is_floating_point() or bool(tensor.sum().isfinite()):
                continue
            if not bool(tensor.isfinite().all()):
                return f"{group}/{name}"
    try:
        json.dumps(record.values, allow_nan=False)
    except ValueError:
        return "values"
    return None


def misfit(sent: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Return how names, shapes or dtypes differ from what is expected, or None."""
    for name in sorted(set(sent) ^ set(expected)):
        return f"{name!r} is {'missing' if name in expected else 'unknown'}"
    for name, tensor in sent.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            return (
                f"{name!r} is {tensor.dtype} {tuple(tensor.shape)} instead of "
                f"{want.dtype} {tuple(want.shape)}"
            )
    return None


MOST = 1e9
"""No number that clients tell is larger: not of images, steps or seconds, and no loss."""


def no_number(values: Mapping[str, Any], name: str, *, least: float = -MOST) -> str | None:
    """Return why a value is no number, or one out of bounds (NaN is), or None."""
    value = values.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= MOST:
        return None
    return f"{name!r} is {shortened(value)} instead of a number from {least:g} to {MOST:g}"


def shortened(value: Any) -> str:
    """Return how a value is written, at most 40 letters of it."""
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python writes no integer of thousands of digits
        return "a number of too many digits"


def picked(tensors: Mapping[str, Tensor], names: Iterable[str]) -> Tensors:
    """Return copies of some tensors, by name, on the CPU."""
    return {name: tensors[name].detach().to("cpu", copy=True) for name in names}


def digest(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """Return the SHA-256 of texts and of tensors with names, shapes and dtypes, in hex digits."""
    found = hashlib.sha256(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="replace"))
        plain = tensor.detach().cpu().contiguous()
        found.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
