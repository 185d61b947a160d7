"""FINN+ without Xilinx's tools, and without what it leaves behind in a process.

FINN+ looks for a settings file, a build folder and the version of Vivado in environment variables,
and imports names of a simulator that is compiled with Vivado. Its front end and its code generation
use none of these tools; they only have to be named.

Source: finn-plus 1.6.1, ``finn/util/settings.py``, ``finn/interface/settings.py``,
``finn/xsi/__init__.py``
"""

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

NEEDED = (
    "finn", "mip", "cffi", "mashumaro", "yaml", "pandas", "sklearn", "jinja2", "psutil",
    "onnx_passes", "click", "bitstring",
)  # fmt: skip
"""What FINN+'s front end imports."""

INSTALL = "pip install --no-deps finn-plus==1.6.1 mip==1.17.0 onnx-passes==0.4.1"


def missing() -> list[str]:
    """Return the packages FINN+ needs that are not installed; empty if it can run."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def has_vendor_tools() -> bool:
    """Return whether Vivado and Vitis HLS can be called."""
    return shutil.which("vivado") is not None and shutil.which("vitis_hls") is not None


@contextlib.contextmanager
def finn_environment(folder: Path | None = None) -> Iterator[Path]:
    """Let FINN+ be imported and run; put everything else back afterwards.

    Inside, FINN writes to ``folder``, warnings are ignored, and what is printed is swallowed.

    Args:
        folder: FINN's build folder; None for a temporary one that is removed.
    """
    environment, level = dict(os.environ), logging.root.manager.disable
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.callback(_restore, environment)
        stack.callback(logging.disable, level)
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        set_up(folder)
        yield folder


def set_up(folder: Path) -> None:
    """Name what FINN+ looks for. Only what the user has not named is made up.

    Args:
        folder: FINN's build folder.
    """
    os.environ["FINN_BUILD_DIR"] = str(folder)
    # its default is a file in the home folder, which it would make
    os.environ.setdefault("FINN_SETTINGS", str(folder / "settings.yaml"))
    if not has_vendor_tools():  # only the version in the path is read
        os.environ.setdefault("XILINX_VIVADO", "/not/installed/Vivado/2024.2")
        os.environ.setdefault("XILINX_VITIS", "/not/installed/Vitis/2024.2")
        os.environ.setdefault("XILINX_HLS", "/not/installed/Vitis_HLS/2024.2")
    settings = importlib.import_module("finn.util.settings")
    settings.initialize_dummy_settings()
    simulator = importlib.import_module("finn.xsi")
    if not has_vendor_tools():
        for name in simulator._LAZY_NAMES:
            vars(simulator).setdefault(name, None)


def _restore(environment: dict[str, str]) -> None:
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)
