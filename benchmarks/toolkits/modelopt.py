"""NVIDIA ModelOpt: ``mtq.quantize`` with integers of any width and scales by least squared error.

Its documentation names INT8 alone for convolutional networks; narrower integers are simulated just
as well. Learned scales (``lsq``) it has for NVFP4 blocks only.
"""

from functools import partial

import modelopt.torch.quantization as mtq

from benchmarks.toolkits._job import Answer, Job, layers, write_onnx

REQUIRES = (
    "nvidia-modelopt==0.47.0",
    "requests==2.34.2",  # this and the next it imports and does not declare
    "huggingface_hub==2.4.0",
    "onnx==1.23.2",
    "onnxscript==0.7.2",
)


def run(job: Job) -> Answer:
    """Return a network of uniform bits."""
    network = job.network()
    bits = job.uniform()
    rules = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": job.request.act_bits}},
    ]
    for name, width in bits.items():
        cfg = {"num_bits": width, "axis": 0}
        rules.append({"quantizer_name": f"{name}.weight_quantizer", "cfg": cfg})
    config = {"quant_cfg": rules, "algorithm": {"method": "mse"}}
    mtq.quantize(network, config, job.calibrate)
    if job.request.task == "qat":
        job.train_(network)
    network.eval()

    weights = {
        name: layer.weight_quantizer(layer.weight) for name, layer in layers(network).items()
    }
    return Answer(network, bits, weights, partial(write_onnx, network, job.example))
