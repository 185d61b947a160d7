"""Runs a compiled hls4ml project on images: a program of its own.

A compiled network may crash, and takes the process with it that loaded it. So this file is run, not
imported: ``python hls4ml_simulation.py LIBRARY SPEC.json INPUTS.npy OUTPUTS.npz``. It needs NumPy
alone.
"""

import ctypes
import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

STACK_BYTES = 1 << 29
"""The network's arrays lie on the stack."""


class _Traced(ctypes.Structure):
    """What the library returns of a layer: its name, and a pointer to its values."""

    _fields_ = (("name", ctypes.c_char_p), ("data", ctypes.c_void_p))


def simulate(library: Path, spec: dict[str, Any], inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Run images one at a time.

    Args:
        library: the compiled project.
        spec: ``function``, ``output`` (its number of values) and ``traced``: layers whose values
            are wanted, with their numbers of values.
        inputs: float64 ``(N, H, W, C)``.

    Returns:
        ``output`` and the traced layers, float64 ``(N, values)``.
    """
    loaded = ctypes.CDLL(str(library))
    function, sizes = getattr(loaded, spec["function"]), spec["traced"]
    pointer = ctypes.POINTER(ctypes.c_double)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("output", *sizes)}
    traced = (_Traced * len(sizes))()
    if sizes:
        loaded.allocate_trace_storage(ctypes.c_size_t(ctypes.sizeof(ctypes.c_double)))
    for image in inputs:
        image, output = np.ascontiguousarray(image), np.zeros(spec["output"])
        function(image.ctypes.data_as(pointer), output.ctypes.data_as(pointer))
        found["output"].append(output)
        if sizes:
            loaded.collect_trace_output(traced)
        for entry in traced:
            name = entry.name.decode()
            values = np.ctypeslib.as_array(ctypes.cast(entry.data, pointer), (sizes[name],))
            found[name].append(values.copy())
    return {name: np.stack(values) for name, values in found.items()}


def main(library: str, spec: str, inputs: str, outputs: str) -> None:
    """Simulate from files to a file."""
    content = json.loads(Path(spec).read_text(encoding="utf-8"))
    found: dict[str, Any] = simulate(Path(library), content, np.load(inputs))
    np.savez(outputs, **found)


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=main, args=sys.argv[1:5])
    thread.start()
    thread.join()
