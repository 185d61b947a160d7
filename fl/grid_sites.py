"""Clients behind a grid, in each phase of a federation that learns bits."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from flwr.serverapp import Grid

from fl.grid_transport import GridTransport
from fl.opening import Opening
from fl.phase_settings import PhaseSettings
from fl.record import Failure
from fl.rounds import Rounds
from fl.setting import Setting
from fl.sites import OwnModel


@dataclass
class GridSites:
    """The nodes of a grid.

    Args:
        grid: Flower's, or :class:`fl.grid.InProcessGrid`.
        settings: of the federation.
        number: of clients.
        round_seconds: how long the clients of a round may take, or None.
    """

    grid: Grid
    settings: PhaseSettings
    number: int
    round_seconds: float | None = None

    known: None = field(default=None, init=False)
    """The server knows nothing of the clients beforehand."""

    def __post_init__(self) -> None:
        self._phases: list[GridTransport] = []
        self._agreed = self.settings.identity()

    @property
    def opened_bytes(self) -> int:
        """Return the bytes of the models that were sent before a phase."""
        return sum(size for each in self._phases[-1].sent.values() for size in each.values())

    def open(self, opening: Opening, setting: Setting, folder: Path | None) -> GridTransport:
        """Return what carries the messages of a phase; states are found by the first one's name."""
        found = GridTransport(
            self.grid, setting, self.number, self.round_seconds, opening=opening,
            agreed=self._agreed,
        )  # fmt: skip
        if self._phases:  # what one phase commits, the next begins with
            found.restore(self._phases[-1].commit(0))
            found.trained.clear()  # in this phase
        self._phases.append(found)
        return found

    def own_models(self, rounds: Rounds, clients: Iterable[int]) -> list[OwnModel | Failure]:
        """Return what the clients say of their models, which stay with them."""
        requests = rounds.requests("own", clients, None, evaluate=True)
        found: list[OwnModel | Failure] = []
        for answer in self._phases[-1].ask(requests):
            if isinstance(answer, Failure):
                found.append(answer)
                continue
            evaluations = answer.record.values.get("evaluations", {})
            told = evaluations.get(str(answer.client), {})
            found.append(OwnModel(answer.client, {}, told))
        return found
