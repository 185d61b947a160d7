"""Flower's grid in this process: a ClientApp is called where a message would be sent.

Deterministic, without Ray, servers or sockets. Flower 1.41 stamps each message with the identity
of the task that makes it, which it keeps in one place a process; here server and clients are one
process, so that the identity is changed around every call. ``TaskIdentity`` is private to Flower,
and this file is the only one that knows of it.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fl.client import CRASHES

SERVER_NODE = 1
FIRST_NODE = 1000
"""Node of client 0; the others follow."""

CLIENT_FAILED = 2
"""Code of an error reply, as Flower's for a ClientApp that raised."""


class InProcessGrid(Grid):
    """A grid whose nodes are in this process.

    Args:
        app: of every client.
        num_clients: one node each, with its number as ``partition-id``.
        run_config: what the apps find in their context.
        dead: nodes that take messages and never answer, by client.
    """

    def __init__(
        self,
        app: ClientApp,
        num_clients: int,
        run_config: Mapping[str, Any] | None = None,
        dead: Iterable[int] = (),
    ) -> None:
        self.app = app
        self._run = Run.create_empty(1)
        self.dead = set(dead)
        self.contexts = {
            FIRST_NODE + k: Context(
                run_id=1,
                node_id=FIRST_NODE + k,
                node_config={"partition-id": k, "num-partitions": num_clients},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for k in range(num_clients)
        }
        self._replies: dict[str, Message] = {}
        self._count = 0

    def set_run(self, run: Run) -> None:
        """Take a run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """Return the run's description."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes, client by client."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Answer each message, and keep the answer until it is pulled."""
        pushed = []
        for message in messages:
            self._count += 1
            number = str(self._count)
            reply = self._deliver(message)
            if reply is not None:
                self._replies[number] = reply
            pushed.append(number)
        return pushed

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the answers that there are."""
        return [self._replies.pop(m) for m in message_ids if m in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Yield the answers, one message at a time; a dead node gives none."""
        for message in messages:
            yield from self.pull_messages(self.push_messages([message]))

    def _deliver(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        context = self.contexts[node]
        if context.node_config["partition-id"] in self.dead:
            return None
        with _acting_as(node):
            try:
                return self.app(message, context)
            except CRASHES as error:  # is that client's failure, as where it is deployed
                reason = f"{type(error).__name__}: {error}"
                return Message(Error(CLIENT_FAILED, reason), reply_to=message)


@contextlib.contextmanager
def _acting_as(node: int) -> Iterator[None]:
    TaskIdentity.node_id = node
    try:
        yield
    finally:
        TaskIdentity.node_id = SERVER_NODE


def run_apps(server: ServerApp, grid: InProcessGrid, run_config: Mapping[str, Any]) -> None:
    """Run a ServerApp on a grid of this process, from its start to its end."""
    TaskIdentity.task_id, TaskIdentity.run_id = 1, grid.run.run_id
    TaskIdentity.node_id = SERVER_NODE
    context = Context(
        run_id=grid.run.run_id,
        node_id=SERVER_NODE,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    server(grid, context)
