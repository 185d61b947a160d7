"""NNCF: ``nncf.quantize`` for its NPU target, the one that has 4-bit convolutions.

Convolutions can have 4 or 8 bits, no fewer. The ranges of its quantizers are parameters, so that
the quantized network is trained as it stands; only ``ptq`` has run to its end yet.
"""

import os
from pathlib import Path

os.environ.setdefault("NNCF_CI", "1")  # sends no statistics of use
# 0: however long its kernels take to compile
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "0")

import nncf
import torch
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    OverflowFix,
    QuantizationParameters,
)
from nncf.torch.quantization.layers import BaseQuantizer
from torch import nn

from benchmarks.toolkits._job import CALIBRATION_BATCH, Answer, Job, write_onnx

REQUIRES = ("nncf==3.4.0", "onnx==1.23.2", "onnxscript==0.7.2")


def run(job: Job) -> Answer:
    """Return a network of uniform bits."""
    batches = list(job.calibration.split(CALIBRATION_BATCH))
    advanced = AdvancedQuantizationParameters(
        overflow_fix=OverflowFix.DISABLE,
        activations_quantization_params=QuantizationParameters(num_bits=job.request.act_bits),
        weights_quantization_params=QuantizationParameters(num_bits=job.request.bits),
    )
    network = nncf.quantize(
        job.network(), nncf.Dataset(batches), subset_size=len(batches),
        target_device=nncf.TargetDevice.NPU, advanced_parameters=advanced,
    )  # fmt: skip
    quantizers = weight_quantizers(network, job)
    for name in job.request.edges:
        quantizers[name].num_bits = job.request.edge_bits
    if job.request.task == "qat":
        job.train_(network)
    network.eval()
    with torch.no_grad():
        weights = {n: q(network.get_submodule(n).weight) for n, q in quantizers.items()}

    def write(file: Path) -> None:
        native = nncf.strip(network, example_input=job.example)
        write_onnx(native, job.example, file)

    return Answer(
        network,
        {name: quantizer.num_bits for name, quantizer in quantizers.items()},
        weights,
        write,
    )


def weight_quantizers(network: nn.Module, job: Job) -> dict[str, BaseQuantizer]:
    """Return the quantizers of the layers' weights, hooks on an operation's input 1, by layer."""
    hooks = {
        path.replace(":", "/"): module
        for path, module in network.named_modules()
        if isinstance(module, BaseQuantizer)
    }
    found = {}
    for name in job.uniform():
        start = f"pre_hooks.{name.replace('.', '/')}/"
        here = [module for path, module in hooks.items() if start in path and "__1." in path]
        if len(here) != 1:
            raise SystemExit(f"layer {name}: must have one weight quantizer, got {list(hooks)}")
        found[name] = here[0]
    return found
