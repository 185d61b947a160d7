"""Packed weights: types, bytes, and the same network as unpacked."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

import export
from export import packed
from export.format import load_format
from sdq.apply_policy import apply_policy_
from sdq.policy import BitwidthPolicy

TYPES = {
    1: TensorProto.INT2, 2: TensorProto.INT2, 3: TensorProto.INT4, 4: TensorProto.INT4,
    6: TensorProto.INT8, 8: TensorProto.INT8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"), [(TensorProto.INT2, ml_dtypes.int2), (TensorProto.INT4, ml_dtypes.int4)]
)
@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 3, 3), (8, 2)])
def test_codes_are_packed_as_onnx_packs_them(kind, dtype, shape):
    low, high = ml_dtypes.iinfo(dtype).min, ml_dtypes.iinfo(dtype).max
    codes = np.random.default_rng(0).integers(low, high + 1, shape).astype(np.int8)
    ours = packed._packed(codes, kind, "x")
    theirs = numpy_helper.from_array(codes.astype(dtype), "x")
    assert ours.raw_data == theirs.raw_data
    assert np.array_equal(numpy_helper.to_array(ours).astype(np.int8), codes)


@pytest.mark.parametrize("bits", TYPES)
def test_the_type_is_the_smallest(tmp_path, network, sample, images, bits):
    qmodel = network("residual", bits)
    result = export.write(qmodel, tmp_path, format="onnx-packed", sample=sample)
    kinds = {x.name: x.data_type for x in onnx.load(result.path).graph.initializer}
    assert {kinds[f"{layer.name}.weight"] for layer in qmodel.policy if layer.searched} == {
        TYPES[bits]
    }
    assert {kinds[f"{x.name}.weight"] for x in qmodel.policy if not x.searched} == {
        TensorProto.INT8
    }
    assert export.verify(qmodel, tmp_path, format="onnx-packed", inputs=images).verified


def test_opsets_without_two_bits_have_four(tmp_path, network, sample):
    qmodel = network("residual", 2)
    result = export.write(qmodel, tmp_path, format="onnx-packed", sample=sample, opset=24)
    kinds = {x.name: x.data_type for x in onnx.load(result.path).graph.initializer}
    assert kinds["body.0.weight"] == TensorProto.INT4


@pytest.mark.parametrize("kind", ["dorefa", "entropy"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_odd_codes_take_the_type_that_holds_them(tmp_path, network, sample, images, kind, bits):
    qmodel = network("residual", bits, weight_quantizer=kind)
    result = export.write(qmodel, tmp_path, format="onnx-packed", sample=sample)
    kinds = {x.name: x.data_type for x in onnx.load(result.path).graph.initializer}
    wanted = {1: TensorProto.INT2, 2: TensorProto.INT4, 3: TensorProto.INT4}
    assert kinds["body.0.weight"] == wanted.get(bits, TensorProto.INT8)
    report = export.verify(qmodel, tmp_path, format="onnx-packed", inputs=images)
    assert report.verified, report.lines


def test_channels_are_packed_by_their_bits(tmp_path, network, sample, images):
    qmodel = network("residual")
    each = {4: (1, 2, 3, 8), 8: (1, 2, 3, 4, 2, 1, 6, 8)}
    layers = []
    for spec, layer in zip(qmodel.layers, qmodel.policy, strict=True):
        if layer.searched:
            layer = replace(layer, weight_bits=8, channel_bits=each[spec.weight_shape[0]])
        layers.append(layer)
    apply_policy_(qmodel, BitwidthPolicy(tuple(layers)))
    result = export.write(qmodel, tmp_path, format="onnx-packed", sample=sample)
    kinds = {x.name: x.data_type for x in onnx.load(result.path).graph.initializer}
    for bits in (1, 2, 3, 4, 6, 8):
        assert kinds[f"body.0.weight.{bits}_bits"] == TYPES[bits]
    report = export.verify(qmodel, tmp_path, format="onnx-packed", inputs=images)
    assert report.verified, report.lines


def test_onnxruntime_computes_what_it_computes_unpacked(tmp_path, network, sample, images):
    qmodel = network(
        "residual", batch_norm="fold", integer_datapath=True, integer_bias=True, act_bits=8
    )
    outputs = []
    for format in ("onnx", "onnx-packed"):
        path = export.write(qmodel, tmp_path, format=format, sample=sample).path
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(path), options)
        outputs.append(session.run(None, {"images": images.numpy()})[0])
        stored = onnx.load(tmp_path / "optimised.onnx").graph.initializer
        kinds = {x.name: x.data_type for x in stored}
        assert TensorProto.INT2 not in kinds.values()
    assert np.array_equal(*outputs)


def test_the_file_is_its_containers_and_little_more(tmp_path, network):
    """By hand: names and nodes of a layer some 1500 bytes, scales and a bias of a channel 13."""
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3),
        nn.BatchNorm2d(128), nn.ReLU(), nn.Conv2d(128, 128, 3), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    how = {"batch_norm": "fold", "integer_bias": True}
    for bits in (1, 2, 3, 4):
        qmodel = network(net, bits, side=12, **how)
        result = export.write(
            qmodel, tmp_path / str(bits), format="onnx-packed", sample=torch.zeros(1, 3, 12, 12)
        )
        width = {1: 2, 2: 2, 3: 4, 4: 4}[bits]
        assert result.container_bytes == (64 * 27 + 1280) + (64 + 128) * 128 * 9 * width // 8
        overhead = result.file_bytes - 1.1 * result.container_bytes
        assert overhead < 4 * 1500 + 13 * (64 + 128 + 128 + 10)


def test_a_changed_byte_is_found(tmp_path, network, sample, images):
    qmodel = network("residual", 2)
    result = export.write(qmodel, tmp_path, format="onnx-packed", sample=sample)
    model = onnx.load(result.path)
    (weight,) = [x for x in model.graph.initializer if x.name == "body.0.weight"]
    raw = bytearray(weight.raw_data)
    raw[0] ^= 1
    weight.raw_data = bytes(raw)
    onnx.save(model, result.path)
    before = qmodel.weight_quantizer("body.0").codes(qmodel.weight("body.0").detach())
    found = load_format("onnx-packed")[1].quantizers(result.path)["body.0"].codes
    assert int((found != before).sum()) == 1
    report = export.verify(qmodel, tmp_path, format="onnx-packed", inputs=images)
    assert not report.verified
    assert "body.0: 1 weight codes differ" in report.reason
