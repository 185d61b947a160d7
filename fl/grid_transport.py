"""The one round loop's messages over Flower's grid.

Before anything else the server asks every node which client it is, and what it takes the
federation to be: method, configuration, network with its first weights, version of this package. A
node that disagrees is left out, and named with what differs.

Where bits are learned the server tells each node with this question how the phase begins
(:mod:`fl.opening`), without its models; nodes that do not have those yet are sent them, once.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fl.messages import TYPES, packed, unpacked
from fl.opening import Opening
from fl.record import Failure, Record, Reply, Request, Unreached
from fl.setting import Setting

HELLO_SECONDS = 60.0
"""How long a node may take to say who it is."""

FIRST_SECONDS = 300.0
"""How long it may take when it is first asked: it starts Python, and imports torch."""

OPENING_SECONDS = 180.0
"""How long it may take where it first quantizes a network."""


def identity(setting: Setting) -> dict[str, Any]:
    """Return what a node and the server must have in common."""
    return {**setting.identity(), "sdq": metadata.version("sdq")}


@dataclass(frozen=True)
class Stranger(Failure):
    """The failure of a node that does not remember the phase: it is to be told again."""


@dataclass
class GridTransport:
    """Requests as messages over Flower's grid.

    Args:
        grid: Flower's, or :class:`fl.grid.InProcessGrid`.
        setting: of the federation.
        num_clients: of the federation.
        round_seconds: how long the clients of a round may take, or None.
        federation: tells this federation's states from others' on the clients' disks.
        opening: of a phase, where bits are learned.
        agreed: what nodes must have in common with the server beside the setting.
    """

    grid: Grid
    setting: Setting
    num_clients: int
    round_seconds: float | None = None
    federation: str = ""
    opening: Opening | None = None
    agreed: Mapping[str, Any] = field(default_factory=dict)
    sent: dict[int, dict[str, int]] = field(default_factory=dict)
    """The bytes of the models that each client was sent, in all phases, by name."""
    claims: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Of each node: which client it says it is, and why that is refused, or nothing."""
    trained: set[int] = field(default_factory=set)
    """Clients that have trained; they should remember it."""
    met: set[int] = field(default_factory=set)
    """Nodes that were asked who they are."""

    def __post_init__(self) -> None:
        self.federation = self.federation or f"run-{self.grid.run.run_id:016x}"

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Send the requests, and yield the answers as they come."""
        self._meet()
        waiting: dict[int, int] = {}  # node: client
        messages = []
        training = False
        for request in requests:
            node = self._node(request.client)
            if isinstance(node, str):
                yield Unreached(request.client, node)
                continue
            trained = request.client in self.trained
            values = {"round": request.round, "trained": trained, **self._place()}
            record = Record(request.record.tensors, {**request.record.values, **values})
            # what a node finds later, when it is back, belongs to a round that is over
            messages.append(
                Message(packed(record), node, TYPES[request.kind], ttl=self.round_seconds)
            )
            waiting[node] = request.client
            training = request.kind == "train"
        for message in self.grid.send_and_receive(messages, timeout=self.round_seconds):
            node = _sender(message, messages)
            if node in waiting:
                answer = _answer(waiting.pop(node), message)
                if isinstance(answer, Stranger):
                    del self.claims[node]
                elif training and isinstance(answer, Reply):
                    self.trained.add(answer.client)
                yield answer
        for node, client in waiting.items():
            del self.claims[node]  # it is asked anew who it is, if it is there
            yield Failure(client, f"no reply within {self.round_seconds} s")

    def commit(self, rounds: int) -> dict[str, Any]:
        """Return the name of the federation: clients find their states by it and the round."""
        return {
            "federation": self.federation,
            "sent": {str(k): each for k, each in self.sent.items()},
            "trained": sorted(self.trained),
        }

    def restore(self, committed: dict[str, Any]) -> None:
        """Take up that name."""
        self.federation = committed["federation"]
        self.sent = {int(client): dict(each) for client, each in committed["sent"].items()}
        self.trained = set(committed["trained"])

    def forget_old_(self) -> None:
        """Leave it to the clients."""

    def _place(self) -> dict[str, Any]:
        """Return what a node finds its memory by."""
        phase = {} if self.opening is None else {"phase": self.opening.phase}
        return {"federation": self.federation, **phase}

    def _meet(self) -> None:
        """Ask nodes that are new which clients they are."""
        nodes = set(self.grid.get_node_ids())
        self.claims = {node: claim for node, claim in self.claims.items() if node in nodes}
        fresh = sorted(nodes - set(self.claims))
        if not fresh:
            return
        values = self._place() | ({} if self.opening is None else self.opening.values())
        lacking = self._greet(fresh, Record({}, values))
        for lacks in sorted(set(lacking.values())):
            assert self.opening is not None
            models = {name: self.opening.models[name] for name in lacks}
            without = [node for node, names in lacking.items() if names == lacks]
            self._greet(without, Record(models, values))

    def _greet(self, nodes: list[int], told: Record) -> dict[int, tuple[str, ...]]:
        """Take what nodes say of themselves; return the models that they lack, by node."""
        known = HELLO_SECONDS if self.opening is None else OPENING_SECONDS
        seconds = known if self.met.issuperset(nodes) else FIRST_SECONDS
        self.met.update(nodes)
        # found later, it would take the node back to a phase that is over
        messages = [Message(packed(told), n, TYPES["hello"], ttl=seconds) for n in nodes]
        mine = {**self.agreed, **identity(self.setting)}
        lacking = {}
        for reply in self.grid.send_and_receive(messages, timeout=seconds):
            if reply.has_error():
                continue  # it is asked again before the next round
            said, node = unpacked(reply.content).values, reply.metadata.src_node_id
            lacks = tuple(said.get("lacks", ()))
            theirs = said.get("identity", {})
            needed = self.agreed if lacks else mine
            different = [key for key in needed if theirs.get(key) != mine[key]]
            refusal = str(said.get("failure", ""))
            client = int(said["client"])
            if lacks and not different:
                lacking[node] = lacks
                continue
            sent = self.sent.setdefault(client, {})
            for name, size in said.get("sent", {}).items():
                known = sent.get(name, 0)
                # sent with this question, or perhaps before the server was killed
                sent[name] = known + size if name in told.tensors else max(known, size)
            if different and not refusal:
                refusal = _difference(different[0], theirs.get(different[0]), mine[different[0]])
            self.claims[node] = (client, refusal)
        return lacking

    def _node(self, client: int) -> int | str:
        """Return the client's node, or why there is none."""
        claims = {node: why for node, (number, why) in self.claims.items() if number == client}
        if len(claims) > 1:
            return "two nodes say that they are this client"
        for node, refusal in claims.items():
            return refusal or node
        numbers = sorted({number for number, _ in self.claims.values()})
        return f"no node says that it is this client; there are nodes of {numbers or 'none'}"


def _difference(name: str, theirs: Any, mine: Any) -> str:
    """Return what differs, as deep as it has a name."""
    if isinstance(theirs, Mapping) and isinstance(mine, Mapping) and name != "tensors":
        for key in {**mine, **theirs}:
            if theirs.get(key) != mine.get(key):
                return _difference(f"{name}.{key}", theirs.get(key), mine.get(key))
    words = {"initial": "the first weights", "sdq": "the version of sdq", "tensors": "the network"}
    got = "" if name in ("initial", "tensors") else f" {mine!r:.80}, got {theirs!r:.80}"
    return f"{words.get(name, name)} must be the server's{got}; give both the same"


def _sender(reply: Message, asked: Iterable[Message]) -> int:
    """Return the node that a reply is from, or about.

    The SuperLink answers in its own name for a node that missed its heartbeats; which node that is
    shows from the message that it answers.
    """
    for message in asked:
        if message.metadata.message_id and (
            message.metadata.message_id == reply.metadata.reply_to_message_id
        ):
            return int(message.metadata.dst_node_id)
    return int(reply.metadata.src_node_id)


def _answer(client: int, message: Message) -> Reply | Failure:
    if message.has_error():
        return Failure(client, f"its node failed: {message.error.reason}")
    record = unpacked(message.content)
    if "failure" in record.values:
        kind = Stranger if record.values.get("unmet") else Failure
        return kind(client, str(record.values["failure"]))
    return Reply(client, record)
