"""What is seen of a federation while it runs, and what its log keeps of each round."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fl.evaluation import MAIN
from fl.record import Failure, Kind, Reply
from fl.results import log_round
from sdq.run_folder import RunFolder

DOING = {"counts": "counting", "train": "training", "adapt": "adapting", "collect": "collecting"}


class FederationWatch:
    """Two bars, of rounds and of clients in the round; each round goes to the run's log.

    Use as a context manager.

    Args:
        run: whose log is written.
        method: its name.
        rounds: of the federation; where bits are learned, of each phase.
        clients: asked in a round.
        names: of all clients, by number.
        quiet: show nothing.
    """

    def __init__(
        self, run: RunFolder, method: str, rounds: dict[str, int], clients: int,
        names: list[str], *, quiet: bool,
    ) -> None:  # fmt: skip
        self.run, self.method, self.clients, self.names = run, method, clients, names
        self.quiet = quiet
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=quiet,
        )
        self.totals, self.phase = rounds, next(iter(rounds))
        title = "rounds" if len(rounds) == 1 else self.phase
        self.rounds = self.progress.add_task(
            f"{method}: {title}", total=rounds[self.phase], note=""
        )
        self.current = self.progress.add_task("clients", total=clients, note="")
        self.doing = ""

    def __enter__(self) -> "FederationWatch":
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def answer(self, kind: Kind, answer: Reply | Failure) -> None:
        """Take a client's answer."""
        if kind != self.doing:
            self.doing = kind
            total = self.clients if kind == "train" else None
            self.progress.reset(self.current, total=total, description=DOING[kind])
        name = self.names[answer.client] if answer.client < len(self.names) else ""
        loss = None if isinstance(answer, Failure) else answer.record.values.get("train_loss")
        note = name if loss is None else f"{name} loss {loss:.4f}"
        self.progress.update(self.current, advance=1, note=note)
        if isinstance(answer, Failure) and not self.quiet:
            self.progress.console.print(
                f"client {answer.client} ({name}) is left out: {answer.reason}", markup=False
            )

    def round(self, summary: dict[str, Any]) -> None:
        """Take a round's summary, or what went wrong before the first.

        Where bits are learned it has a ``phase``, and each phase a bar that begins anew.
        """
        log_round(self.run, summary)
        if "round" not in summary:
            return
        phase = summary.get("phase", "float")
        if phase != self.phase:
            self.phase = phase
            self.progress.reset(
                self.rounds, total=self.totals.get(phase), description=f"{self.method}: {phase}"
            )
        self.doing = ""
        g, s = (summary.get(k, {}).get("test", {}) for k in ("generalization", "specialization"))
        figures = (
            f"{letter} {found[main]:.3f}"
            for letter, found in (("G", g), ("S", s))
            for main in MAIN.values()
            if main in found
        )
        self.progress.update(self.rounds, completed=summary["round"] + 1, note=" ".join(figures))
