"""Where the clients of all phases are: in this process here, behind a grid in :mod:`fl.apps`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fl.client import try_answer
from fl.method import ClientData, Method
from fl.opening import Opening, carried, check_masks_known, data_of
from fl.personal import Personal
from fl.record import Failure, Record, Tensors
from fl.rounds import Rounds, Transport
from fl.run import STATE, InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.errors import RequestError


@dataclass(frozen=True)
class OwnModel:
    """A client's own model after one more round, or what is known of it.

    Args:
        client: its number.
        state: by the user's names; empty if it stays on the client's node.
        evaluation: on the client's own images; see :func:`fl.evaluation.evaluate`.
    """

    client: int
    state: Tensors
    evaluation: dict[str, Any]


class Sites(Protocol):
    """The clients of a federation, in each of its phases."""

    number: int
    """How many there are."""

    known: Any
    """What is known of them, as JSON has it; a federation that is taken up must have the same."""

    @property
    def opened_bytes(self) -> int:
        """Return the bytes of the models that were sent before a phase."""
        ...

    def open(self, opening: Opening, setting: Setting, folder: Path | None) -> Transport:
        """Return what carries the messages of a phase; its state is in the folder, or nowhere."""
        ...

    def own_models(self, rounds: Rounds, clients: Iterable[int]) -> list[OwnModel | Failure]:
        """Let clients train on the final model for a round more, and keep the result."""
        ...


class Here:
    """Clients in this process.

    Args:
        clients: their images.
        method: that arranges them.

    Raises:
        RequestError: there is none, or one has no masks.
    """

    def __init__(self, clients: Sequence[ClientData], method: Method) -> None:
        if not clients:
            raise RequestError("clients: there must be at least one, got none")
        for client in clients:
            check_masks_known(client)
        self.clients = method.arrange(clients)
        self.number = len(self.clients)
        self.known = [[c.name, len(c.train)] for c in self.clients]
        self._opened: dict[str, int] = {}
        self._ends: dict[str, InProcess] = {}

    @property
    def opened_bytes(self) -> int:
        """Return what one copy of each model for each client comes to."""
        return sum(self._opened.values())

    def open(self, opening: Opening, setting: Setting, folder: Path | None) -> InProcess:
        """Return the clients of a phase; they start from what they kept in those before."""
        store = Store(None if folder is None else folder / "clients")
        begun = folder is not None and (folder / STATE).is_file()
        if opening.phase != "float" and not begun:
            self._carry_over_(opening, setting, store)
        for name, state in opening.models.items():  # search and tuning have the same network
            self._opened[name] = Record({name: state}).num_bytes() * self.number
        clients = [data_of(client, opening.phase) for client in self.clients]
        self._ends[opening.phase] = InProcess(setting, clients, store)
        return self._ends[opening.phase]

    def _carry_over_(self, opening: Opening, setting: Setting, store: Store) -> None:
        before = self._kept_in("float")
        search = self._kept_in("search") if opening.start else Store()
        for client in sorted({*before.index, *search.index}):
            kept = carried(before.get(client), setting, search.get(client))
            if kept is not None:
                store.put(client, kept, 0)

    def _kept_in(self, phase: str) -> Store:
        return self._ends[phase].store if phase in self._ends else Store()

    def own_models(self, rounds: Rounds, clients: Iterable[int]) -> list[OwnModel | Failure]:
        """Return the models of these clients."""
        return [self._own_model(rounds, client) for client in clients]

    def _own_model(self, rounds: Rounds, client: int) -> OwnModel | Failure:
        (request,) = rounds.requests("own", [client], None, evaluate=True)
        kept = self._ends["tune"].store.get(client)
        reply, keeps = try_answer(rounds.setting, self.clients[client], request, kept)
        if isinstance(reply, Failure):
            return reply
        personal = None if keeps is None else Personal.taken(keeps)
        assert personal is not None
        evaluations = reply.record.values["evaluations"]
        # of one that pools others there are only theirs
        evaluation = {} if self.clients[client].pooled else evaluations.get(str(client), {})
        return OwnModel(client, personal.state, evaluation)
