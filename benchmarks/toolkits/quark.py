"""AMD Quark: eager quantization, integers of 2, 3, 4 or 8 bits, ranges by greatest magnitude.

This file has not run yet: it is written from the toolkit's documentation and signatures.
"""

import torch
from quark.torch import ModelQuantizer
from quark.torch.quantization.config.config import (
    Int8PerTensorSpec,
    QConfig,
    QLayerConfig,
    QTensorConfig,
)
from quark.torch.quantization.config.type import Dtype, QSchemeType, RoundType, ScaleType
from quark.torch.quantization.observer.observer import PerChannelMinMaxObserver

from benchmarks.toolkits._job import CALIBRATION_BATCH, Answer, Job

REQUIRES = ("amd-quark==0.13",)
DTYPES = {2: Dtype.int2, 3: Dtype.int3, 4: Dtype.int4, 8: Dtype.int8}


def run(job: Job) -> Answer:
    """Return a network of uniform bits."""
    bits = job.uniform()
    config = QConfig(
        global_quant_config=layer(job.request.bits),
        layer_quant_config={name: layer(job.request.edge_bits) for name in job.request.edges},
    )
    quantizer = ModelQuantizer(config)
    batches = torch.utils.data.DataLoader(job.calibration, batch_size=CALIBRATION_BATCH)
    network = quantizer.quantize_model(job.network(), batches)
    if job.request.task == "qat":
        job.train_(network)
    network.eval()
    quantized = {name: network.get_submodule(name) for name in bits}
    weights = {name: module.get_quant_weight(module.weight) for name, module in quantized.items()}
    return Answer(network, bits, weights)


def layer(bits: int) -> QLayerConfig:
    """Return a layer's configuration: symmetric weights of so many bits, an 8-bit input."""
    weight = QTensorConfig(
        dtype=DTYPES[bits], observer_cls=PerChannelMinMaxObserver, symmetric=True,
        scale_type=ScaleType.float, round_method=RoundType.half_even,
        qscheme=QSchemeType.per_channel, ch_axis=0, is_dynamic=False,
    )  # fmt: skip
    return QLayerConfig(input_tensors=Int8PerTensorSpec().to_quantization_spec(), weight=weight)
