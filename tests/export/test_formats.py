"""Conformance: every format, on every shape of network the engine makes, and on every model."""

import onnx
import pytest
import torch
from torch import nn

import export
from export.format import expected_bits, load_format
from sdq import plugins
from sdq.plugins import call_with_known

FPGA = {"finn", "hls4ml"}
"""Take fewer networks, and compile for minutes: they have tests of their own."""
FORMATS = sorted(set(plugins.names("export.formats")) - FPGA)
NETS = ["plain", "perceptron", "residual", "twice", "segmenter"]
CONFIGS = {
    "mixed": {"act_bits": 4},
    "float activations": {"act_bits": 32},
    "float ends": {"act_bits": 3, "first_last_bits": 32},
    "shifts": {"act_bits": 8, "weight_scale": "per_tensor", "restrict_scale": "power_of_two"},
    "all searched": {"act_bits": 2, "first_last_bits": None},
}


PAIRS = [
    pytest.param(net, config, marks=[] if fast else pytest.mark.slow, id=f"{net}-{config}")
    for net in NETS
    for config in CONFIGS
    for fast in [config == "mixed" or net == "residual"]
]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("net", "config"), PAIRS)
def test_the_file_is_the_network(tmp_path, network, sample, images, format, net, config):
    qmodel = network(net, **CONFIGS[config])
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    assert result.weight_bits == {x.name: x.weight_bits for x in qmodel.policy}
    report = export.verify(qmodel, tmp_path, format=format, inputs=images, batch_size=10)
    assert report.verified, report.lines
    assert report.exact.different == 0
    assert report.exact.codes > sum(x.num_weights for x in qmodel.policy if x.weight_bits < 32)
    assert report.sha256 == result.sha256


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_every_bitwidth_is_read_from_the_nodes(tmp_path, network, sample, format, bits):
    qmodel = network("plain", bits=bits)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    plugin = load_format(format)[1]
    # nothing of the metadata but the layers' names is used
    model = onnx.load(result.path)
    for entry in model.metadata_props:
        if entry.key == "policy":
            entry.value = qmodel.policy.with_weight_bits({"4": 5, "8": 5}).to_json()
    onnx.save(model, result.path)
    assert plugin.bits(result.path) == expected_bits(qmodel)
    codes = plugin.quantizers(result.path)["4"].codes
    assert torch.equal(
        codes.float(), qmodel.weight_quantizer("4").codes(qmodel.weight("4").detach())
    )
    if bits == 1:
        assert codes.unique().tolist() == [-1, 1]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("mode", "factor"), [("nearest", 1.7), ("nearest", 0.6), ("bilinear", 1.5), ("bilinear", 1 / 3)]
)
def test_maps_are_resized_by_the_factor(tmp_path, network, sample, images, format, mode, factor):
    """1.7 of 8 is 13: steps of 1 / 1.7, as in PyTorch and in the runtimes, not of 8 / 13."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=factor, mode=mode),
        nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    )  # fmt: skip
    qmodel = network(net, act_bits=4)
    export.write(qmodel, tmp_path, format=format, sample=sample)
    report = export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert report.verified, report.lines


@pytest.mark.parametrize("format", FORMATS)
def test_the_batch_size_is_free(tmp_path, network, sample, images, format):
    qmodel = network("residual").eval()
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    run = load_format(format)[1].run
    shape = onnx.load(result.path).graph.input[0].type.tensor_type.shape
    assert shape.dim[0].dim_param == "N"
    for size in (1, 2, 7):
        expected = qmodel(images[:size]).detach()
        # float32 sums in another order; the random images meet no tie
        torch.testing.assert_close(run(result.path, images[:size]), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_called_twice_is_stored_once(tmp_path, network, sample, format):
    result = export.write(network("twice"), tmp_path, format=format, sample=sample)
    model = onnx.load(result.path)
    names = [x.name for x in model.graph.initializer]
    assert names.count("again.weight") == names.count("mix.weight") == 1
    assert [n.name for n in model.graph.node if n.op_type == "Conv"] == [
        "first",
        "again",
        "again#2",
    ]


def test_the_onnx_file_holds_int8_weights_and_is_valid(tmp_path, network, sample):
    qmodel = network("plain", bits=3)
    result = export.write(qmodel, tmp_path, format="onnx", sample=sample)
    model = onnx.load(result.path)
    onnx.checker.check_model(model, full_check=True)
    weights = {x.name: x.data_type for x in model.graph.initializer if x.name.endswith("weight")}
    for layer in qmodel.policy:
        assert weights[f"{layer.name}.weight"] == onnx.TensorProto.INT8
    assert model.opset_import[0].version >= 17
    assert model.ir_version <= 13  # what onnxruntime 1.31 reads


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_names_no_machine_and_holds_no_master_weights(tmp_path, network, sample, format):
    qmodel = network("plain", bits=2)
    result = export.write(qmodel, tmp_path, format=format, sample=sample)
    content = result.path.read_bytes()
    assert b"site-packages" not in content
    assert b"/export/" not in content
    assert qmodel.weight("4").detach().numpy().tobytes() not in content


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_network_gives_the_same_bytes(tmp_path, network, sample, format):
    qmodel = network("residual")
    first = export.write(qmodel, tmp_path / "a", format=format, sample=sample)
    second = export.write(qmodel, tmp_path / "b", format=format, sample=sample)
    assert first.sha256 == second.sha256


def test_qonnx_cleanup_with_a_batch_size_runs(tmp_path, network, sample, images):
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.util.cleanup import cleanup_model

    qmodel = network("twice").eval()
    result = export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    model = cleanup_model(ModelWrapper(str(result.path)), override_inpsize=3)
    name = model.graph.input[0].name
    output = execute_onnx(model, {name: images[:3].numpy()})[model.graph.output[0].name]
    torch.testing.assert_close(
        torch.from_numpy(output), qmodel(images[:3]).detach(), atol=1e-5, rtol=0
    )


MODELS = ("mlp", "resnet20", "vgg_like")  # all of them: tests/conformance


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_every_model_exports_in_every_configuration(tmp_path, network, format, model, config):
    module = call_with_known(
        plugins.load("sdq.models", model).build, num_classes=7, in_channels=3, image_size=28
    )
    qmodel = network(module, side=28, seed=3, **CONFIGS[config])
    export.write(qmodel, tmp_path, format=format, sample=torch.zeros(1, 3, 28, 28))
    inputs = torch.randn(200, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    report = export.verify(qmodel, tmp_path, format=format, inputs=inputs)
    assert report.exact is not None
    assert report.exact.different == 0
    assert report.verified, report.lines
