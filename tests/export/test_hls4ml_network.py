"""The network that hls4ml is given: its codes in float64, its types, what it cannot hold."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import Tensor, nn

import export
from export.formats import hls4ml, qonnx
from export.hls4ml_flow import fixed_point
from export.hls4ml_flow.builder import Builder, allowed_reuse
from export.hls4ml_flow.fixed_point import holding
from export.hls4ml_flow.operators import OPERATORS
from export.hls4ml_flow.pending import Unsupported
from export.hls4ml_flow.reading import Network, Reader
from export.hls4ml_flow.tensors import Value, Weights
from export.reference import Reference
from sdq.errors import RequestError
from sdq.quant_model import QuantModel

SHIFTS = {
    "weight_scale": "per_tensor", "restrict_scale": "power_of_two", "integer_datapath": True,
}  # fmt: skip
SCALES = {"weight_scale": "per_channel", "restrict_scale": "float", "integer_datapath": True}


def run(model: onnx.ModelProto, images: Tensor) -> dict[str, Tensor]:
    """Return every tensor of the network, for images ``(N, H, W, C)``."""
    values = {
        x.name: torch.from_numpy(numpy_helper.to_array(x).copy()).double()
        for x in model.graph.initializer
    }
    values[model.graph.input[0].name] = images.double()
    for node in model.graph.node:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = [values[x] for x in node.input]
        values[node.output[0]] = KERNELS[node.op_type](options, *inputs)
    return values


def _first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _quant(o, x, scale, zero_point, bits):
    top = 2.0 ** (bits - 1) - 1 if o["signed"] else 2.0**bits - 1
    low = -(2.0 ** (bits - 1)) if o["signed"] else torch.zeros(())
    assert zero_point == 0
    return torch.clamp(torch.round(x / scale), low, top) * scale


def _conv(o, x, w, b=None):
    top, left, bottom, right = o["pads"]
    x = F.pad(_first(x), (left, right, top, bottom))
    return _last(F.conv2d(x, _first(w), b, o["strides"], groups=o["group"]))


def _max_pool(o, x):
    assert not any(o["pads"])
    return _last(F.max_pool2d(_first(x), o["kernel_shape"], o["strides"]))


def _batch_norm(o, x, scale, shift, mean, variance):
    return (x - mean) / torch.sqrt(variance + o["epsilon"]) * scale + shift


def _pad(o, x, amounts):
    _, top, left, _, _, bottom, right, _ = amounts.int().tolist()
    return F.pad(x, (0, 0, left, right, top, bottom))


KERNELS = {
    "Add": lambda o, x, y: x + y,
    "BatchNormalization": _batch_norm,
    "Concat": lambda o, *x: torch.cat(x, o["axis"]),
    "Conv": _conv,
    "Flatten": lambda o, x: x.flatten(1),
    "MatMul": lambda o, x, w: x @ w,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Quant": _quant,
    "Relu": lambda o, x: F.relu(x),
}


def translated(qmodel: QuantModel, folder: Path, *, stream: bool = True) -> Network:
    sample = torch.zeros(1, 3, 8, 8)
    path = export.write(qmodel, folder, format="qonnx", sample=sample, overwrite=True).path
    return Reader(onnx.load(path), qonnx.quantizers(path), Builder(stream)).network(OPERATORS)


def rounded(network: Network, images: Tensor) -> Tensor:
    """Return the input as the network's own type has it, ``(N, H, W, C)``."""
    x = images.permute(0, 2, 3, 1).double() / network.input.unit / network.input.step
    ends = (end / network.input.step for end in (network.input.least, network.input.most))
    return x.round().clamp(*ends) * network.input.step


def in_types(network: Network, values: dict[str, Tensor]) -> None:
    """Assert that every tensor with a type lies in it."""
    typed = {
        name: layer["Precision"] for name, layer in network.layers.items() if "Precision" in layer
    }
    for name, types in typed.items():
        kind = types.get("accum", types.get("result", "auto"))
        tensor = values.get(f"{name}_output")
        if kind in ("auto", "") or tensor is None:
            continue
        width, integer = (int(n) for n in kind.partition("<")[2].rstrip(">").split(",")[:2])
        signed = not kind.startswith("ap_u")
        codes = tensor / 2.0 ** (integer - width)
        assert torch.equal(codes, codes.round()), f"{name}: {kind} is too coarse"
        low, high = (
            (-(2.0 ** (width - 1)), 2.0 ** (width - 1) - 1) if signed else (0, 2.0**width - 1)
        )
        assert low <= codes.min(), f"{name}: {kind} is too narrow"
        assert codes.max() <= high, f"{name}: {kind} is too narrow"


CASES = [
    pytest.param(net, config, id=f"{name}-{kind}")
    for name, net in {
        "perceptron": "perceptron", "everything": "everything", "convolutions": "convolutions",
        "normalized first": "normalized first",
    }.items()
    for kind, config in {
        "shifts": SHIFTS, "shifts folded": SHIFTS | {"batch_norm": "fold"}, "scales": SCALES,
        "integer biases": SHIFTS | {"batch_norm": "fold", "integer_bias": True},
        "odd codes": SHIFTS | {"weight_quantizer": "dorefa"}, "8 bits": SHIFTS | {"act_bits": 8},
    }.items()
]  # fmt: skip


@pytest.mark.parametrize(("net", "config"), CASES)
def test_the_network_for_hls4ml_has_the_same_codes(tmp_path, network, images, net, config):
    qmodel = network(net, **config)
    made, ours = translated(qmodel, tmp_path), Reference(qmodel).float64(images)
    values = run(made.model, rounded(made, images))
    graph = made.model.graph  # hls4ml makes a layer of each constant, and knows layers by name
    names = [x.name for x in [*graph.input, *graph.initializer, *graph.node]]
    assert len(set(names)) == len(names)
    assert len(made.taps) == len(ours.codes) - 1  # all but the input
    for name, tap in made.taps.items():
        codes = (values[tap.tensor] / tap.scale).reshape(len(images), *tap.shape)
        codes = codes.permute(0, 3, 1, 2) if codes.dim() == 4 else codes
        codes = codes.flatten(1) if tap.flat else codes
        assert torch.equal(codes, ours.codes[name].double()), name
    output = values[made.output.tensor] * made.output.unit
    output = output.permute(0, 3, 1, 2).flatten(1) if output.dim() == 4 else output
    # 24 bits where constants had to be rounded for the output
    torch.testing.assert_close(output, ours.output, rtol=0, atol=1e-6)
    in_types(made, values)


def test_shifts_leave_no_factors(tmp_path, network):
    made = translated(network("everything", **SHIFTS, batch_norm="fold"), tmp_path)
    assert made.inexact == ()
    assert "BatchNormalization" not in {node.op_type for node in made.model.graph.node}
    made = translated(network("everything", **SHIFTS), tmp_path)
    assert made.inexact == ()


def test_what_is_rounded_is_said(tmp_path, network):
    config = SHIFTS | {"integer_datapath": False}
    made = translated(network("normalized first", **config), tmp_path)
    assert any("constants that no quantizer follows" in sentence for sentence in made.inexact)


def test_types_of_a_layer_worked_by_hand(tmp_path):
    """Weights 1 and -2 of 3 bits, inputs of 2 bits from 0 to 3: sums from -6 to 3."""
    builder = Builder(stream=False)
    x = Value("x", (2,), 1.0, 0.0, 3.0, 1.0)
    weights = Weights(np.array([[1.0, -2.0]]), holding(-4, 3, 1))
    y = builder.multiply("fc", x, weights, np.array([0.25]), last=False)
    assert (y.least, y.most, y.step) == (-5.75, 3.25, 0.25)
    assert builder.layers["fc"]["Precision"] == {
        "weight": "ap_fixed<3,3>", "bias": "ap_ufixed<1,-1>", "accum": "ap_fixed<6,4>",
        "result": "auto",
    }  # fmt: skip


def test_large_layers_use_their_multipliers_again(tmp_path, network):
    module = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 5))
    layers = translated(network(module, **SHIFTS), tmp_path, stream=False).layers
    assert (layers["layer_1"]["ReuseFactor"], layers["layer_1"]["Strategy"]) == (3, "Resource")
    assert (layers["layer_3"]["ReuseFactor"], layers["layer_3"]["Strategy"]) == (1, "Latency")


@pytest.mark.parametrize(
    ("wanted", "inputs", "outputs", "allowed"),
    [(1, 64, 384, 1), (6, 64, 384, 8), (16, 64, 384, 16), (65, 64, 384, 128), (300, 64, 5, 320),
     (9999, 3, 4, 12)],
)  # fmt: skip
def test_reuse_factors_are_those_hls4ml_takes(wanted, inputs, outputs, allowed):
    """``_validate_reuse_factor`` of hls4ml's FPGA backends, worked by hand."""
    assert allowed_reuse(wanted, inputs, outputs) == allowed


# what cannot be


def strange(operation) -> nn.Module:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(operation(self.first(x))).flatten(1)

    return Strange()


@pytest.mark.parametrize(
    ("net", "config", "found"),
    [
        (strange(torch.sigmoid), {}, "must be one of .*, got Sigmoid; use the format onnx"),
        (strange(lambda x: F.max_pool2d(x, 3, 1, 1)), {}, "no padding where values"),
        (strange(lambda x: F.max_pool2d(F.relu(x), 3, 1, 1)), {}, "windows of 3 x 3 every 1 x 1"),
        (strange(lambda x: F.hardtanh(x)), {}, "must be bounded below by 0, got -1.0; use a ReLU"),
        (strange(lambda x: x + x.flip(3)), {}, "must be one of .*, got Slice"),
        (strange(lambda x: torch.cat([x, x], 2)[:, :, :8]), {}, "must be one of .*, got Slice"),
        (strange(F.relu), {"input_bits": 32}, "input of 2 to 8 bits|a tensor of 2 to 8 bits"),
        ("everything", {"act_bits": 16}, "must have at most 8 bits, got 16; set act_bits to 8"),
        (strange(F.relu), {"first_last_bits": 32}, "weights of 1 to 8 bits, got float"),
    ],
)  # fmt: skip
def test_findings(network, sample, net, config, found):
    qmodel = network(net, **SHIFTS | config)
    with pytest.raises(RequestError, match=found):
        raise RequestError(" ".join(map(str, hls4ml.check(qmodel, sample))))


def test_operands_of_several_scales_are_found(network, sample):
    config = SCALES | {"integer_datapath": False}
    (finding,) = hls4ml.check(network("everything", **config), sample)
    assert finding.layer == "Add" or finding.layer == "add"
    assert "--integer-datapath" in finding.repair


def pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 5),
    )  # fmt: skip


def test_averages_whose_sums_are_too_fine_are_found(tmp_path, network, sample):
    """An average of what is not quantized, with scales that are no powers of two."""
    qmodel = network(pooled(), **SCALES | {"integer_datapath": False})
    (finding,) = hls4ml.check(qmodel, sample)
    assert str(finding) == (
        "2: must average quantized values, got others, and no factor of 52 bits keeps all codes; "
        "prepare with --integer-datapath, or QuantConfig(integer_datapath=True)"
    )
    with pytest.raises(RequestError, match="2: must average quantized values"):
        export.write(qmodel, tmp_path / "out", format="hls4ml", sample=sample)
    assert hls4ml.check(network(pooled(), **SCALES), sample) == ()


def test_channels_too_far_apart_are_found(network, sample, monkeypatch):
    def too_fine(*_):
        raise fixed_point.TooFine("no factor of 52 bits keeps all codes")

    monkeypatch.setattr(fixed_point, "same_codes", too_fine)
    (finding,) = hls4ml.check(network("perceptron", **SCALES), sample)
    assert finding.layer == "4_input"
    assert "--batch-norm fold" in finding.repair


def test_all_strange_operators_are_found_at_once(network, sample):
    qmodel = network(strange(lambda x: torch.sigmoid(x) * torch.tanh(x)), **SHIFTS)
    assert [f.got for f in hls4ml.check(qmodel, sample)] == ["Sigmoid", "Tanh", "Mul"]


def test_nothing_is_found_before_calibration_and_the_network_stays_as_it_is(network, sample):
    qmodel = network("everything", **SHIFTS)
    for quantizer in qmodel.act_quantizers().values():
        quantizer.calibrated.fill_(False)
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    assert hls4ml.check(qmodel, sample) == ()
    assert all(torch.equal(tensor, before[name]) for name, tensor in qmodel.state_dict().items())
    assert not qmodel.calibrated


def test_signals_are_found(network):
    (finding,) = hls4ml.check(network("perceptron", **SHIFTS), torch.zeros(1, 3, 64))
    assert str(finding).startswith("input: must be images (N, C, H, W), got (1, 3, 64)")


def test_writing_refuses_by_name(tmp_path, network, sample):
    qmodel = network(strange(torch.sigmoid), **SHIFTS)
    with pytest.raises(RequestError, match="got Sigmoid"):
        export.write(qmodel, tmp_path / "out", format="hls4ml", sample=sample)
    assert not (tmp_path / "out").exists()
    with pytest.raises(Unsupported, match="do not overlap"):
        translated(network("overlapping", **SHIFTS), tmp_path)
