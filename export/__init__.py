"""Files that leave PyTorch, and the proof that they compute what PyTorch computed.

:func:`write` puts a quantized network into a file, :func:`verify` reads the file back and compares
it with the network, code by code. A format is one module in ``export/formats``; importing this
package imports no ONNX.
"""

from export.format import ExportResult, Format, QuantizerInFile, Trace, write
from export.report import VerifyReport
from export.verify import verify

__all__ = [
    "ExportResult",
    "Format",
    "QuantizerInFile",
    "Trace",
    "VerifyReport",
    "verify",
    "write",
]
