"""torchao: export quantization (PT2E) with its x86 quantizer, whose weight ranges are narrowed.

``quantize_`` and its int4 kernels are for linear layers; convolutions go this way. Its x86
quantizer is made for int8; the range of the codes is part of a public ``QuantizationSpec`` and may
be any. In training its fused fake quantizer would divide a weight's range by 2^(b-1) or one less,
and the conversion by their mean: the same at 8 bits, another network at 2. The unfused one asks the
observer, as the conversion does.
"""

import dataclasses
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchao.quantization.pt2e import (
    FakeQuantize,
    MovingAveragePerChannelMinMaxObserver,
    allow_exported_model_train_eval,
)
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

from benchmarks.toolkits._job import Answer, Job

EPS = 2**-12  # the least scale, as the default configuration has it

REQUIRES = ("torchao==0.18.0", "onnx==1.23.2", "onnxscript==0.7.2")


def run(job: Job) -> Answer:
    """Return a network of uniform bits, its normalisation folded into the weights."""
    training, network, bits = job.request.task == "qat", job.network(), job.uniform()
    quantizer = X86InductorQuantizer().set_global(narrowed(job.request.bits, job, training))
    for name in job.request.edges:
        edge = narrowed(job.request.edge_bits, job, training)
        quantizer.set_module_name_qconfig(name, edge)
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        network.train(training),
        (job.example,),
        dynamic_shapes=({0: batch},),
        strict=True,
    ).module()
    if training:
        module = allow_exported_model_train_eval(prepare_qat_pt2e(program, quantizer))
        job.train_(module)
    else:
        module = allow_exported_model_train_eval(prepare_pt2e(program, quantizer))
        module.eval()
        job.calibrate(module)
    module.eval()
    converted = convert_pt2e(module)

    def write(file: Path) -> None:
        program = torch.onnx.export(
            converted, (job.example,), dynamo=True, dynamic_shapes=({0: batch},),
            input_names=["images"], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(file)

    return Answer(converted, bits, weights_of(converted), write)


def narrowed(bits: int, job: Job, training: bool) -> QuantizationConfig:
    """Return the default configuration with fewer codes."""
    default = get_default_x86_inductor_quantization_config(is_qat=training)
    weight = dataclasses.replace(
        default.weight, quant_min=-(2 ** (bits - 1)), quant_max=2 ** (bits - 1) - 1
    )
    if training:
        observer = MovingAveragePerChannelMinMaxObserver
        weight = dataclasses.replace(
            weight, observer_or_fake_quant_ctr=FakeQuantize.with_args(observer=observer, eps=EPS)
        )
    act = dataclasses.replace(default.input_activation, quant_max=2**job.request.act_bits - 1)
    return dataclasses.replace(default, weight=weight, input_activation=act, output_activation=act)


def weights_of(module: torch.fx.GraphModule) -> dict[str, Tensor]:
    """Return what the graph's convolutions and linear layers take for weights, by layer name."""
    found = {}
    for node in module.graph.nodes:
        if node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default):
            path = list(node.meta["nn_module_stack"].values())[-1][0]
            found[path.removeprefix("L['self'].")] = value(module, node.args[1])
    return found


def value(module: torch.fx.GraphModule, node: Any) -> Any:
    """Return what a node that depends on no input gives."""
    if not isinstance(node, torch.fx.Node):
        return node
    if node.op == "get_attr":
        return attrgetter(node.target)(module)
    return node.target(*(value(module, arg) for arg in node.args), **node.kwargs)
