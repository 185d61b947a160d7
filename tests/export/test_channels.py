"""Channels of different bits in both formats: bit-exact, and each channel's bits in the nodes."""

import random
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import export
from export.format import expected_bits, load_format
from sdq.apply_policy import apply_policy_
from sdq.errors import RunError
from sdq.policy import BitwidthPolicy

FORMATS = ("onnx", "qonnx")
KINDS = ("lsq", "dorefa", "entropy")
WIDTHS = (1, 2, 3, 4, 6, 8)


def channelwise(qmodel, channel_bits):
    """Give searched layers the bits of their channels; a function of the number of channels."""
    layers = []
    for spec, layer in zip(qmodel.layers, qmodel.policy, strict=True):
        if layer.searched:
            each = tuple(channel_bits(spec.weight_shape[0]))
            layer = replace(layer, weight_bits=max(each), channel_bits=each)
        layers.append(layer)
    apply_policy_(qmodel, BitwidthPolicy(tuple(layers)))
    return qmodel


def drawn(seed, widths=WIDTHS):
    draw = random.Random(seed)
    return lambda channels: [draw.choice(widths) for _ in range(channels)]


def verified(qmodel, folder, sample, images, format):
    result = export.write(qmodel, folder, format=format, sample=sample)
    report = export.verify(qmodel, folder, format=format, inputs=images, batch_size=10)
    assert report.verified, report.lines
    assert report.exact.different == 0
    assert load_format(format)[1].bits(result.path) == expected_bits(qmodel)
    return result


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", ["residual", "twice", "segmenter"])
def test_the_file_is_the_network(tmp_path, network, sample, images, net, kind, format):
    qmodel = network(net, 2, weight_quantizer=kind, first_last_bits=None)
    # onnxruntime's S8-to-U8 pass cannot load 8-bit weights of a layer that is called twice
    channelwise(qmodel, drawn(net, WIDTHS[:-1] if net == "twice" else WIDTHS))
    result = verified(qmodel, tmp_path, sample, images, format)
    each = {x.name: x.channel_bits for x in qmodel.policy}
    assert any(len(set(bits)) > 2 for bits in each.values())
    assert dict(result.weight_bits) == each
    assert result.to_json()["weight_bits"] == {name: list(bits) for name, bits in each.items()}
    found = load_format(format)[1].quantizers(result.path)
    for name, bits in each.items():
        quantizer, weight = qmodel.weight_quantizer(name), qmodel.weight(name).detach()
        assert torch.equal(found[name].codes.float(), quantizer.codes(weight))
        assert torch.equal(found[name].scale, quantizer.scale.detach().flatten())
        for channel, b in enumerate(bits):  # by hand: 2^b codes and no more
            codes = found[name].codes[channel]
            odd = kind != "lsq" or b == 1
            ends = (1 - 2**b, 2**b - 1) if odd else (-(2 ** (b - 1)), 2 ** (b - 1) - 1)
            assert ends[0] <= codes.min()
            assert codes.max() <= ends[1]
            assert not odd or (codes % 2 != 0).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_channels_of_the_same_bits_are_a_layer_of_these_bits(
    tmp_path, network, sample, images, kind, bits, format
):
    qmodel = network("plain", bits=bits, weight_quantizer=kind)
    plain = export.write(qmodel, tmp_path / "layer", format=format, sample=sample)
    channelwise(qmodel, lambda channels: [bits] * channels)
    result = verified(qmodel, tmp_path / "channels", sample, images, format)
    assert result.weight_bits == plain.weight_bits
    content = [onnx.load(x.path).graph.SerializeToString() for x in (plain, result)]
    assert content[0] == content[1]


class Narrow(nn.Module):
    """Depthwise and grouped convolutions, in one dimension too, and layers of one channel."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(3, 6, 3, padding=1, groups=3)
        self.grouped = nn.Conv2d(6, 4, 1, groups=2, bias=False)
        self.single = nn.Conv2d(4, 1, 3, padding=1)
        self.line = nn.Conv1d(8, 4, 3, padding=1, groups=2)
        self.point = nn.Linear(8, 1, bias=False)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = torch.relu(self.grouped(torch.relu(self.depthwise(x))))
        x = torch.relu(self.single(x)).squeeze(1)
        return self.head(self.point(torch.relu(self.line(x))).flatten(1))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_groups_and_single_channels(tmp_path, network, sample, images, kind, format):
    qmodel = network(Narrow(), 2, weight_quantizer=kind, first_last_bits=None)
    channelwise(qmodel, drawn(3))
    result = verified(qmodel, tmp_path, sample, images, format)
    assert isinstance(result.weight_bits["single"], int)
    assert len(result.weight_bits["depthwise"]) == 6


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [(1, 1, 8, 8), (8, 1, 1, 1), (1, 2, 1, 2), (2, 8, 2, 8)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_and_eight_side_by_side(tmp_path, network, sample, images, kind, bits, format):
    """The ends: no node has one bit in onnx, and odd codes of 8 bits do not fit int8."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.AvgPool2d(4),
        nn.Flatten(), nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 5),
    )  # fmt: skip
    qmodel = network(net, 2, weight_quantizer=kind)
    channelwise(qmodel, lambda channels: bits)
    result = verified(qmodel, tmp_path, sample, images, format)
    assert result.weight_bits["2"] == result.weight_bits["6"] == bits
    kinds = {n.op_type for n in onnx.load(result.path).graph.node if n.name.startswith("2.")}
    assert ("Gather" in kinds) == (list(bits) != sorted(bits))
    assert ("BipolarQuant" in kinds) == (format == "qonnx" and 1 in bits)


def test_onnx_stores_int8_and_onnxruntime_makes_one_weight_of_it(tmp_path, network, sample, images):
    """What is put together is constant and integer, so that the convolution is fused as ever."""
    qmodel = channelwise(network("plain", 2, act_bits=8), drawn(1))
    result = verified(qmodel, tmp_path, sample, images, "onnx")
    model = onnx.load(result.path)
    onnx.checker.check_model(model, full_check=True)
    stored = {x.name: x for x in model.graph.initializer}
    assert "4.weight" not in stored  # not a second time
    shares = {name: x for name, x in stored.items() if name.startswith("4.weight.") and x.dims}
    weights = [x for name, x in shares.items() if name.endswith("_bits")]
    assert {x.data_type for x in weights} == {onnx.TensorProto.INT8}
    assert sum(x.dims[0] for x in weights) == 6
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(result.path, options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert not {"Concat", "Gather", "Clip"} & set(fused[:-1]), fused
    layerwise = tmp_path / "layer"
    export.write(network("plain", 3, act_bits=8), layerwise, format="onnx", sample=sample)
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(
        layerwise / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    assert fused == [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]


def edit(path, name, change):
    model = onnx.load(path)
    entry = next(x for x in model.graph.initializer if x.name == name)
    array = np.array(numpy_helper.to_array(entry))
    entry.CopyFrom(numpy_helper.from_array(change(array), name))
    onnx.save(model, path)
    (path.parent / "export.json").unlink()


BITS = (4, 2, 4, 1)
DAMAGE = {
    "order": ("onnx", "again.weight.gather.indices", lambda a: a[::-1].copy(), "(4, 2, 4, 1)"),
    "wider": ("onnx", "again.weight.2_bits.clip.max", lambda a: a * 0 + 7, "no bitwidth"),
    "bits": ("qonnx", "again.weight.4_bits.quant.bits", lambda a: a + 1, "(5, 2, 5, 1) bits"),
    "scale": ("qonnx", "again.weight.1_bits.bipolarquant.scale", lambda a: a * 2, "scale differs"),
    "code": ("onnx", "again.weight.1_bits", lambda a: a * -1, "weight codes differ"),
    "another": ("onnx", "again.weight.1_bits.clip.min", lambda a: a * 0, "no bitwidth"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(tmp_path, network, sample, images, kind):
    format, name, change, words = DAMAGE[kind]
    qmodel = channelwise(network("twice", 2), lambda channels: BITS)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    edit(result.path, name, change)
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert not report.verified
    assert words in report.reason, report.reason
    if kind not in ("wider", "another"):
        assert report.exact.first_difference == "again"


def test_a_piece_that_no_quantizer_makes_is_refused(tmp_path, network, sample):
    qmodel = channelwise(network("twice", 2), lambda channels: BITS)
    result = export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    model = onnx.load(result.path)
    concat = next(n for n in model.graph.node if n.name == "again.weight.concat")
    concat.input[0] = "again.weight.1_bits"
    onnx.save(model, result.path)
    with pytest.raises(RunError, match=r"again: 'again\.weight\.1_bits' must be made by a Quant"):
        load_format("qonnx")[1].bits(result.path)
