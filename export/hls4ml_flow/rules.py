"""What hls4ml cannot take, asked before anything is written."""

import tempfile
from pathlib import Path

import onnx
from torch import Tensor

from export import graph
from export.findings import Finding
from export.format import SCHEMA
from export.formats import qonnx
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.operators import OPERATORS
from export.hls4ml_flow.pending import Unsupported
from export.hls4ml_flow.reading import Reader, unknown
from export.tracing import ExporterFailed, settled
from sdq.quant_model import QuantModel


def check(qmodel: QuantModel, sample: Tensor, io_type: str | None = None) -> tuple[Finding, ...]:
    """Return what stands against the network; of what hangs together, the first.

    The network is translated as it will be when it is written, with scales of 1 where there are
    none yet.

    Args:
        qmodel: need be neither calibrated nor searched; left as it is.
        sample: ``(N, C, H, W)``, for shapes only.
        io_type: how layers hand over tensors; None: as the network suggests.
    """
    if sample.dim() != 4:
        shape = str(tuple(sample.shape))
        return (Finding("input", "must be images (N, C, H, W)", shape, "use the format onnx"),)
    with tempfile.TemporaryDirectory() as folder:
        texts = {"schema": SCHEMA, "policy": qmodel.policy.to_json()}
        try:
            qonnx.write(settled(qmodel), Path(folder), sample=sample, metadata=texts)
        except ExporterFailed as error:
            return (error.finding,)
        path = Path(folder) / qonnx.FILE
        model, quantizers = graph.load(path), qonnx.quantizers(path)
    strangers = [
        unknown(n, OPERATORS).finding for n in _computed(model) if n.op_type not in OPERATORS
    ]
    if strangers:
        return tuple(dict.fromkeys(strangers))
    try:
        Reader(model, quantizers, Builder(streamed(model, io_type))).network(OPERATORS)
    except Unsupported as error:
        return (error.finding,)
    return ()


def streamed(model: onnx.ModelProto, io_type: str | None) -> bool:
    """Tell whether layers hand over pixel by pixel: as said, or if the network works on images."""
    if io_type is not None:
        return io_type == "io_stream"
    return any(node.op_type in ("Conv", "MaxPool", "AveragePool") for node in model.graph.node)


def _computed(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Return the nodes whose values depend on the images, without the weights' and input's own."""
    known = {model.graph.input[0].name}
    found = []
    for node in model.graph.node:
        if known.intersection(node.input):
            known.update(node.output)
            found.append(node)
    return found
