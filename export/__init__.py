"""Files that leave PyTorch, and the proof that they compute what PyTorch computed.

:func:`prepare` says how a network must be quantized for what will run it, and :func:`check` what
stands against that. :func:`write` puts a quantized network into a file, :func:`verify` reads the
file back and compares it with the network, code by code; :func:`simulate_layers` does so with
layers of the hardware that a format's compiler wrote. A format is one module in
``export/formats``; importing this package imports no ONNX.
"""

from export.findings import Finding
from export.format import (
    ExportResult,
    Format,
    QuantizerInFile,
    Trace,
    check,
    rehearse,
    write,
)
from export.preparation import prepare
from export.report import VerifyReport
from export.simulate import SimulatedLayer, simulate_layers
from export.verify import verify

__all__ = [
    "ExportResult",
    "Finding",
    "Format",
    "QuantizerInFile",
    "SimulatedLayer",
    "Trace",
    "VerifyReport",
    "check",
    "prepare",
    "rehearse",
    "simulate_layers",
    "verify",
    "write",
]
