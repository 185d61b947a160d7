"""What is seen of a federation while it runs, and what its log keeps of each round."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fl.record import Failure, Kind, Reply
from sdq.run_folder import RunFolder

FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "per_class_recall")
DOING = {"counts": "counting", "train": "training", "adapt": "adapting", "collect": "collecting"}


class FederationWatch:
    """Two bars, of rounds and of clients in the round; each round goes to the run's log.

    Use as a context manager.

    Args:
        run: whose log is written.
        method: its name.
        rounds: of the federation.
        clients: asked in a round.
        names: of all clients, by number.
        quiet: show nothing.
    """

    def __init__(
        self, run: RunFolder, method: str, rounds: int, clients: int, names: list[str], *,
        quiet: bool,
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
        self.rounds = self.progress.add_task(f"{method}: rounds", total=rounds, note="")
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
        """Take a round's summary, or what went wrong before the first."""
        if "round" not in summary:
            self.run.log({"phase": "counts", "epoch": 0, "failures": summary["counts"]})
            return
        done = summary["round"] + 1
        record = short(summary)
        self.run.log({"phase": "federate", "epoch": done, "time": round(time.time(), 3), **record})
        self.doing = ""
        g, s = (record.get(k, {}).get("test", {}) for k in ("generalization", "specialization"))
        figures = (f"{k} {v['balanced_accuracy']:.3f}" for k, v in (("G", g), ("S", s)) if v)
        self.progress.update(self.rounds, completed=done, note=" ".join(figures))


def short(summary: dict[str, Any]) -> dict[str, Any]:
    """Return a round's summary without the figures of every view, its round counted from 1."""
    found = {**summary, "round": summary["round"] + 1}
    for name in ("generalization", "specialization"):
        if name in found:
            found[name] = {
                part: {k: v for k, v in figures.items() if k != "views"}
                for part, figures in found[name].items()
            }
    return found
