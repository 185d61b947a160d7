"""Verilator on one hardware layer: its words in by AXI stream, its words out, and its cycles.

The layer is a module with the clock ``ap_clk``, the reset ``ap_rst_n`` (active low) and the streams
``in0_V`` and ``out0_V``. Its sources are compiled as they are, with ``stream_bench.cpp``.

Source: W. Snyder et al., Verilator 5, https://verilator.org/guide/latest/
"""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.format import ToolMissing
from sdq.errors import RunError

PROGRAMS = ("verilator", "g++", "make")
PATIENCE = 20_000
"""Cycles without a word in or out after which a layer has finished, or stalls: FINN's window
generators wait for a few rows, its thresholds for some ten cycles."""

Words = NDArray[np.uint8]

_BENCH = Path(__file__).with_name("stream_bench.cpp")
_OPTIONS = (
    "--cc", "--exe", "--build", "--assert", "--structs-packed", "--prefix", "Vlayer",
    "-Wno-fatal", "-Wno-lint", "-Wno-style",  # foreign sources: their style is theirs
    "-MAKEFLAGS", "OPT_FAST=-O1 OPT_GLOBAL=-O0", "-CFLAGS", "-std=c++17",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Streamed:
    """What a layer gave.

    Args:
        words: ``(words, bytes)``, lowest byte first.
        cycles: from the first word in to the last one out that had to come.
    """

    words: Words
    cycles: int


def check_installed() -> None:
    """Raise ToolMissing if a layer cannot be compiled here."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise ToolMissing(
            f"simulating a layer needs {', '.join(missing)} on the path; "
            "on Debian: apt-get install verilator g++ make"
        )


class Bench:
    """A compiled layer.

    Args:
        top: the module's name.
        sources: Verilog and SystemVerilog files, packages first.
        data: the folder that paths of memory files in the sources start from.
        folder: to compile in. What is the same for every layer is compiled once in a folder.

    Raises:
        ToolMissing: Verilator or a compiler is not installed.
        RunError: the sources do not compile.
    """

    def __init__(self, top: str, sources: Sequence[Path], data: Path, folder: Path) -> None:
        check_installed()
        self.top, self.data, self.folder = top, data.resolve(), folder.resolve()
        files = [str(path.resolve()) for path in (*sources, _BENCH)]
        options = [*_OPTIONS, "--Mdir", str(self.folder), "--top-module", top, "-o", top]
        done = _run(["verilator", *options, *files], self.data)
        if done.returncode:
            lines = done.stderr.splitlines()
            reason = next(
                (x for x in lines if x.startswith("%Error") or "error:" in x), "no output"
            )
            raise RunError(f"{top}: Verilator cannot compile it: {reason:.300}")

    def __call__(
        self, words: Words, *, out_bytes: int, count: int, pauses: float = 0.0
    ) -> Streamed:
        """Stream words through the layer, from reset.

        Args:
            words: ``(words, bytes)``, lowest byte first.
            out_bytes: of a word that comes out.
            count: how many words have to come out; more may.
            pauses: share of the cycles, chosen at random, in which the source has no word, and the
                sink takes none.

        Raises:
            RunError: fewer words come out, or an assertion in the sources fails.
        """
        inputs, outputs = self.folder / f"{self.top}.in", self.folder / f"{self.top}.out"
        inputs.write_bytes(words.tobytes())
        numbers = (words.shape[1], out_bytes, count, round(1000 * pauses), PATIENCE)
        program = [str(self.folder / self.top), str(inputs), str(outputs), *map(str, numbers)]
        done = _run(program, self.data)
        if done.returncode not in (0, 3):
            lines = (done.stdout + done.stderr).splitlines() or ["no output"]
            raise RunError(f"{self.top}: the simulation fails: {lines[0]:.300}")
        cycles, taken, given = map(int, done.stdout.splitlines()[-1].split())
        if given < count:
            raise RunError(
                f"{self.top}: {count} words must come out, got {given} after {taken} of "
                f"{len(words)} words in"
            )
        found = np.frombuffer(outputs.read_bytes(), np.uint8)
        return Streamed(found.reshape(given, out_bytes), cycles)


def _run(command: list[str], folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def pack(values: NDArray[np.int64], bits: int, width: int) -> Words:
    """Return integers as words of a stream, the first one in the lowest bits.

    Args:
        values: ``(words, elements)``; of a negative one, its two's complement.
        bits: of an element.
        width: of a word in bits, a multiple of 8.
    """
    each = (values[..., None] >> np.arange(bits)) & 1  # (words, elements, bits)
    plain = each.astype(np.uint8).reshape(len(values), -1)
    return np.packbits(np.pad(plain, ((0, 0), (0, width - plain.shape[1]))), 1, bitorder="little")


def unpack(words: Words, bits: int, elements: int, *, signed: bool) -> NDArray[np.int64]:
    """Return the integers ``(words, elements)`` in the words of a stream; see :func:`pack`."""
    plain = np.unpackbits(words, 1, bits * elements, bitorder="little")
    each = plain.reshape(len(words), elements, bits).astype(np.int64)
    weights = np.int64(1) << np.arange(bits, dtype=np.int64)
    if signed:
        weights[-1] = -weights[-1]
    found: NDArray[np.int64] = each @ weights
    return found
