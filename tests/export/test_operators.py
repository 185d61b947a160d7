"""The interpreter's operators against onnxruntime and qonnx: another implementation of each."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from export.float64 import Interpreter, fold_constants_
from export.operators import OPERATORS
from sdq.errors import RunError

rng = np.random.default_rng(0)


def f(*shape):
    return rng.normal(size=shape).astype(np.float32)


def i(*values):
    return np.array(values, np.int64)


IMAGE = f(2, 3, 9, 9)
CASES = {
    "Add": (IMAGE, [f(1, 3, 1, 1)], {}),
    "AveragePool padded": (IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1]}),
    "AveragePool counting pads": (
        IMAGE, [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ),
    "BatchNormalization": (IMAGE, [f(3), f(3), f(3), abs(f(3)) + 0.1], {"epsilon": 1e-3}),
    "Clip": (IMAGE, [np.float32(-0.5), np.float32(0.7)], {}),
    "Concat": (IMAGE, [f(2, 4, 9, 9)], {"axis": 1}),
    "Conv": (IMAGE, [f(4, 3, 3, 3), f(4)], {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "Conv grouped": (IMAGE, [f(6, 1, 3, 3)], {"group": 3, "dilations": [2, 1]}),
    "Conv same": (IMAGE, [f(4, 3, 2, 4)], {"auto_pad": "SAME_UPPER", "kernel_shape": [2, 4]}),
    "Conv same lower": (IMAGE, [f(4, 3, 2, 2)], {"auto_pad": "SAME_LOWER", "kernel_shape": [2, 2]}),
    "Conv valid": (IMAGE, [f(4, 3, 3, 3)], {"auto_pad": "VALID"}),
    "Conv 3d": (f(2, 3, 4, 5, 6), [f(4, 3, 1, 2, 3)], {"strides": [1, 2, 1]}),
    "Conv 1d": (f(2, 3, 9), [f(4, 3, 3)], {"pads": [1, 2]}),
    "CumSum": (IMAGE, [np.array(2)], {}),
    "Div": (IMAGE, [f(3, 1, 1)], {}),
    "Elu": (IMAGE, [], {"alpha": 0.7}),
    "Erf": (IMAGE, [], {}),
    "Expand": (f(2, 3, 1, 1), [i(2, 3, 4, 5)], {}),
    "Flatten": (IMAGE, [], {"axis": 2}),
    "GRU": (
        f(7, 2, 3), [f(2, 12, 3), f(2, 12, 4), f(2, 24)],
        {"hidden_size": 4, "direction": "bidirectional", "linear_before_reset": 1},
    ),
    "Gather": (IMAGE, [i(2, -1)], {"axis": 1}),
    "Gemm": (f(2, 5), [f(4, 5), f(4)], {"transB": 1, "alpha": 0.5, "beta": 2.0}),
    "GlobalAveragePool": (IMAGE, [], {}),
    "GlobalMaxPool": (IMAGE, [], {}),
    "GridSample": (
        IMAGE, [np.clip(f(2, 4, 5, 2), -1, 1)], {"mode": "bilinear", "align_corners": 0},
    ),
    "HardSigmoid": (IMAGE, [], {"alpha": 0.3}),
    "HardSwish": (IMAGE, [], {}),
    "LSTM": (
        f(7, 2, 3), [f(2, 16, 3), f(2, 16, 4), f(2, 32)],
        {"hidden_size": 4, "direction": "bidirectional"},
    ),
    "LSTM without bias": (f(7, 2, 3), [f(1, 16, 3), f(1, 16, 4)], {"hidden_size": 4}),
    "LeakyRelu": (IMAGE, [], {"alpha": 0.2}),
    "MatMul": (f(2, 5), [f(5, 4)], {}),
    "MaxPool": (IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    "MaxPool ceil": (IMAGE, [], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    "Mul": (IMAGE, [f(9)], {}),
    "Neg": (IMAGE, [], {}),
    "PRelu": (IMAGE, [f(3, 1, 1)], {}),
    "Pad": (IMAGE, [i(0, 1, 2, 0, 0, 2, 1, 1), np.float32(0.5)], {}),
    "Pad reflect": (IMAGE, [i(0, 0, 2, 1, 0, 0, 1, 3)], {"mode": "reflect"}),
    "Pow": (abs(IMAGE), [np.float32(1.5)], {}),
    "RNN": (
        f(7, 2, 3), [f(1, 4, 3), f(1, 4, 4), f(1, 8)],
        {"hidden_size": 4, "direction": "reverse", "activations": ["Relu"]},
    ),
    "ReduceMax": (IMAGE, [], {"axes": [2, 3], "keepdims": 0}),
    "ReduceLogSumExp": (IMAGE, [], {"axes": [2, 3], "keepdims": 0}),
    "ReduceProd": (abs(IMAGE) + 0.5, [], {"axes": [1, -1], "keepdims": 0}),
    "ReduceMean": (IMAGE, [], {"axes": [-1]}),
    "ReduceSum": (IMAGE, [i(1, 2)], {}),
    "Relu": (IMAGE, [], {}),
    "Reshape": (IMAGE, [i(0, -1, 3)], {}),
    "Resize nearest": (
        IMAGE, [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric",
         "nearest_mode": "floor"},
    ),
    "Resize linear": (
        IMAGE, [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)],
        {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
    ),
    "Resize cubic": (
        IMAGE, [np.zeros(0, np.float32), np.array([1, 1, 2, 2], np.float32)],
        {"mode": "cubic", "coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
    ),
    **{
        f"Resize {kind} {scale}": (
            IMAGE, [np.zeros(0, np.float32), np.array([1, 1, scale, scale], np.float32)],
            {"mode": kind, "coordinate_transformation_mode": where, "nearest_mode": "floor"},
        )
        for kind, where, scales in (
            ("nearest", "asymmetric", (2.3, 1.7, 1.25, 0.6)),
            ("linear", "half_pixel", (1.5, 0.5, 1 / 3)),
            ("linear", "align_corners", (1.7,)),
        )
        for scale in scales
    },
    "Sigmoid": (IMAGE, [], {}),
    "Slice": (IMAGE, [i(0, -1), i(9, -100), i(2, 3), i(2, -2)], {}),
    "Softmax": (IMAGE, [], {"axis": 1}),
    "Sqrt": (abs(IMAGE), [], {}),
    "Squeeze": (f(2, 1, 3, 1), [i(1)], {}),
    "Sub": (IMAGE, [f(9, 9)], {}),
    "Tanh": (IMAGE, [], {}),
    "TopK": (f(2, 9), [i(3)], {"axis": 1, "largest": 0}),
    "Trilu": (f(2, 4, 5), [np.array(1)], {"upper": 0}),
    "Transpose": (IMAGE, [], {"perm": [0, 2, 3, 1]}),
    "Unsqueeze": (IMAGE, [i(0, -1)], {}),
}  # fmt: skip


def model_of(op, x, constants, attributes, domain="", kind=TensorProto.FLOAT):
    names = [f"c{k}" for k in range(len(constants))]
    node = helper.make_node(op, ["x", *names], ["y"], name="node", domain=domain, **attributes)
    if op == "TopK":
        node.output.append("indices")
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(c), n) for c, n in zip(constants, names, strict=True)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def by_onnxruntime(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("case", CASES)
def test_operator(case):
    x, constants, attributes = CASES[case]
    model = model_of(case.split(" ")[0], x, constants, attributes)
    expected = by_onnxruntime(model, x)
    found = Interpreter(model)(torch.from_numpy(x))["y"]
    assert found.dtype is torch.float64
    # onnxruntime has float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", [np.int8, np.uint8])
@pytest.mark.parametrize("channels", [1, 3])
def test_quantize_and_dequantize_linear(kind, channels):
    # steps of 1/8 over scales that are powers of two: exact, and full of ties
    x = (np.arange(2 * 3 * 100).reshape(2, 3, 100) / 8 - 30).astype(np.float32)
    scale = np.array([0.25, 0.5, 2.0], np.float32)[:channels]
    zero = np.arange(channels).astype(kind)
    if channels == 1:
        scale, zero = scale.reshape(()), zero.reshape(())
    onnx_kind = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    model = model_of("QuantizeLinear", x, [scale, zero], {"axis": 1}, kind=onnx_kind)
    found = Interpreter(model)(torch.from_numpy(x))["y"].numpy()
    assert found.dtype == kind
    np.testing.assert_array_equal(found, by_onnxruntime(model, x))


@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("narrow", [0, 1])
def test_quant_as_qonnx_defines_it(signed, narrow):
    from qonnx.custom_op.general.quant import quant

    x = (np.arange(600).reshape(2, 300) / 8 - 30).astype(np.float32)
    constants = [np.float32(0.5), np.float32(0.0), np.float32(4.0)]
    model = model_of(
        "Quant", x, constants, {"signed": signed, "narrow": narrow, "rounding_mode": "ROUND"},
        "qonnx.custom_op.general",
    )  # fmt: skip
    expected = quant(x, *constants, signed, narrow, "ROUND")
    np.testing.assert_array_equal(Interpreter(model)(torch.from_numpy(x))["y"].numpy(), expected)


def test_unknown_operators_are_named():
    model = model_of("Asin", IMAGE, [], {})
    with pytest.raises(RunError, match=r"node 'node': operator must be one of .* got 'Asin'"):
        Interpreter(model)


def test_constants_are_folded_without_rounding():
    nodes = [
        helper.make_node("Concat", ["a", "b"], ["pads"], axis=0),
        helper.make_node("Identity", ["v"], ["value"]),
        helper.make_node("Add", ["v", "v"], ["doubled"]),
        helper.make_node("Pad", ["x", "pads", "value"], ["padded"]),
        helper.make_node("Add", ["padded", "doubled"], ["y"]),
    ]
    stored = {"a": i(0, 0, 1, 1), "b": i(0, 0, 1, 1), "v": np.float32(0.5)}
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, IMAGE.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 3, 11, 11))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    expected = by_onnxruntime(model, IMAGE)
    fold_constants_(model)
    # float arithmetic is left to the runtime
    assert [node.op_type for node in model.graph.node] == ["Add", "Pad", "Add"]
    np.testing.assert_array_equal(by_onnxruntime(model, IMAGE), expected)
    onnx.checker.check_model(model)


@pytest.mark.parametrize(
    ("name", "module", "attributes"),
    [
        ("HardSigmoid", nn.Hardsigmoid(), {"alpha": np.float32(1 / 6), "beta": np.float32(0.5)}),
        ("LeakyRelu", nn.LeakyReLU(0.01), {"alpha": np.float32(0.01)}),
        ("LeakyRelu", nn.LeakyReLU(0.3), {"alpha": np.float32(0.3)}),
        ("Elu", nn.ELU(0.7), {"alpha": np.float32(0.7)}),
    ],
)
def test_numbers_that_files_hold_in_float32_are_the_networks(name, module, attributes):
    """In float64 the file must be the network, not one whose 1/6 or 0.01 is off by 1e-8."""
    x = torch.linspace(-4, 4, 1001, dtype=torch.float64)
    held = {key: float(value) for key, value in attributes.items()}  # as onnx gives them
    torch.testing.assert_close(OPERATORS[name](held, x), module(x), rtol=1e-15, atol=1e-15)
