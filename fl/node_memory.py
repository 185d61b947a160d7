"""What one client keeps between messages: in Flower's context, or in a folder of its own."""

from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict

from fl.messages import packed, unpacked
from fl.record import Record, Tensors, load, save
from fl.store import ByRound

OPENING, MODEL = "opening", "model"


class NodeMemory:
    """One client's memory of one federation.

    What it trained is by phase, where there are phases. A folder has more: the records of two
    rounds, since a client cannot know which the server's last was.

    Args:
        folder: of all federations on this node, or None.
        context: Flower's.
        federation: its name.
        client: its number.
    """

    def __init__(self, folder: Path | None, context: Context, federation: str, client: int) -> None:
        self.context = context
        self.folder = None if folder is None else folder / federation / str(client)

    def before(self, round: int, phase: str = "") -> Record | None:
        """Return what the client kept in the newest earlier round."""
        if self.folder is not None:
            return ByRound(self.folder / phase).before(round)
        return self._held(phase)

    def last(self, phase: str) -> Record | None:
        """Return what the client kept last in a phase."""
        if self.folder is not None:
            return ByRound(self.folder / phase).last()
        return self._held(phase)

    def write(self, record: Record, round: int, phase: str = "") -> None:
        """Keep the record of a round."""
        if self.folder is not None:
            ByRound(self.folder / phase).put(record, round)
        else:
            self._hold(phase, record)

    # --- how a phase begins

    def open(self, values: dict[str, Any]) -> None:
        """Keep what the server told of a phase; Flower's memory is cleared of what it outlives."""
        self._put(OPENING, Record({}, values))
        if self.folder is None:
            models = values["models"]
            needed = {OPENING, *(f"{MODEL}.{name}" for name in models), "float", values["phase"]}
            if "start" in models:
                needed.add("search")
            self._forget({name.partition("/")[0] for name in self.context.state} - needed)

    def opening(self) -> dict[str, Any] | None:
        """Return what the server told of the current phase."""
        found = self._get(OPENING)
        return None if found is None else found.values

    def put_model(self, name: str, state: Tensors) -> None:
        """Keep a model that a phase begins with."""
        self._put(f"{MODEL}.{name}", Record({"model": state}))

    def model(self, name: str) -> Tensors:
        """Return it; none if the server never sent it."""
        found = self._get(f"{MODEL}.{name}")
        return {} if found is None else found.model

    # --- one record by name

    def _get(self, name: str) -> Record | None:
        if self.folder is None:
            return self._held(name)
        path = self.folder / f"{name}.safetensors"
        return load(path) if path.is_file() else None

    def _put(self, name: str, record: Record) -> None:
        if self.folder is None:
            self._hold(name, record)
        else:
            save(self.folder / f"{name}.safetensors", record)

    def _held(self, name: str) -> Record | None:
        place = f"{name}/"
        state = self.context.state
        return unpacked(state, place) if f"{place}values" in state else None

    def _hold(self, name: str, record: Record) -> None:
        self._forget({name})
        rest = dict(self.context.state.items())
        self.context.state = RecordDict({**rest, **packed(record, f"{name}/")})

    def _forget(self, names: set[str]) -> None:
        self.context.state = RecordDict(
            {n: r for n, r in self.context.state.items() if n.partition("/")[0] not in names}
        )
