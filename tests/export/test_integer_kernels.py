"""What onnxruntime makes of the files: integer kernels, and PyTorch's codes in them."""

import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import export
from export import qdq
from export.format import load_format
from sdq import plugins
from sdq.errors import RequestError
from sdq.integer_bias import biases

INTEGER = {"batch_norm": "fold", "integer_datapath": True, "integer_bias": True, "act_bits": 8}
FORMATS = ("onnx", "onnx-packed")


class Pooled(nn.Module):
    """A Relu and a MaxPool before an addition whose operands are signed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.again, self.head = nn.Identity(), nn.Linear(4, 5)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 3, 2, 1)
        x = F.relu(self.second(x) + self.again(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def optimised(path, tmp_path):
    """Return the operators of the graph that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)


@pytest.mark.parametrize("format", FORMATS)
def test_resnet20_runs_in_integers(tmp_path, network, format):
    """All convolutions, the linear layer, and all additions."""
    module = plugins.load("sdq.models", "resnet20").build(num_classes=4, in_channels=3)
    qmodel = network(module, side=16, **INTEGER)
    sample = torch.zeros(1, 3, 16, 16)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    found = optimised(result.path, tmp_path)
    kinds = ("QLinearConv", "QLinearAdd", "QGemm", "Conv", "FusedConv", "Gemm", "Add")
    assert [found[kind] for kind in kinds] == [19, 9, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("format", FORMATS)
def test_a_relu_and_a_pooling_before_signed_codes_are_fused(
    tmp_path, network, sample, images, format
):
    qmodel = network(Pooled(), **INTEGER)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert report.verified, report.lines
    found = optimised(result.path, tmp_path)
    assert found["QLinearConv"] == 2
    assert found["FusedConv"] == found["Conv"] == 0
    (relu,) = [n for n in onnx.load(result.path).graph.node if n.op_type == "Relu"]
    assert relu.name == "/Relu_1"  # the one before the average, which is in float


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("net", ["plain", "residual", "perceptron", "segmenter"])
def test_integer_kernels_give_the_codes_of_pytorch(tmp_path, network, sample, images, net, bits):
    """With float biases onnxruntime rounds them where it fuses, and codes move."""
    settings = {**INTEGER, "first_last_bits": 4}
    flipped, ties = {}, {}
    for integer in (True, False):
        qmodel = network(net, bits, **{**settings, "integer_bias": integer})
        export.write(qmodel, tmp_path, format="onnx", sample=sample, overwrite=True)
        report = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
        stages = {stage.name: stage for stage in report.runtimes}
        stage = stages["onnxruntime, optimisations on"]
        flipped[integer] = (stage.flipped, stage.largest_difference)
        ties[integer] = stage.ties
        assert report.verified or not integer, report.lines
    assert flipped[True][0] == ties[True] / len(images)  # a boundary in float32, if at all
    assert flipped[True][1] < 1e-3  # steps of the output
    if net == "residual" and bits < 4:  # else too little is fused, or the grid is fine
        assert flipped[False][1] > 1e-2


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        nn.Sequential(nn.MaxPool2d(2, 1, 1), nn.AvgPool2d(2, ceil_mode=True)),
    ],
)
def test_windows_beyond_the_map_divide_by_what_is_there(tmp_path, network, images, pool, bits):
    """The integer kernel that counts padding divides by whole windows."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), pool, nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    qmodel = network(net, **{**INTEGER, "act_bits": bits})
    result = export.write(qmodel, tmp_path, format="onnx", sample=torch.zeros(1, 3, 8, 8))
    assert optimised(result.path, tmp_path)["QLinearAveragePool"] == 1
    report = export.verify(qmodel, tmp_path, format="onnx", inputs=images)
    assert report.verified, report.lines
    assert not report.warnings


def test_biases_are_stored_as_the_codes_pytorch_has(tmp_path, network, sample):
    qmodel = network("residual", **INTEGER)
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    stored = {x.name: numpy_helper.to_array(x) for x in onnx.load(result.path).graph.initializer}
    for layer, rounding in biases(qmodel.net).items():
        bias = qmodel.layer(layer).bias.detach()
        unit = rounding.scale()
        assert stored[f"{layer}.bias"].dtype == np.int32
        assert np.array_equal(stored[f"{layer}.bias"], (bias / unit).round().int().numpy())
        assert np.array_equal(stored[f"{layer}.bias.scale"], unit.numpy())


def test_signed_activations_are_unsigned_with_an_offset(tmp_path, network, sample):
    qmodel = network("residual", act_bits=4)
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    model = onnx.load(result.path)
    stored = {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}
    readers, seen = qdq.readers_of(model), {}
    for quantize in qdq.act_quantizers(model):
        name = quantize.name.removesuffix(".quantizelinear")
        (*clips,) = qdq.clips_after(readers, quantize.output[0])
        ends = [int(stored[end]) for clip in clips for end in clip.input[1:]]
        quantizer = qmodel.act_quantizers()[name]
        seen[quantizer.signed, quantizer.bits] = ends
        assert stored[quantize.input[2]].dtype == np.uint8
        assert int(stored[quantize.input[2]]) == 128 * quantizer.signed
    assert seen == {(True, 8): [], (False, 4): [0, 15], (False, 8): []}


@pytest.mark.parametrize("format", FORMATS)
def test_bits_of_signed_activations_are_read(tmp_path, network, sample, images, format):
    """A Relu behind a quantizer is not its range."""
    qmodel = network("residual", **{**INTEGER, "act_bits": 3})
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    signed = {name for name, q in qmodel.act_quantizers().items() if q.signed and q.bits == 3}
    assert signed
    assert {result.act_bits[name] for name in signed} == {3}
    assert export.verify(qmodel, tmp_path, format=format, inputs=images).verified


@pytest.mark.parametrize(
    ("format", "opset"),
    [("onnx", n) for n in (13, 17, 18, 20, 21, 25)] + [("onnx-packed", n) for n in (21, 24, 25)],
)
@pytest.mark.parametrize("net", ["residual", "segmenter"])
def test_the_opset_can_be_chosen(tmp_path, network, sample, images, net, format, opset):
    qmodel = network(net, act_bits=4)
    result = export.write(qmodel, tmp_path, format=format, sample=sample, opset=opset)
    model = onnx.load(result.path)
    assert [(x.domain, x.version) for x in model.opset_import] == [("", opset)]
    assert model.ir_version <= 13  # what onnxruntime 1.31 reads
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert report.verified, report.lines


@pytest.mark.parametrize(
    ("format", "opset", "message"),
    [
        ("onnx", 12, "opset of the format 'onnx' must be 13 to 25, got 12"),
        ("onnx", 26, "must be 13 to 25, got 26"),
        ("onnx-packed", 20, "opset of the format 'onnx-packed' must be 21 to 25, got 20"),
        ("qonnx", 17, "opset must not be given for the format 'qonnx'"),
    ],
)
def test_other_opsets_are_refused(tmp_path, network, sample, format, opset, message):
    with pytest.raises(RequestError, match=message):
        export.write(network("plain"), tmp_path / "a", format=format, sample=sample, opset=opset)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("format", FORMATS)
def test_onnxruntime_reads_the_metadata(tmp_path, network, sample, format):
    qmodel = network("plain")
    result = export.write(
        qmodel, tmp_path, format=format, sample=sample,
        metadata={"class_names": ["a", "b"], "mean": [0.5], "run_sha256": "00ff"},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(result.path), providers=["CPUExecutionProvider"])
    found = session.get_modelmeta().custom_metadata_map
    assert json.loads(found["policy"]) == json.loads(qmodel.policy.to_json())
    assert (found["class_names"], found["mean"]) == ('["a", "b"]', "[0.5]")
    assert found["run_sha256"] == "00ff"


@pytest.mark.parametrize("format", FORMATS)
def test_files_that_are_not_ours_are_refused(tmp_path, network, sample, images, format):
    qmodel = network("plain")
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    model = onnx.load(result.path)
    del model.metadata_props[:]
    for content in (model.SerializeToString(), b"\x00\x01 no ONNX", b""):
        result.path.write_bytes(content)
        with pytest.raises(RequestError, match=r"must be an ONNX file of schema 'sdq\.export/1'"):
            export.verify(qmodel, tmp_path, format=format, inputs=images)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("policy", ["{}", "not JSON", '{"layers": []}'])
def test_a_policy_that_was_changed_is_refused(tmp_path, network, sample, images, format, policy):
    qmodel = network("plain")
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    model = onnx.load(result.path)
    for entry in model.metadata_props:
        if entry.key == "policy":
            entry.value = policy
    onnx.save(model, result.path)
    with pytest.raises(RequestError, match="policy in the file"):
        export.verify(qmodel, tmp_path, format=format, inputs=images)


@pytest.mark.parametrize("format", FORMATS)
def test_a_folder_that_cannot_be_written_is_an_error_of_the_system(
    tmp_path, network, sample, format
):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        export.write(network("plain"), tmp_path / "file", format=format, sample=sample)
    assert (tmp_path / "file").read_text() == "mine"


def test_every_format_says_what_its_weights_take(tmp_path, network, sample):
    """By hand: 'plain' has 108 + 216 + 324 + 30 weights, at 8, 2, 2 and 8 bits."""
    qmodel = network("plain", bits=2)
    expected = {"onnx": 678, "onnx-packed": 108 + 30 + (216 + 324) // 4}
    for format, container in expected.items():
        result = export.write(qmodel, tmp_path, format=format, sample=sample)
        assert result.weight_bytes == 108 + 30 + (216 + 324) / 4
        assert result.container_bytes == container
        assert result.file_bytes == result.path.stat().st_size
        document = result.to_json()
        assert document["container_bytes"] == container
        assert document["weight_bytes"] == result.weight_bytes
    assert not hasattr(load_format("qonnx")[1], "container_bytes")
