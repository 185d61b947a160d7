"""A client's own model, as it was when its specialization was measured; and as a run folder.

The folder has the form that ``sdq evaluate`` and ``sdq quantize --from`` take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl.record import Record, Tensors
from sdq.run_folder import SCHEMA, RunFolder, versions


@dataclass(frozen=True)
class Personal:
    """A client's own model, and what it was measured with.

    Args:
        state: by the user's names.
        round: that it was trained in, counted from 1.
        evaluation: metrics on the client's ``val`` and ``test`` images, where it has such.
    """

    state: Tensors
    round: int
    evaluation: dict[str, Any]

    def put(self, record: Record) -> None:
        """Add it to what the client keeps."""
        record.tensors["personal"] = self.state
        record.values["personal"] = {"round": self.round, "evaluation": self.evaluation}

    @classmethod
    def taken(cls, record: Record) -> "Personal | None":
        """Take it out of what the client keeps, if it is there."""
        state, said = record.tensors.pop("personal", None), record.values.pop("personal", None)
        return None if state is None or said is None else cls(state, **said)

    def write(self, path: Path, described: Mapping[str, Any]) -> None:
        """Write a run folder.

        Args:
            path: of the folder; what is in it from an earlier round is replaced.
            described: what ``run.json`` says of data and network.
        """
        path.mkdir(parents=True, exist_ok=True)
        run = RunFolder(path)
        begun = {"schema": SCHEMA, "status": "running", "versions": versions(), **described}
        run.write_json("run.json", begun)
        run.write_tensors("model.safetensors", self.state)
        figures = {"float": self.evaluation["test"]} if "test" in self.evaluation else {}
        run.write_json("metrics.json", {**figures, **self.evaluation, "round": self.round})
        run.update(status="done")
