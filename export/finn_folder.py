"""What stands beside the model in a FINN export folder, and running its build.

The folder needs no installation of this package: ``build.py`` has the settings, ``finn_flow`` the
steps, ``folding.json`` what the user decides about parallelism.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export import finn_flow
from export.finn_flow import environment
from export.format import ToolMissing
from sdq.errors import RequestError, RunError

SCRIPT = "build.py"
REPORTS = Path("build") / "report"


@dataclass(frozen=True)
class Board:
    """A board, or a part without one, and its clock.

    Args:
        board: FINN's name, None for a bare part.
        part: AMD's name.
        clock_ns: the period that synthesis aims at.
    """

    board: str | None
    part: str
    clock_ns: float


BOARDS = {
    "pynq_z2": Board("Pynq-Z2", "xc7z020clg400-1", 10.0),
    "ultra96": Board("Ultra96-V2", "xczu3eg-sbva484-1-i", 5.0),
    "zcu102": Board("ZCU102", "xczu9eg-ffvb1156-2-e", 5.0),
    "alveo_u50": Board("U50", "xcu50-fsvh2104-2L-e", 5.0),
}
"""By the name of a target. Source: finn-plus 1.6.1, finn/util/basic.py; the clocks are those FINN's
examples are built with on these families."""

DEFAULT_TARGET = "pynq_z2"
DEFAULT_FPS = 100

_ERROR = re.compile(r"(\[[^]]*\] )?(\w*(Error|Exception): |.*FINN.* ERROR: )")
"""A line that ends a traceback, or that FINN logs when it gives up."""

_SCRIPT = '''"""Builds the accelerator: python build.py --help"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER))

SETTINGS = {{
    "board": {board!r},
    "part": {part!r},
    "clock_ns": {clock_ns!r},
    "target_fps": {fps!r},
}}

if __name__ == "__main__":
    from finn_flow.build import main

    sys.exit(main(FOLDER, SETTINGS))
'''

_README = """# {name}

`model_finn.onnx` is the network for FINN+ 1.6.1. `python build.py` makes the accelerator for
{board} ({part}), {clock_ns} ns, {fps} frames a second:

- anywhere: streamlining, hardware layers, folding, estimates (`build/report/*.json`), HDL and HLS
  sources of every layer (`build/work`);
- with Vivado and Vitis HLS on the path: IP, FIFO depths, bitstream, driver as well (`build`).

`python build.py --help` lists what can be changed. `build/report/auto_folding_config.json` is the
parallelism FINN chose; copy it to `folding.json` and change it to choose yourself.

FINN+ without its pinned dependencies, in an environment with torch, onnx and qonnx:

    {install}

On the host remain: the transposition of an image to H x W x C, and the largest output's index.
"""


def board_of(metadata: Mapping[str, str]) -> tuple[Board, int]:
    """Return the board and the frames a second that metadata asks for, by ``target`` and ``fps``.

    Raises:
        RequestError: no such target, or frames that are no whole positive number.
    """
    target, fps = metadata.get("target", DEFAULT_TARGET), metadata.get("fps", str(DEFAULT_FPS))
    if target not in BOARDS:
        raise RequestError(
            f"finn: target must be one of {', '.join(BOARDS)}, got {target!r}; leave it out, and "
            f"name a board or part in {SCRIPT}"
        )
    if not fps.isdigit() or not int(fps):
        raise RequestError(
            f"finn: fps must be a whole number above 0, got {fps!r}; it is the frames a second "
            "that FINN folds for"
        )
    return BOARDS[target], int(fps)


def write(folder: Path, metadata: Mapping[str, str]) -> None:
    """Write what belongs to the model.

    Args:
        folder: the export folder.
        metadata: of the file; ``target``, ``fps`` and ``run`` are read.

    Raises:
        RequestError: of :func:`board_of`.
    """
    board, fps = board_of(metadata)
    values = asdict(board) | {"fps": fps}
    (folder / SCRIPT).write_text(_SCRIPT.format(**values), encoding="utf-8")
    name = metadata.get("run", "Network for FINN")
    install = environment.INSTALL
    readme = _README.format(**values, name=name, install=install)
    (folder / "README.md").write_text(readme, encoding="utf-8")
    (folder / "folding.json").write_text("{}\n", encoding="utf-8")
    (folder / "finn_flow").mkdir()
    for source in sorted(Path(finn_flow.__file__).parent.glob("*.py")):
        (folder / "finn_flow" / source.name).write_bytes(source.read_bytes())


def build(folder: Path) -> dict[str, Any]:
    """Run ``build.py`` of an export folder in a process of its own.

    Returns:
        ``resources`` in total (LUT, BRAM_18K, DSP, ...), ``cycles`` by layer, ``performance``, and
        ``reports``, the folder of FINN's reports.

    Raises:
        ToolMissing: FINN+ is not installed.
        RunError: FINN+ fails; the message has its last error, and the log's path.
    """
    check_installed()
    log = folder / "build" / "console.log"
    log.parent.mkdir(exist_ok=True)
    variables = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    with open(log, "w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", SCRIPT], cwd=folder, stdin=subprocess.DEVNULL,
            stdout=file, stderr=subprocess.STDOUT, env=variables, check=False,
        )  # fmt: skip
    reports = folder / REPORTS
    if done.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if _ERROR.match(line)]
        reason = (errors or lines or ["no output"])[-1]
        raise RunError(f"{folder}: FINN+ fails: {reason:.300}; see {log}")
    performance, resources, cycles = (
        json.loads((reports / f"estimate_{name}.json").read_text(encoding="utf-8"))
        for name in ("network_performance", "layer_resources", "layer_cycles")
    )
    return {
        "resources": resources["total"],
        "cycles": cycles,
        "performance": performance,
        "reports": str(reports),
    }


def check_installed() -> None:
    """Raise ToolMissing if FINN+ cannot run here."""
    missing = environment.missing()
    if missing:
        raise ToolMissing(
            f"FINN+ needs packages that are not installed ({', '.join(missing)}); "
            "run make finn, or see docs/finn.md"
        )
