"""What leaves a client and what comes to it, tensor by tensor, before anything real is trained.

Nothing here knows what a method sends. A few rounds are run with the federation's own code on
images of noise, and what the messages have in them is listed.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from fl.method import ClientData, pools_images
from fl.quant_rounds import QuantRounds
from fl.record import Failure, Kind, Record, Reply, Request
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from fl.tune_rounds import TuneRounds
from sdq.batches import generator
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RunError
from sdq.task import SEGMENTATION

Way = Literal["up", "down"]

ROUNDS = 4
"""Three in which everybody takes part, and one whose clients' states the server does not know."""

EVALUATED = 1
"""Of these, the one with metrics."""

WHEN: dict[Kind, str] = {
    "counts": "once, before the first round",
    "train": "each round that asks the client",
    "adapt": "at the end, if the last round did not ask the client",
    "collect": "at each evaluation",
    "own": "at the end, of a client that keeps a quantized model of its own",
}
TOLD = "before the phase, over a network"
LACKING = f"{TOLD}, to a node that does not have it"
LATER = "each round that asks the client, from the second on"
UNKNOWN = "to a client whose last message the server does not know"

MEANINGS = {
    ("up", "class_counts"): "training images of each class; of segmentation, their number",
    ("down", "class_counts"): "training images of each class, of all clients together",
    ("up", "num_examples"): "training images that it learned from",
    ("up", "steps"): "steps of its training",
    ("up", "train_loss"): "mean loss of its training",
    ("up", "sits_out"): "why it does not train in this round",
    ("up", "evaluations"): "metrics of its model on its own validation and test images",
    ("down", "evaluate"): "whether it is to send metrics",
    ("down", "policy"): "bits of each layer",
    ("down", "own"): "the same, of clients with a budget of their own",
    ("down", "accepted"): "the last round in which the server took the client's reply",
    ("down", "reference"): "the round whose model the message is a change of",
}
"""Of the values that every method has; what others are, the method's page says."""


@dataclass(frozen=True)
class SentTensor:
    """One tensor of a kind of message."""

    way: Way
    when: str
    group: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True)
class SentValue:
    """One value of a kind of message: ``numbers`` of them, with these names if it is nested."""

    way: Way
    when: str
    name: str
    meaning: str
    numbers: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class Leaves:
    """Everything that passes between a client and the server.

    Args:
        images: whether the images themselves are in one place.
        tensors: of all kinds of messages.
        values: likewise.
    """

    images: bool
    tensors: tuple[SentTensor, ...] = ()
    values: tuple[SentValue, ...] = ()

    def bytes_per_round(self, way: Way) -> int:
        """Return the bytes of the tensors in a round, from the second on."""
        usual = (WHEN["train"], LATER)
        return sum(t.bytes for t in self.tensors if t.way == way and t.when in usual)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        ways: tuple[Way, Way] = ("up", "down")
        return {**asdict(self), **{f"bytes_{w}_per_round": self.bytes_per_round(w) for w in ways}}


class _Listening(InProcess):
    """Clients in this process, and a list of what passed."""

    def __init__(self, setting: Setting, clients: list[ClientData]) -> None:
        super().__init__(setting, clients, Store())
        self.passed: list[tuple[Way, Kind, int, Record]] = []

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            self.passed.append(("down", request.kind, request.round, request.record))
            for answer in super().ask([request]):
                if isinstance(answer, Failure):
                    raise RunError(f"what leaves: a round of noise failed: {answer.reason}")
                self.passed.append(("up", request.kind, request.round, answer.record))
                yield answer


def what_leaves(setting: Setting) -> Leaves:
    """Return what passes between a client and the server of a federation.

    Args:
        setting: of the federation; its network is used and left changed.

    Raises:
        RunError: the method cannot train on noise.
    """
    if pools_images(setting.method):
        return Leaves(images=True)
    config = setting.config
    # participation, rounds and epochs change how often something is sent, and not what
    short = config.replaced(rounds=ROUNDS, local_epochs=1, participation=1.0, min_replies=1)
    dry = replace(setting, config=short)
    transport = _Listening(dry, [_noise(dry, k) for k in range(2)])
    rounds = Rounds(dry, transport, 2)
    rounds.begin()
    for number in range(ROUNDS):
        if number == ROUNDS - 1:
            for client in range(2):
                rounds.end.references.drop(client)
        rounds.round(evaluate=number == EVALUATED)
    if config.participation < 1 and config.evaluate_absent and config.privacy is None:
        rounds.adapt([0])
    rounds.load_model_()
    found = _listed(transport.passed)
    if len(setting.method.supervision) > 1:  # noise never gives a client a reason to
        sits_out = SentValue("up", WHEN["train"], "sits_out", MEANINGS["up", "sits_out"], 0, ())
        found = replace(found, values=(*found.values, sits_out))
    if isinstance(setting.method, QuantRounds):
        tensors, values = _begins(setting.method)
        found = replace(found, tensors=(*tensors, *found.tensors), values=(*values, *found.values))
    return found


def _begins(method: QuantRounds) -> tuple[list[SentTensor], list[SentValue]]:
    """Return what a client is told before a phase of learning bits."""
    tensors = [
        _sent("down", LACKING, group, name, tensor)
        for group, state in method.begins.items()
        for name, tensor in state.items()
    ]
    if not isinstance(method, TuneRounds):
        return tensors, []
    policies = {"policy": [method.policy], "own": [*method.own.values()]}
    return tensors, [
        SentValue(
            "down", TOLD, name, MEANINGS["down", name],
            2 * sum(len(policy) for policy in found), ("act_bits", "weight_bits"),
        )
        for name, found in policies.items() if found
    ]  # fmt: skip


def _noise(setting: Setting, client: int) -> ClientData:
    """Return a client with two images of each class, of noise, in every part."""
    labels = torch.arange(setting.num_classes).repeat(2)
    rng = generator(0, f"noise {client}")
    shape = (len(labels), *setting.image_shape)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=rng)
    images = ImageSet(ArrayImages(pixels), labels)
    if setting.task is SEGMENTATION:
        values = torch.randint(setting.num_classes + 1, shape, dtype=torch.uint8, generator=rng)
        images = replace(images, masks=ArrayImages(values[:, :1]))
    return ClientData(f"noise {client}", images, images, images)


def _listed(passed: list[tuple[Way, Kind, int, Record]]) -> Leaves:
    tensors: dict[tuple[Any, ...], _Seen] = {}
    values: dict[tuple[Any, ...], _Seen] = {}
    for way, kind, round, record in passed:
        for group, named in record.tensors.items():
            for name, tensor in named.items():
                key = (way, kind, group, name, tensor.shape, tensor.dtype)
                tensors.setdefault(key, _Seen(way, kind, name, tensor)).rounds.add(round)
        for name, value in record.values.items():
            entry = values.setdefault((way, kind, name), _Seen(way, kind, name, value))
            entry.rounds.add(round)
            entry.value = max(entry.value, value, key=lambda v: len(list(_numbers(v))))
    return Leaves(
        images=False,
        tensors=tuple(seen.tensor(group=key[2]) for key, seen in tensors.items()),
        values=tuple(seen.values() for seen in values.values()),
    )


@dataclass
class _Seen:
    """A tensor or value as it was seen, and in which rounds."""

    way: Way
    kind: Kind
    name: str
    value: Any
    rounds: set[int] = field(default_factory=set)

    def tensor(self, group: str) -> SentTensor:
        return _sent(self.way, self._when(), group, self.name, self.value)

    def values(self) -> SentValue:
        found = list(_numbers(self.value))
        names = tuple(sorted({name for name in found if name}))
        meaning = MEANINGS.get((self.way, self.name), "of the method")
        return SentValue(self.way, self._when(), self.name, meaning, len(found), names)

    def _when(self) -> str:
        if self.kind != "train" or 0 in self.rounds:
            return WHEN[self.kind]
        if self.rounds == {EVALUATED}:
            return WHEN["collect"]
        return UNKNOWN if self.rounds == {ROUNDS - 1} else LATER


def _sent(way: Way, when: str, group: str, name: str, tensor: torch.Tensor) -> SentTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return SentTensor(way, when, group, name, tuple(tensor.shape), dtype, tensor.nbytes)


def _numbers(value: Any, name: str = "") -> Iterator[str]:
    """Yield, for each number in a value, the name it stands under."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner, name)
    else:
        yield name
