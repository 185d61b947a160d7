"""The steps from a QONNX file to hardware layers, for FINN+'s builder and for our own checks.

FINN+'s own steps are called where there are some. Ours are added for three reasons: graphs are
first rewritten (:mod:`prepare`); a threshold is noted to belong to a quantizer of the file; and
thresholds round as PyTorch does, half to even, where FINN's round half up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from finn.builder import build_dataflow_steps as default
from finn.transformation.fpgadataflow.convert_to_hw.elementwise_binary_operation import (
    InferElementwiseBinaryOperation,
)
from finn.transformation.fpgadataflow.convert_to_hw.global_acc_pool import InferGlobalAccPoolLayer
from finn.transformation.fpgadataflow.convert_to_hw.thresholding import InferThresholdingLayer
from finn.transformation.fpgadataflow.convert_to_hw.upsample import InferUpsample
from finn.transformation.qonnx.convert_qonnx_to_finn import ConvertQONNXtoFINN
from finn.transformation.streamline import absorb, reorder
from finn.transformation.streamline.collapse_repeated import (
    CollapseRepeatedAdd,
    CollapseRepeatedMul,
)
from finn.transformation.streamline.remove import RemoveIdentityTranspose
from finn.transformation.streamline.round_thresholds import RoundAndClipThresholds
from onnx import NodeProto, helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.custom_op.registry import getCustomOp
from qonnx.transformation.base import Transformation
from qonnx.transformation.batchnorm_to_affine import BatchNormToAffine
from qonnx.transformation.general import ConvertDivToMul, ConvertSubToAdd
from qonnx.transformation.infer_data_layouts import InferDataLayouts
from qonnx.transformation.infer_datatypes import InferDataTypes
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.transformation.lower_convs_to_matmul import LowerConvsToMatMul
from qonnx.transformation.remove import RemoveIdentityOps
from qonnx.util.cleanup import cleanup_model

from .origin import Origin, origin, set_origin_
from .prepare import prepare_
from .weights import BIPOLAR

ROUNDS = 8
"""More than the depth of scales that any network here has had between two thresholds."""

LINEAR = (
    ConvertSubToAdd, ConvertDivToMul, BatchNormToAffine, RemoveIdentityOps,
    absorb.AbsorbScalarBiasIntoMultiThreshold, reorder.MoveMulPastMaxPool,
    reorder.MoveScalarLinearPastInvariants, reorder.MoveAddPastMul,
    reorder.MoveScalarAddPastMatMul, reorder.MoveAddPastConv, reorder.MoveScalarMulPastMatMul,
    reorder.MoveScalarMulPastConv, reorder.MoveMulPastDWConv, reorder.MoveAddPastMul,
    CollapseRepeatedAdd, CollapseRepeatedMul, absorb.AbsorbAddIntoMultiThreshold,
    absorb.FactorOutMulSignMagnitude, absorb.AbsorbMulIntoMultiThreshold,
    absorb.Absorb1BitMulIntoMatMul, absorb.Absorb1BitMulIntoConv,
)  # fmt: skip
"""Scales and offsets move forward through a chain, and into the next thresholds."""

JOINS = (
    reorder.MoveLinearPastFork, reorder.MoveMulPastJoinAdd, reorder.MoveAddPastJoinAdd,
    reorder.MoveMulPastJoinConcat, reorder.MoveAddPastJoinConcat,
)  # fmt: skip
"""The same, past forks, and past additions and concatenations of equal scales."""

LOWER = (LowerConvsToMatMul,)

LAYOUT = (
    reorder.MakeMaxPoolNHWC, reorder.MakeScaleResizeNHWC, reorder.MoveTransposePastFork,
    reorder.MoveTransposePastJoinAdd, reorder.MoveTransposePastJoinConcat,
    reorder.MoveTransposePastEltwise,
    absorb.AbsorbTransposeIntoMultiThreshold, absorb.AbsorbConsecutiveTransposes,
    RemoveIdentityTranspose, InferDataLayouts,
)  # fmt: skip
"""Channels come last in hardware: transposes move until two of them meet."""

POOLS = (
    InferGlobalAccPoolLayer, absorb.AbsorbTransposeIntoMultiThreshold, CollapseRepeatedMul,
    absorb.AbsorbMulIntoMultiThreshold,
)  # fmt: skip
"""A global average becomes a sum, and a factor that the next thresholds absorb."""

UNREACHABLE = np.float32(1e30)
HARDWARE = "finn.custom_op.fpgadataflow"


def step_sdq_qonnx_to_finn(model: ModelWrapper, cfg: Any) -> ModelWrapper:
    """Rewrite the graph, and turn its quantizers into integer weights and thresholds."""
    model = model.transform(InferShapes())
    prepare_(model)
    model = cleanup_model(model.transform(InferShapes()))
    origins = {n.output[0]: found for n in model.graph.node if (found := origin(n)) is not None}
    model = model.transform(ConvertQONNXtoFINN())
    for tensor, found in origins.items():
        node = _thresholds_above(model, tensor)
        if node is not None:
            set_origin_(node, found)
            _round_half_to_even_(model, node, found)
    return model


def step_sdq_streamline(model: ModelWrapper, cfg: Any) -> ModelWrapper:
    """Absorb scales into thresholds: FINN's recipe, or that for residual networks."""
    if not (_joins(model) or model.get_nodes_by_op_type("Resize")):
        return default.step_streamline(default.step_tidy_up(model, cfg), cfg)
    model = default.step_tidy_up(model, cfg)
    for _ in range(ROUNDS):
        before = _shape_of(model)
        for group in (LINEAR, JOINS):
            model = _apply(model, group)
        if _shape_of(model) == before:
            break
    model = _apply(model, LOWER)
    _transpose_behind_forked_pools_(model)
    for _ in range(ROUNDS):
        before = _shape_of(model)
        model = _apply(model, LAYOUT)
        if _shape_of(model) == before:
            break
    return model


def _transpose_behind_forked_pools_(model: ModelWrapper) -> None:
    """Put a transposition and its inverse between a max pooling and its readers, if it has several.

    FINN's ``MakeMaxPoolNHWC`` takes the first reader for the only one.
    """
    for pool in list(model.graph.node):
        if pool.op_type != "MaxPool" or len(model.find_consumers(pool.output[0])) < 2:
            continue
        output = pool.output[0]
        shape = model.get_tensor_shape(output)
        pool.output[0], middle = f"{output}.pooled", f"{output}.channels_last"
        model.set_tensor_shape(pool.output[0], shape)
        model.set_tensor_shape(middle, [shape[axis] for axis in (0, 2, 3, 1)])
        place = list(model.graph.node).index(pool) + 1
        for inputs, result, order in (
            (pool.output[0], middle, [0, 2, 3, 1]),
            (middle, output, [0, 3, 1, 2]),
        ):
            node = helper.make_node("Transpose", [inputs], [result], perm=order)
            model.graph.node.insert(place, node)
            place += 1
        for tensor in (pool.output[0], middle):
            model.set_tensor_datatype(tensor, model.get_tensor_datatype(output))


def _apply(model: ModelWrapper, transformations: Sequence[type[Transformation]]) -> ModelWrapper:
    """Apply transformations in order; in place, where FINN's way copies the graph for each."""
    changed = False
    for transformation in transformations:
        before = _shape_of(model)
        model = model.transform(transformation(), make_deepcopy=False, cleanup=False)
        if _shape_of(model) != before:
            changed = True
            model = model.transform(InferShapes(), make_deepcopy=False, cleanup=False)
    if changed:
        model = model.cleanup()
        model = model.transform(InferDataTypes(), make_deepcopy=False, cleanup=False)
    return model


def _shape_of(model: ModelWrapper) -> list[tuple[str, ...]]:
    """Return what tells whether a graph has changed."""
    return [(node.op_type, *node.input, *node.output) for node in model.graph.node]


def step_sdq_convert_to_hw(model: ModelWrapper, cfg: Any) -> ModelWrapper:
    """Turn nodes into hardware layers."""
    origins = {n.name: found for n in model.graph.node if (found := origin(n)) is not None}
    model = _apply(model, POOLS)
    if cfg.standalone_thresholds:
        model = model.transform(InferThresholdingLayer())
        for node in model.graph.node:
            found = origins.get(node.name.removeprefix("Thresholding_"))
            if node.op_type == "Thresholding" and found is not None:
                set_origin_(node, found)
    # FINN's own step looks for Upsample, and torch writes Resize
    model = default.step_convert_to_hw(model.transform(InferUpsample()), cfg)
    model = model.transform(InferElementwiseBinaryOperation())
    # FINN's Python refuses thresholds below all codes; only hardware layers know their codes' range
    return _apply(model, (RoundAndClipThresholds,))


def step_sdq_bipolar_weights(model: ModelWrapper, cfg: Any) -> ModelWrapper:
    """Give weights of -1 and +1 their one bit back: FINN's narrowing makes them 2-bit integers.

    Its HLS units multiply by such weights as they are, whatever the type of the input; its RTL
    units do not take them.
    """
    for node in model.graph.node:
        weights = model.get_initializer(node.input[1]) if node.op_type in MULTIPLIES else None
        if weights is not None and np.all(np.abs(weights) == 1):
            getCustomOp(node).set_nodeattr("weightDataType", BIPOLAR)
    return model


MULTIPLIES = ("MVAU", "MVAU_hls", "VVAU", "VVAU_hls")
"""Units of C++, or that may yet become such."""

Step = Callable[[ModelWrapper, Any], ModelWrapper]
FRONT_END: tuple[Step, ...] = (step_sdq_qonnx_to_finn, step_sdq_streamline, step_sdq_convert_to_hw)


def left_over(model: ModelWrapper) -> list[NodeProto]:
    """Return the nodes that should be hardware layers and are not, in order.

    What stands before the first hardware layer or after the last one may stay on the host, if it
    has no weights and no thresholds.
    """
    before, after = set[str](), set[str]()
    for node in model.graph.node:
        if node.domain.startswith(HARDWARE) or before.intersection(node.input):
            before.update(node.output)
    for node in reversed(model.graph.node):
        if node.domain.startswith(HARDWARE) or after.intersection(node.output):
            after.update(node.input)
    return [
        node
        for node in model.graph.node
        if not node.domain.startswith(HARDWARE)
        and (
            node.op_type in COMPUTES
            or (before.intersection(node.input) and after.intersection(node.output))
        )
    ]


COMPUTES = ("MatMul", "Conv", "ConvTranspose", "Im2Col", "MultiThreshold", "Quant")


def _joins(model: ModelWrapper) -> bool:
    """Return whether two tensors that are computed meet in an addition or concatenation."""
    return any(
        node.op_type in ("Add", "Concat", "Mul")
        and sum(model.get_initializer(name) is None for name in node.input) > 1
        for node in model.graph.node
    )


def _thresholds_above(model: ModelWrapper, tensor: str) -> NodeProto | None:
    """Return the MultiThreshold whose codes, shifted and scaled, are a tensor."""
    node = model.find_producer(tensor)
    while node is not None and node.op_type in ("Mul", "Add"):
        node = model.find_producer(node.input[0])
    return node if node is not None and node.op_type == "MultiThreshold" else None


def _round_half_to_even_(model: ModelWrapper, node: NodeProto, found: Origin) -> None:
    """A value on the border between two codes has the even one: borders of even codes move up."""
    thresholds = np.array(model.get_initializer(node.input[1]), np.float32)
    codes_below = found.low + np.arange(thresholds.shape[-1])
    up = np.nextafter(thresholds, np.float32(np.inf))
    thresholds = np.where(codes_below % 2 == 0, up, thresholds)
    if found.ceiling is not None:
        thresholds = np.where(thresholds > found.ceiling, UNREACHABLE, thresholds)
    model.set_initializer(node.input[1], thresholds)
