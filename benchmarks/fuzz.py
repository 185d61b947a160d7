"""Damaged files given to every reader: what may come is success, a RequestError or a RunError.

    python benchmarks/fuzz.py --count 10000 --table benchmarks/results/fuzz.md

For each case one file of a sound set is damaged (``_mutations*.py``) and read in this process,
under a clock and a limit on memory. A defect is any other exception, a case that takes too long,
and a file that is written: readers write none. Each reader has a process of its own, so that a
crash is a defect of one reader and not the end. A case is repeated with ``--reader NAME --only
NUMBER``.
"""

import contextlib
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import _corpus
import _mutations as change
import _mutations_images as pictures
import _mutations_onnx as graphs
import _reports
from _reader import Reader

from sdq.errors import RequestError, RunError

SECONDS = 20
"""A case may take so much time of a processor; sound files take a fiftieth of it."""

WAIT = 600
"""A case may last so many seconds: on a machine with other work it waits for the processor."""

BYTES = 3 * 2**30
"""A case may ask for so much memory beyond what the process has."""


KINDS: dict[str, tuple[change.Mutation, ...]] = {
    ".json": (change.change_json,), ".jsonl": (change.change_json_lines,),
    ".csv": (change.change_csv,), "": (change.change_csv,), ".tab": (change.change_csv,),
    ".nii": (pictures.change_nifti,), ".gz": (pictures.change_gzip,),
    ".mhd": (pictures.change_fields,),
    ".xml": (change.change_xml,), ".txt": (change.change_lines,), ".py": (change.change_python,),
    ".npz": (change.change_npz,), ".npy": (change.change_npy,),
    ".safetensors": (change.change_safetensors,), ".dcm": (pictures.change_dicom,),
    ".png": (pictures.change_png, pictures.other_mode), ".jpg": (pictures.other_mode,),
    ".onnx": (graphs.change_onnx,),
}  # fmt: skip
"""By the end of a file's name: the mutations that know what is in it."""

WRITING = (
    "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.system",
    "subprocess.Popen", "socket.connect",
)  # fmt: skip


@dataclass(frozen=True)
class Defect:
    """What went wrong in a case."""

    reader: str
    number: int
    mutation: str
    what: str


class Hang(BaseException):
    """A case took too long; no reader may catch it."""


def mutations_of(path: Path) -> tuple[change.Mutation, ...]:
    """Return the ways to damage a file, by its kind; half of the cases know the kind."""
    known = KINDS.get(path.suffix, ())
    return known * (len(change.BYTES) // len(known)) + change.BYTES if known else change.BYTES


def damage_(folder: Path, files: tuple[str, ...], rng: random.Random) -> str:
    """Damage one of the files; return which and how."""
    path = folder / rng.choice(files)
    if not path.is_file():
        return f"{path.name}: as it is"
    if rng.random() < 0.01:
        path.unlink()
        return f"{path.name}: removed"
    if rng.random() < 0.01:
        path.unlink()
        path.mkdir()
        return f"{path.name}: a folder"
    mutation, data = rng.choice(mutations_of(path)), path.read_bytes()
    try:
        changed = mutation(rng, data)
    except Exception:  # noqa: BLE001 - what was damaged before, a mutation may not read
        changed = change.flip(rng, data)
    path.write_bytes(changed)
    return f"{path.name}: {mutation.__name__}"


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """Return size and time of change of every file below a folder."""
    return {
        str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in folder.rglob("*")
    }


class Watch:
    """What a reader writes or removes anywhere, seen by Python's audit events."""

    def __init__(self) -> None:
        self.found: list[str] | None = None
        sys.addaudithook(self._hear)  # cannot be taken away again; asleep while found is None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.found is None:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(path, int) or not (flags or 0) & 0o3 or str(path) == "/dev/null":
                return
            self.found.append(f"opened {path!r} to write ({mode})")
        elif event in WRITING:
            self.found.append(f"{event} {arguments!r:.100}")

    @contextlib.contextmanager
    def __call__(self) -> Iterator[list[str]]:
        """Return the list of what is done meanwhile."""
        self.found = found = []
        try:
            yield found
        finally:
            self.found = None


@contextlib.contextmanager
def limits(seconds: float, memory: int) -> Iterator[None]:
    """Stop what takes too long, and refuse more memory than that."""

    def late(*_: object) -> None:
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = [signal.signal(kind, late) for kind in (signal.SIGPROF, signal.SIGALRM)]
    resource.setrlimit(resource.RLIMIT_AS, (used + memory, before[1]))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, WAIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        for kind, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(kind, handler)


def judge(reader: Reader, folder: Path, watch: Watch) -> str | None:
    """Read damaged files; return what is wrong with how that ended, or None."""
    before = contents(folder)
    wrong = None
    with watch() as done, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as the command line does
        try:
            with limits(SECONDS, BYTES):
                reader.read(folder)
        except (RequestError, RunError) as error:
            if len(str(error)) > 2000:
                wrong = f"a message of {len(str(error))} characters: {error!s:.200}"
        except OSError as error:  # of a writer: the command line names the file
            wrong = None if reader.writes and error.filename else traceback.format_exc()
        except Hang:
            wrong = f"took more than {SECONDS} s of a processor, or {WAIT} s"
        except BaseException:  # noqa: BLE001 - whatever else comes is what is looked for
            wrong = traceback.format_exc()
    outside = [x for x in done if not (reader.writes and str(folder) in x)]
    if outside:
        wrong = f"{wrong or ''}\n{'; '.join(outside)}"
    if not reader.writes and contents(folder) != before:
        wrong = f"{wrong or ''}\nfiles changed"
    return wrong


def run_cases(name: str, sound: Path, numbers: range, seed: int, watch: Watch) -> list[Defect]:
    """Run cases of one reader; each follows from the seed and its number alone."""
    reader, found = _corpus.READERS[name], []
    whole = {file: (sound / reader.folder / file).read_bytes() for file in reader.files}
    with tempfile.TemporaryDirectory(prefix="sdq-fuzz-") as scratch:
        folder = Path(scratch) / "case"
        for number in numbers:
            if reader.writes or not folder.exists():  # else only what was damaged is put back
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(sound / reader.folder, folder)
            rng = random.Random(f"{seed} {name} {number}")
            how = damage_(folder, reader.files, rng)
            if rng.random() < 0.1:
                how += ", " + damage_(folder, reader.files, rng)
            if (what := judge(reader, folder, watch)) is not None:
                found.append(Defect(name, number, how, what))
            for file, data in whole.items():
                if (folder / file).is_dir():
                    (folder / file).rmdir()
                (folder / file).write_bytes(data)
    return found


def check_sound(reader: Reader, sound: Path, watch: Watch) -> str | None:
    """Return what is wrong with reading the files as they are, which must succeed."""
    with tempfile.TemporaryDirectory(prefix="sdq-whole-") as scratch:
        folder = Path(scratch) / "case"  # what goes on with a run would change the sound files
        shutil.copytree(sound / reader.folder, folder)
        with watch() as done, limits(10 * SECONDS, BYTES), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(folder)
    return f"wrote: {done}" if done and not reader.writes else None


def one_reader(name: str, numbers: range, seed: int) -> list[Defect]:
    """Write the sound files of a reader, read them, and run its cases."""
    watch = Watch()
    reader = _corpus.READERS[name]
    with tempfile.TemporaryDirectory(prefix="sdq-sound-") as home:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _corpus.write(Path(home), {reader.folder})
        if (wrong := check_sound(reader, Path(home), watch)) is not None:
            return [Defect(name, -1, "the sound files", wrong)]
        return run_cases(name, Path(home), numbers, seed, watch)


def _in_child(found: Connection, name: str, numbers: range, seed: int) -> None:
    found.send(one_reader(name, numbers, seed))


def apart(name: str, numbers: range, seed: int) -> list[Defect] | None:
    """Return the defects of a reader, run in a process of its own; None if that crashed."""
    context = multiprocessing.get_context("fork")  # imports take longer than many cases
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(there, name, numbers, seed))
    child.start()
    there.close()
    try:
        found: list[Defect] = here.recv()
    except EOFError:
        return None
    finally:
        child.join()
    return found


def main() -> None:
    """Run the cases of all readers, each in a process of its own, and write the table."""
    parser = _reports.parser(__doc__)
    parser.add_argument("--count", type=int, default=1000, help="cases over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--reader", choices=sorted(_corpus.READERS), help="this one, in this process"
    )
    parser.add_argument("--only", type=int, help="the number of one case")
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    names = _corpus.available()
    each = -(-options.count // len(names))
    numbers = range(each)
    if options.only is not None:
        numbers = range(options.only, options.only + 1)
    if options.reader is not None:
        defects = one_reader(options.reader, numbers, options.seed)
        _print(defects)
        sys.exit(bool(defects))
    rows = []
    for name in names:
        rows.append(_row(name, numbers, options.seed))
        print(rows[-1], flush=True)
    lines = [
        "# Damaged files", "", f"`{_reports.command()}`", "",
        f"{each * len(names)} cases; anything but success, a RequestError or a RunError is a "
        "defect.", "", "| reader | cases | defects | seconds |", "|---|---|---|---|", *rows,
    ]  # fmt: skip
    _reports.write(options.table, lines)


def _print(defects: list[Defect]) -> None:
    for defect in defects:
        print(f"--- {defect.reader} {defect.number} ({defect.mutation})\n{defect.what}")


def _row(name: str, numbers: range, seed: int) -> str:
    start = time.monotonic()
    found = apart(name, numbers, seed)
    _print(found or [])
    defects = "the process ended" if found is None else str(len(found))
    return f"| {name} | {len(numbers)} | {defects} | {time.monotonic() - start:.0f} |"


if __name__ == "__main__":
    main()
