"""Weights of odd codes in both formats: bit-exact, the policy's bits, in types that fit."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import export
from export import graph
from export.format import expected_bits, load_format
from sdq.apply_policy import apply_policy_
from sdq.errors import RunError

FORMATS = ("onnx", "qonnx")
KINDS = ("dorefa", "entropy")


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("restrict", ["float", "power_of_two"])
@pytest.mark.parametrize("scale", ["per_tensor", "per_channel"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_the_network(tmp_path, network, sample, images, kind, scale, restrict, format):
    qmodel = network(
        "residual", weight_quantizer=kind, weight_scale=scale, restrict_scale=restrict,
        first_last_bits=None,
    )  # fmt: skip
    policy = dict(zip((x.name for x in qmodel.policy), (8, 1, 2, 6), strict=True))
    apply_policy_(qmodel, qmodel.policy.with_weight_bits(policy))
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    assert result.weight_bits == policy
    report = export.verify(qmodel, tmp_path, format=format, inputs=images, batch_size=10)
    assert report.verified, report.lines
    assert report.exact.different == 0


@pytest.mark.parametrize(
    ("net", "kind", "magnitude", "bits", "scale"),
    [
        # in a linear layer without bias, whose weight is transposed, and in a convolution
        ("perceptron", "dorefa", "learned", 8, "per_channel"),
        ("perceptron", "entropy", "learned", 8, "per_tensor"),
        ("twice", "dorefa", "learned", 8, "per_channel"),
        ("twice", "entropy", "learned", 8, "per_tensor"),
        # not dorefa's paper in the perceptron: classes tie where every scale is 1 / (2^b - 1)
        ("perceptron", "entropy", "paper", None, "per_channel"),
        ("twice", "dorefa", "paper", None, "per_tensor"),
        ("twice", "entropy", "paper", None, "per_tensor"),
    ],
)
@pytest.mark.parametrize("format", FORMATS)
def test_linear_layers_and_layers_called_twice(
    tmp_path, network, sample, images, net, format, kind, magnitude, bits, scale
):
    qmodel = network(
        net, bits, 1, weight_quantizer=kind, weight_magnitude=magnitude, weight_scale=scale,
        first_last_bits=None,
    )  # fmt: skip
    export.write(qmodel, tmp_path, format=format, sample=sample)
    report = export.verify(qmodel, tmp_path, format=format, inputs=images, batch_size=10)
    assert report.verified, report.lines


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_every_bitwidth_is_read_from_the_nodes(tmp_path, network, sample, kind, bits, format):
    qmodel = network("plain", bits=bits, bit_choices=range(1, 9), weight_quantizer=kind)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    plugin = load_format(format)[1]
    assert plugin.bits(result.path) == expected_bits(qmodel)
    found = plugin.quantizers(result.path)["4"]
    quantizer = qmodel.weight_quantizer("4")
    assert torch.equal(found.codes.float(), quantizer.codes(qmodel.weight("4").detach()))
    assert torch.equal(found.scale, quantizer.scale.detach().flatten())
    assert (found.codes % 2 != 0).all()


@pytest.mark.parametrize("bits", [1, 2, 7, 8])
def test_onnx_stores_every_bitwidth_in_int8(tmp_path, network, sample, bits):
    qmodel = network("plain", bits=bits, bit_choices=(1, 2, 7, 8), weight_quantizer="dorefa")
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    model = onnx.load(result.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 17
    stored = {x.name: x for x in model.graph.initializer}["4.weight"]
    assert stored.data_type == onnx.TensorProto.INT8
    values = numpy_helper.to_array(stored).astype(int)
    # of every channel the largest weight is at an end; 8 bits are stored as q of c = 2 q + 1
    ends = (-128, 127) if bits == 8 else (-(2**bits) + 1, 2**bits - 1)
    assert {int(values.min()), int(values.max())} == set(ends)
    assert (bits == 8) == any(n.name == "4.weight.add" for n in model.graph.node)


def test_halved_codes_that_lack_their_half_are_refused(tmp_path, network, sample):
    qmodel = network("plain", bits=8, weight_quantizer="dorefa")
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    model = onnx.load(result.path)
    for entry in model.graph.initializer:
        if entry.name == "4.weight.add.constant":
            entry.CopyFrom(numpy_helper.from_array(np.array(0.25, np.float32), entry.name))
    onnx.save(model, result.path)
    with pytest.raises(RunError, match=r"4: the weight must be q \+ 1/2 times its scale"):
        load_format("onnx")[1].quantizers(result.path)


def test_a_qonnx_quant_node_has_half_a_step_of_zero_point(tmp_path, network, sample):
    qmodel = network("plain", bits=3, weight_quantizer="entropy")
    result = export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    model = onnx.load(result.path)
    values = graph.constants(model)
    node = next(n for n in model.graph.node if n.input[0] == "4.weight")
    assert node.op_type == "Quant"
    _, scale, zero, bits = (values[name] for name in node.input)
    assert (float(zero), float(bits)) == (-0.5, 3.0)
    unit = qmodel.weight_quantizer("4").scale.detach().numpy()
    assert np.array_equal(scale, 2 * unit)
    # the pinned layers' codes are whole numbers of steps
    first = next(n for n in model.graph.node if n.input[0] == "0.weight")
    assert float(values[first.input[2]]) == 0.0


def test_another_zero_point_is_refused(tmp_path, network, sample, images):
    qmodel = network("plain", bits=3, weight_quantizer="entropy")
    result = export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    model = onnx.load(result.path)
    node = next(n for n in model.graph.node if n.input[0] == "4.weight")
    for entry in model.graph.initializer:
        if entry.name == node.input[2]:
            entry.CopyFrom(numpy_helper.from_array(np.array(0.25, np.float32), entry.name))
    onnx.save(model, result.path)
    with pytest.raises(RunError, match=r"4: the weight's zero point must be 0 or -0\.5, got 0\.25"):
        load_format("qonnx")[1].quantizers(result.path)


@pytest.mark.parametrize(
    ("low", "high", "codes", "bits"),
    [
        (-1, 1, [-1, 1], 1), (-1, 1, [-1, 0, 1], 2), (-1, 1, None, 2), (-3, 3, [-3, 1], 2),
        (-7, 7, [1, 1], 3), (-127, 127, [127, -5], 7), (-255, 255, [3, 255], 8), (-2, 1, [1], 2),
        (0, 255, None, 8), (-128, 127, [1], 8),
    ],
)  # fmt: skip
def test_bits_of_range(low, high, codes, bits):
    found = None if codes is None else np.array(codes)
    assert graph.bits_of_range("layer", low, high, found) == bits


@pytest.mark.parametrize(("low", "high", "codes"), [(-3, 3, [-3, 2]), (-3, 3, None), (-5, 5, [1])])
def test_a_range_of_no_bitwidth(low, high, codes):
    found = None if codes is None else np.array(codes)
    with pytest.raises(RunError, match=r"layer: codes .* are of no bitwidth"):
        graph.bits_of_range("layer", low, high, found)
