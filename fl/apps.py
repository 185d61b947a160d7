"""A federation as Flower apps: the same ServerApp and ClientApp here, in simulation, and deployed.

The ServerApp runs the one round loop, :mod:`fl.rounds`, over a grid; the ClientApp answers with
:func:`fl.client.try_answer`. A message holds a record: one ArrayRecord a group of tensors, and one
ConfigRecord with the values as JSON.

Before anything else the server asks every node which client it is, and what it takes the
federation to be: method, configuration, network with its first weights, version of this package. A
node that disagrees is left out, and named with what differs.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl.client import CRASHES, try_answer
from fl.method import ClientData, pools_images
from fl.personal import Personal
from fl.record import Failure, Record, Reply, Request
from fl.results import close_run, log_round
from fl.run import Federated, run_over
from fl.setting import Setting
from fl.store import ByRound
from sdq.data import ImageSet
from sdq.errors import RequestError
from sdq.run_folder import RunFolder

Values = Mapping[str, Any]

TYPES = {
    "hello": "query.hello",
    "counts": "query.counts",
    "collect": "query.collect",
    "train": "train",
    "adapt": "train.adapt",
}
"""Kind of a request: type of its message."""

HELLO_SECONDS = 60.0
"""How long a node may take to say who it is."""


@dataclass(frozen=True)
class Federation:
    """What a server needs to run a federation.

    Args:
        setting: with the method, the configuration and the network.
        num_clients: of the federation; a node's ``partition-id`` is its client's number.
        test: images the server measures generalization on; empty: it has none.
        val: likewise, for the selection of a round.
        folder: where the state is written after each round, and taken up from; or None.
        round_seconds: how long the clients of a round may take; None: as long as Flower keeps a
            message, 12 hours.
        run: a run folder (:func:`fl.results.open_run`) for log, state and result, instead of
            ``folder``.
    """

    setting: Setting
    num_clients: int
    test: tuple[ImageSet, ...] = ()
    val: tuple[ImageSet, ...] = ()
    folder: Path | None = None
    round_seconds: float | None = None
    run: RunFolder | None = None


@dataclass(frozen=True)
class Hospital:
    """What a client needs: the same setting, its own images, and where it keeps what it learned.

    ``folder=None`` keeps it in Flower's context: in memory, for as long as the run lasts. With a
    folder a federation can be taken up again in another run.

    ``described`` is what ``run.json`` says of data and network
    (:meth:`fl.results.Description.to_json`). Where the federation says ``keep_clients``, a client
    that has it and a folder writes its own model as a run folder, ``FEDERATION/NUMBER/model``.
    """

    setting: Setting
    data: ClientData
    folder: Path | None = None
    described: Values | None = None


def server_app(
    open_federation: Callable[[Values], Federation],
    finish: Callable[[Federated, Values], None],
) -> ServerApp:
    """Return the server's app.

    Args:
        open_federation: makes the federation from Flower's run configuration.
        finish: takes the result, and the run configuration.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        federation = open_federation(context.run_config)
        with federation.run or contextlib.nullcontext():  # which holds the folder's lock
            done = _run(grid, federation)
        finish(done, context.run_config)

    return app


def client_app(open_hospital: Callable[[int, Values, Values], Hospital]) -> ClientApp:
    """Return the clients' app.

    Args:
        open_hospital: makes what a client needs from its number (the node's ``partition-id``),
            the run configuration and the node's.
    """
    app = ClientApp()

    def respond(kind: str, message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        try:
            hospital = open_hospital(client, context.run_config, context.node_config)
        except CRASHES as error:
            failed = {"client": client, "failure": f"{type(error).__name__}: {error}"}
            return Message(packed(Record({}, failed)), reply_to=message)
        if kind == "hello":
            values = {"client": client, "identity": identity(hospital.setting)}
            return Message(packed(Record({}, values)), reply_to=message)
        asked = unpacked(message.content)
        request = Request(kind, client, int(asked.values.pop("round")), asked)  # type: ignore[arg-type]
        memory = _Memory(hospital.folder, context, str(asked.values.pop("federation")), client)
        answer, keeps = try_answer(
            hospital.setting, hospital.data, request, memory.read(request.round)
        )
        if keeps is not None:
            memory.write(keeps, request.round)
            if hospital.described is not None:
                memory.write_model(keeps, hospital.described)
        if isinstance(answer, Failure):
            return Message(packed(Record({}, {"failure": answer.reason})), reply_to=message)
        return Message(packed(answer.record), reply_to=message)

    for kind, type_ in TYPES.items():
        category, _, action = type_.partition(".")
        register = app.train if category == "train" else app.query
        register(action or "default")(lambda m, c, kind=kind: respond(kind, m, c))
    return app


def _run(grid: Grid, federation: Federation) -> Federated:
    """Run a federation over a grid, and write what came of it."""
    setting, number, run = federation.setting, federation.num_clients, federation.run
    _check_apart(setting)
    folder, watch = federation.folder, None
    if run is not None:
        folder, watch = run.path / "checkpoints", partial(log_round, run)
    done = run_over(
        setting, GridTransport(grid, setting, number, federation.round_seconds), number,
        test=federation.test, val=federation.val, folder=folder, watch=watch,
    )  # fmt: skip
    if run is not None:
        close_run(run, done, [f"client {k}" for k in range(number)])
    return done


def _check_apart(setting: Setting) -> None:
    """Raise RequestError for what is right in a simulation alone.

    The method needs the clients' images in one place, or the noise of privacy follows from a seed
    that everybody knows.
    """
    method, privacy = setting.method, setting.config.privacy
    if privacy is not None and privacy.noise != "secret":
        raise RequestError(
            f"privacy.noise: must be 'secret' between nodes, got {privacy.noise!r}: what follows "
            "from the federation's seed can be subtracted"
        )
    if pools_images(method):
        raise RequestError(
            f"{method.name}: must have every client's images in one place, and here each is on its "
            "own node; choose another method"
        )


def identity(setting: Setting) -> dict[str, Any]:
    """Return what a node and the server must have in common."""
    return {**setting.identity(), "sdq": metadata.version("sdq")}


class _Memory:
    """What a client keeps between rounds: in Flower's context, or in a folder of its own."""

    def __init__(self, folder: Path | None, context: Context, federation: str, client: int) -> None:
        self.context = context
        self.files = None if folder is None else ByRound(folder / federation / str(client))

    def read(self, round: int) -> Record | None:
        if self.files is not None:
            return self.files.before(round)
        state = self.context.state
        return unpacked(state) if "values" in state else None

    def write(self, record: Record, round: int) -> None:
        if self.files is not None:
            self.files.put(record, round)
        else:
            self.context.state = packed(record)

    def write_model(self, record: Record, described: Values) -> None:
        """Write the client's own model as a run folder, if it has one and there is a place."""
        personal = Personal.taken(record)
        if personal is not None and self.files is not None:
            personal.write(self.files.folder / "model", described)


@dataclass
class GridTransport:
    """Requests as messages over Flower's grid.

    Args:
        grid: Flower's, or :class:`fl.grid.InProcessGrid`.
        setting: of the federation.
        num_clients: of the federation.
        round_seconds: how long the clients of a round may take, or None.
        federation: tells this federation's states from others' on the clients' disks.
    """

    grid: Grid
    setting: Setting
    num_clients: int
    round_seconds: float | None = None
    federation: str = ""
    claims: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Of each node: which client it says it is, and why that is refused, or nothing."""

    def __post_init__(self) -> None:
        self.federation = self.federation or f"run-{self.grid.run.run_id:016x}"

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Send the requests, and yield the answers as they come."""
        self._meet()
        waiting: dict[int, int] = {}  # node: client
        messages = []
        for request in requests:
            node = self._node(request.client)
            if isinstance(node, str):
                yield Failure(request.client, node)
                continue
            values = {"round": request.round, "federation": self.federation}
            record = Record(request.record.tensors, {**request.record.values, **values})
            # what a node finds later, when it is back, belongs to a round that is over
            messages.append(
                Message(packed(record), node, TYPES[request.kind], ttl=self.round_seconds)
            )
            waiting[node] = request.client
        for message in self.grid.send_and_receive(messages, timeout=self.round_seconds):
            node = _sender(message, messages)
            if node in waiting:
                yield _answer(waiting.pop(node), message)
        for node, client in waiting.items():
            del self.claims[node]  # it is asked anew who it is, if it is there
            yield Failure(client, f"no reply within {self.round_seconds} s")

    def commit(self, rounds: int) -> dict[str, Any]:
        """Return the name of the federation: clients find their states by it and the round."""
        return {"federation": self.federation}

    def restore(self, committed: dict[str, Any]) -> None:
        """Take up that name."""
        self.federation = committed["federation"]

    def forget_old_(self) -> None:
        """Leave it to the clients."""

    def _meet(self) -> None:
        """Ask nodes that are new which clients they are."""
        nodes = set(self.grid.get_node_ids())
        self.claims = {node: claim for node, claim in self.claims.items() if node in nodes}
        fresh = sorted(nodes - set(self.claims))
        if not fresh:
            return
        messages = [Message(packed(Record()), node, TYPES["hello"]) for node in fresh]
        mine = identity(self.setting)
        for reply in self.grid.send_and_receive(messages, timeout=HELLO_SECONDS):
            if reply.has_error():
                continue  # it is asked again before the next round
            said = unpacked(reply.content).values
            theirs = said.get("identity", {})
            different = [key for key in mine if theirs.get(key) != mine[key]]
            refusal = str(said.get("failure", ""))
            if different and not refusal:
                refusal = _difference(different[0], theirs.get(different[0]), mine)
            self.claims[reply.metadata.src_node_id] = (int(said["client"]), refusal)

    def _node(self, client: int) -> int | str:
        """Return the client's node, or why there is none."""
        claims = {node: why for node, (number, why) in self.claims.items() if number == client}
        if len(claims) > 1:
            return "two nodes say that they are this client"
        for node, refusal in claims.items():
            return refusal or node
        numbers = sorted({number for number, _ in self.claims.values()})
        return f"no node says that it is this client; there are nodes of {numbers or 'none'}"


def _difference(key: str, theirs: Any, mine: Values) -> str:
    words = {"initial": "the first weights", "sdq": "the version of sdq", "tensors": "the network"}
    got = "" if key in ("initial", "tensors") else f" {mine[key]!r:.80}, got {theirs!r:.80}"
    return f"{words.get(key, key)} must be the server's{got}; give both the same"


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
        return Failure(client, str(record.values["failure"]))
    return Reply(client, record)


def packed(record: Record) -> RecordDict:
    """Return a record as Flower's: an ArrayRecord a group, and the values as JSON."""
    found = RecordDict(
        {f"tensors:{name}": ArrayRecord(tensors) for name, tensors in record.tensors.items()}
    )
    found["values"] = ConfigRecord({"json": json.dumps(record.values)})
    return found


def unpacked(content: RecordDict) -> Record:
    """Return such a message's record."""
    tensors = {
        name.removeprefix("tensors:"): dict(arrays.to_torch_state_dict())
        for name, arrays in content.array_records.items()
    }
    return Record(tensors, json.loads(str(content["values"]["json"])))
