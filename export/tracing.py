"""From a quantized network to an ONNX graph whose nodes carry the network's own names.

Brevitas's TorchScript exporters do the translation. They name nodes after the last part of a
module's path only, so the copy that is exported has its layers renamed first, and the graph gets
the true names back afterwards: the weight of layer ``a.b`` is the initializer ``a.b.weight``, the
quantizer at ``a.b_input`` is the node ``a.b_input.quant`` (or ``.quantizelinear``).
"""

import contextlib
import copy
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from export import channels, graph, qdq
from export.findings import Finding
from export.float64 import fold_constants_
from export.reference import untie_
from sdq import integer_bias
from sdq.channel_bits import ChannelWeightQuantizer, SettledQuantizer
from sdq.errors import RequestError, RunError
from sdq.graph import unfused_attention
from sdq.learned_scale import Quantized
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # brevitas imports its own deprecated brevitas.fx
    from brevitas import config as brevitas_config
    from brevitas.export import StdQCDQONNXManager
    from brevitas.export.onnx.qonnx.manager import QONNXManager

OPSET = 17
"""The newest in which ReduceMean still has its axes as an attribute, as FPGA compilers expect."""

NEWEST_TRACED = 20
"""The newest opset torch's TorchScript exporter writes. Newer ones only widened the types of the
operators it uses, so a graph of this opset is one of theirs."""

INPUT, OUTPUT, BATCH = "images", "output", "N"

Dialect = Literal["qcdq", "qonnx"]
_OPERATOR = re.compile(r"'(\w+::\w+)'")
_LABEL = re.compile(r"/sdq(\d+)x(?:_\d+)?/")


class ExporterFailed(RunError):
    """Torch's exporter could not write a network.

    Args:
        reason: its own words, one line.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"export: the exporter failed: {reason}")
        named = _OPERATOR.search(reason)
        self.finding = Finding(
            named.group(1) if named else "network", "must be what torch's ONNX exporter can write",
            reason, "replace the operation",
        )  # fmt: skip


def rehearse(qmodel: QuantModel, dialect: Dialect, sample: Tensor) -> tuple[Finding, ...]:
    """Return what torch's exporter cannot write, which only trying shows; nothing is written.

    Args:
        qmodel: need be neither calibrated nor searched; left as it is.
        dialect: as for :func:`trace`.
        sample: likewise.
    """
    try:
        trace(settled(qmodel), dialect, sample)
    except ExporterFailed as error:
        return (error.finding,)
    return ()


def settled(qmodel: QuantModel) -> QuantModel:
    """Return a copy that can be traced, with scales of 1 and 8 bits where nothing is known yet."""
    clone = copy.deepcopy(qmodel).cpu()
    for quantizer in clone.act_quantizers().values():
        quantizer.calibrated.fill_(True)
        quantizer.observing = False
    for bits in clone.policy:
        undecided = bits.weight_bits != FLOAT_BITS and not isinstance(
            clone.weight_quantizer(bits.name), SettledQuantizer
        )
        if undecided:
            clone.set_weight_quantizer_(bits.name, clone.new_weight_quantizer(bits.name, 8))
    return clone


def trace(
    qmodel: QuantModel, dialect: Dialect, sample: Tensor, opset: int = OPSET
) -> onnx.ModelProto:
    """Return the network as an ONNX graph with one input, one output and a free batch size.

    Args:
        qmodel: left as it is; a copy on the CPU is exported.
        dialect: ``qcdq`` (QuantizeLinear, Clip, DequantizeLinear; int8 weights) or ``qonnx``.
        sample: ``(N, C, H, W)``, for shapes only.
        opset: of ONNX.

    Raises:
        RequestError: the sample does not fit the network.
        RunError: the exporter failed; the message names its reason.
    """
    clone = copy.deepcopy(qmodel).cpu().eval()
    example = sample[:1].detach().float().cpu()
    _check_sample(clone, example)
    untie_(clone)
    freeze_weights_(clone)
    biases = integer_bias.freeze_(clone.net)
    split = channels.parts(clone)
    _state_one_bitwidth_(clone)
    halved = _state_odd_codes_(clone, dialect)
    names = _label_(clone)
    model = _run_exporter(clone, dialect, example, min(opset, NEWEST_TRACED))
    _declare_opset_(model, opset)
    fold_constants_(model)
    graph.restore_names_(model, names, _LABEL)
    graph.merge_twins_(model)
    if dialect == "qcdq":
        graph.add_half_a_step_(model, halved)
        qdq.state_integer_biases_(model, biases)
    for layer, parts in split.items():
        if dialect == "qcdq":
            channels.split_codes_(model, layer, parts, layer in halved)
        else:
            channels.split_weights_(model, layer, parts)
    graph.remove_unused_(model)
    return model


def freeze_weights_(qmodel: QuantModel) -> None:
    """Put codes times scale in place of the float master weights.

    Quantizing them again gives the same codes in any precision, so that a reader which divides in
    float64, or multiplies by a reciprocal, still finds the codes PyTorch has.

    Args:
        qmodel: changed in place.
    """
    for bits in qmodel.policy:
        if bits.weight_bits == FLOAT_BITS:
            continue
        quantizer, weight = qmodel.settled_quantizer(bits.name), qmodel.weight(bits.name)
        with torch.no_grad():
            weight.copy_(quantizer.codes(weight) * quantizer.scale)
        quantizer.freeze_()


class _Halved(nn.Module):
    """Odd codes ``c = 2 q + 1`` as ``q``: twice the scale, and a zero point of -1/2.

    ``q`` is a signed integer of the layer's own bits.
    """

    def __init__(self, quantizer: SettledQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, weight: Tensor) -> Quantized:
        values, scale, zero_point, bit_width = self.quantizer(weight)
        return values, 2 * scale, zero_point - 0.5, bit_width


def _state_one_bitwidth_(qmodel: QuantModel) -> None:
    """Let quantizers of channels describe themselves in terms Brevitas has: one bitwidth.

    That is theirs if all channels have the same. Else it is 8, which is no claim: the weight is
    exported whole, without a Clip, and gets its quantizers afterwards.
    """
    for bits in qmodel.policy:
        if bits.channel_bits is None:
            continue
        quantizer = qmodel.settled_quantizer(bits.name)
        assert isinstance(quantizer, ChannelWeightQuantizer)
        if len(quantizer.channels) == 1:
            ((part, _),) = quantizer.parts(qmodel.weight(bits.name))
            qmodel.set_weight_quantizer_(bits.name, part)
        else:
            quantizer.bit_width = quantizer.bit_width.new_tensor(8.0)


def _state_odd_codes_(qmodel: QuantModel, dialect: Dialect) -> list[str]:
    """Let quantizers of odd codes describe themselves in terms the dialect has.

    ``qcdq`` has only whole zero points: the codes stand as they are, in one bit more without the
    lowest code, as long as int8 holds them. ``qonnx`` has a node for one bit, and real zero points.

    Returns:
        The layers whose codes are halved.
    """
    halved = []
    for bits in qmodel.policy:
        if bits.weight_bits == FLOAT_BITS:
            continue
        quantizer = qmodel.settled_quantizer(bits.name)
        if isinstance(quantizer, ChannelWeightQuantizer):
            parts = [part for part, _ in quantizer.parts(qmodel.weight(bits.name))]
            if dialect == "qcdq" and any(part.odd and part.bits == 8 for part in parts):
                qmodel.set_weight_quantizer_(bits.name, _Halved(quantizer))
                halved.append(bits.name)
            continue
        if not quantizer.odd or (dialect == "qonnx" and bits.weight_bits == 1):
            continue
        if dialect == "qcdq" and bits.weight_bits < 8:
            quantizer.bit_width = quantizer.bit_width + 1
            proxy: Any = qmodel.net.get_submodule(f"{bits.name}.weight_quant")
            proxy.quant_injector = proxy.quant_injector.let(narrow_range=True)
        else:
            qmodel.set_weight_quantizer_(bits.name, _Halved(quantizer))
            halved.append(bits.name)
    return halved


def _check_sample(qmodel: QuantModel, example: Tensor) -> None:
    try:
        with torch.no_grad():
            output = qmodel(example)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise RequestError(
            f"export: sample must fit the network, got shape {tuple(example.shape)} "
            f"(N, C, H, W): {str(error).splitlines()[0]}"
        ) from error
    if not isinstance(output, Tensor):
        raise RequestError(
            f"export: the network must return one tensor, got {type(output).__name__}; "
            "wrap it in a module that returns one"
        )


def _label_(qmodel: QuantModel) -> list[str]:
    """Rename layers and activation quantizers to ``sdq0x``, ``sdq1x`` ...; return the names."""
    # what is kept whole has any number of multiplications, and no weight to be found again
    layers = [spec.name for spec in qmodel.layers if spec.kind != "float"]
    names = layers + list(qmodel.act_quantizers())
    index = {name: i for i, name in enumerate(names)}
    for name, i in index.items():
        qmodel.net.add_submodule(f"sdq{i}x", qmodel.net.get_submodule(name))
    for node in qmodel.net.graph.nodes:
        if node.op == "call_module" and node.target in index:
            node.target = f"sdq{index[node.target]}x"
    qmodel.net.delete_all_unused_submodules()
    qmodel.net.recompile()
    return names


def _run_exporter(
    qmodel: QuantModel, dialect: Dialect, example: Tensor, opset: int
) -> onnx.ModelProto:
    manager = StdQCDQONNXManager if dialect == "qcdq" else QONNXManager
    with tempfile.TemporaryDirectory() as folder, _clean_exporter(manager):
        path = Path(folder) / "model.onnx"
        try:
            manager.export(
                qmodel.net,
                args=example,
                export_path=str(path),
                dynamo=False,
                opset_version=opset,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_axes={INPUT: {0: BATCH}, OUTPUT: {0: BATCH}},
                keep_initializers_as_inputs=False,
            )
            return onnx.load(path)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ExporterFailed(reason) from error


def _declare_opset_(model: onnx.ModelProto, opset: int) -> None:
    """State a graph's opset, and the oldest version of the file format that has it."""
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = opset
    model.ir_version = helper.find_min_ir_version_for([helper.make_opsetid("", opset)])


@contextlib.contextmanager
def _clean_exporter(manager: Any) -> Iterator[None]:
    """Leave nothing of an export behind in class-level and global state, whatever happens."""

    def clear() -> None:
        brevitas_config._ONGOING_EXPORT = None
        manager._fn_cache.clear()
        manager._fn_to_cache.clear()

    bindings: Any = torch._C
    log, enabled = bindings._jit_onnx_log, bindings._jit_is_onnx_log_enabled()
    clear()
    # torch takes its logging for enabled, and prints the whole graph where it fails
    bindings._jit_onnx_log = lambda *_: None
    try:
        with unfused_attention():  # ONNX has no operator for it
            yield
    finally:
        clear()
        bindings._jit_onnx_log = log
        bindings._jit_set_onnx_log_enabled(enabled)
