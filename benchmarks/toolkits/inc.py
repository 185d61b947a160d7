"""Intel Neural Compressor: static quantization of an exported graph, with 8-bit integers alone.

Its formats of fewer bits (RTN, GPTQ, AWQ, AutoRound) are for the weights of linear layers.
"""

import torch
from neural_compressor.torch.export import export
from neural_compressor.torch.quantization import INT8StaticQuantConfig, convert, prepare

from benchmarks.toolkits._job import Answer, Job, layers
from benchmarks.toolkits.torchao import weights_of

REQUIRES = ("neural-compressor-pt==3.10", "torchao==0.18.0")


def run(job: Job) -> Answer:
    """Return a network of 8 bits, whatever the request."""
    if job.request.task == "qat":
        raise SystemExit("has no training for exported graphs")
    batch = torch.export.Dim("batch")
    exported = export(job.network(), (job.example,), dynamic_shapes=({0: batch},))
    prepared = prepare(exported, INT8StaticQuantConfig())
    job.calibrate(prepared)
    converted = convert(prepared)
    bits = dict.fromkeys(layers(job.network()), 8)
    return Answer(converted, bits, weights_of(converted), note="8 bits only")
