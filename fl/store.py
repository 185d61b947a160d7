"""Records of many clients, in memory or one file each, so that a thousand need no memory."""

from pathlib import Path

from fl.record import Record, load, save
from sdq.errors import RequestError


class Store:
    """The last record of each client.

    On disk a file is named after client and round, and an older one goes only at
    :meth:`forget_old_`, after the round's index was saved elsewhere: a run killed in mid-round
    finds every client as it was when the last whole round ended.

    Args:
        folder: where files are written, or None for memory.
        index: client and round of what is there already.
    """

    def __init__(self, folder: Path | None = None, index: dict[int, int] | None = None) -> None:
        self.folder = folder
        self.index = dict(index or {})
        self._memory: dict[int, Record] = {}
        for client in self.index:
            if folder is None or not self._path(client).is_file():
                raise RequestError(
                    f"{folder}: the state of client {client} must be there, got no file; "
                    "the folder is not whole, start in a new one"
                )

    def __contains__(self, client: int) -> bool:
        return client in self.index

    def __getitem__(self, client: int) -> Record:
        """Return a client's record; KeyError if there is none."""
        if self.folder is None:
            return self._memory[client].copy()
        return load(self._path(client))

    def get(self, client: int) -> Record | None:
        """Return a client's record, or None."""
        if client not in self.index:
            return None
        return self[client]

    def put(self, client: int, record: Record, round: int) -> None:
        """Keep a client's record of a round."""
        self.index[client] = round
        if self.folder is None:
            self._memory[client] = record
        else:
            save(self._path(client), record)

    def drop(self, client: int) -> None:
        """Forget a client's record, if there is one."""
        self.index.pop(client, None)
        self._memory.pop(client, None)

    def forget_old_(self) -> None:
        """Delete the files that the index does not name."""
        if self.folder is not None and self.folder.is_dir():
            current = {self._path(client) for client in self.index}
            for path in self.folder.glob("*.safetensors"):
                if path not in current:
                    path.unlink()

    def _path(self, client: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{client:06d}-{self.index[client]:06d}.safetensors"


class ByRound:
    """One client's record of its last rounds, on its own disk, for a server elsewhere.

    The client cannot know whether a round that it answered was the server's last before it was
    killed. It keeps two records, and a request of round ``r`` finds the newest of an earlier
    round: what was learned in a round that is asked for again is forgotten.

    Args:
        folder: of one client in one federation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, round: int) -> Record | None:
        """Return the newest record of a round before this one, or None."""
        earlier = [path for number, path in self._files() if number < round]
        return load(earlier[-1]) if earlier else None

    def last(self) -> Record | None:
        """Return the newest record, or None."""
        files = self._files()
        return load(files[-1][1]) if files else None

    def put(self, record: Record, round: int) -> None:
        """Keep the record of a round."""
        save(self.folder / f"{round:06d}.safetensors", record)
        # what is later is of an attempt that this one repeats
        later = [path for number, path in self._files() if number > round]
        earlier = [path for number, path in self._files() if number < round]
        for path in (*later, *earlier[:-1]):
            path.unlink()

    def _files(self) -> list[tuple[int, Path]]:
        if not self.folder.is_dir():
            return []
        return sorted((int(path.stem), path) for path in self.folder.glob("[0-9]*.safetensors"))
