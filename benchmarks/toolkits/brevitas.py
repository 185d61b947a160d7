"""Plain Brevitas: layer by layer, scales from least squared error, learned in training.

After training: calibration, GPTQ and bias correction, as its PTQ flow has them.
"""

from pathlib import Path

import brevitas.nn as qnn
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.graph.calibrate import bias_correction_mode, calibration_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant import Int8WeightPerChannelFloatMSE, ShiftedUint8ActPerTensorFloat
from torch import nn

from benchmarks.toolkits._job import Answer, Job

REQUIRES: tuple[str, ...] = ()  # the version that this project has


def run(job: Job) -> Answer:
    """Return a network of uniform bits."""
    bits = job.uniform()
    options = {
        "weight_quant": Int8WeightPerChannelFloatMSE,
        "weight_bit_width": lambda module, name: bits[name],
        "input_quant": ShiftedUint8ActPerTensorFloat,
        "input_bit_width": job.request.act_bits,
        "return_quant_tensor": False,
    }
    kinds = {nn.Conv2d: (qnn.QuantConv2d, options), nn.Linear: (qnn.QuantLinear, options)}
    network = layerwise_quantize(job.network(), kinds).eval()
    with torch.no_grad(), calibration_mode(network):
        job.calibrate(network)
    with torch.no_grad():
        network(job.example)  # where the weights' scales get their first values
    if job.request.task == "qat":
        job.train_(network)
    else:
        round_(network, job)
    network.eval()

    def write(file: Path) -> None:
        export_onnx_qcdq(
            network, args=job.example, export_path=str(file), opset_version=17, dynamo=False,
            input_names=["images"], dynamic_axes={"images": {0: "N"}},
        )  # fmt: skip

    with torch.no_grad():
        weights = {name: network.get_submodule(name).quant_weight().value for name in bits}
    return Answer(network, bits, weights, write)


def round_(network: nn.Module, job: Job) -> None:
    """Round each layer's weights so that the layers' outputs stay, and mend their means."""
    with torch.no_grad(), gptq_mode(network, use_quant_activations=True) as mode:
        for _ in range(mode.num_layers):
            job.calibrate(mode.model)
            mode.update()
    with torch.no_grad(), bias_correction_mode(network):
        job.calibrate(network)
