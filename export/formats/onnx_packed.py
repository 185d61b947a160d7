"""ONNX with weights of up to 4 bits packed: small on disk, the same integers as ``onnx``.

Weights of 1 and 2 bits are INT2 (opset 25), those of 3 and 4 bits INT4 (opset 21), the others
int8; channels with bits of their own are packed by bitwidth. A Cast to int8 follows, and then the
graph is that of the format ``onnx``. onnxruntime 1.31 computes the Cast when it loads the file, and
runs the same integer kernels. The odd codes of quantizers without a level at zero reach further:
those of 2 and 3 bits are INT4, of 4 bits int8.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from export import packed
from export.formats.onnx import (
    ADVICE,
    REWRITES,
    RUNTIMES,
    bits,
    check,
    container_bytes,
    graph_of,
    metadata,
    open_exact,
    open_runtime,
    quantizers,
    rehearse,
    run,
    save,
)
from sdq.batches import Normalization
from sdq.quant_model import QuantModel

__all__ = [
    "ADVICE",
    "FILE",
    "OPSETS",
    "REWRITES",
    "RUNTIMES",
    "bits",
    "check",
    "container_bytes",
    "metadata",
    "open_exact",
    "open_runtime",
    "quantizers",
    "rehearse",
    "run",
    "write",
]

FILE = "model_packed.onnx"
OPSETS = range(21, 26)


def write(
    qmodel: QuantModel,
    folder: Path,
    *,
    sample: Tensor,
    preprocessing: Normalization | None = None,
    metadata: Mapping[str, str],
    opset: int = packed.NEWEST,
) -> None:
    """Write the network; see :func:`export.write` for the arguments.

    Raises:
        RequestError: activations of more than 8 bits.
        RunError: the exporter failed, or its graph is not valid ONNX.
    """
    model = graph_of(qmodel, sample, preprocessing, opset)
    packed.pack_weights_(model, opset)
    save(model, folder / FILE, metadata)
