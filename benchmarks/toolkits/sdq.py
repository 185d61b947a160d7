"""SDQ: bits by the search that ``sdq quantize`` takes, with this project's own interpreter."""

from pathlib import Path

import sdq
from benchmarks.toolkits._job import Answer, Job
from sdq.ptq import search_method, soft_labelled

REQUIRES: tuple[str, ...] = ()
SEARCH = {"ptq": search_method(), "qat": "sdq"}
"""What ``sdq quantize`` takes with and without ``--ptq``."""


def run(job: Job) -> Answer:
    """Return a network of mixed bits."""
    return quantized(job, SEARCH[job.request.task])


def quantized(job: Job, method: str) -> Answer:
    """Return a network whose bits a search method chose within the mean of the request."""
    asked, network = job.request, job.network()
    config = sdq.QuantConfig(act_bits=asked.act_bits, first_last_bits=asked.edge_bits)
    qmodel = sdq.quantize(network, config, sample=job.example[:1])
    after_training = asked.task == "ptq"
    images = soft_labelled(network, job.calibration) if after_training else job.training_images()
    searching = sdq.SearchConfig(
        epochs=asked.search_epochs, seed=asked.seed, train_weights=not after_training
    )
    sdq.calibrate_(qmodel, soft_labelled(network, job.calibration))
    policy = sdq.search(
        qmodel, images, budget=sdq.Budget(avg_weight_bits=asked.bits), teacher=network,
        config=searching, method=method,
    )  # fmt: skip
    sdq.apply_policy_(qmodel, policy)
    if after_training:
        sdq.ptq_(qmodel, job.calibration, sdq.PtqConfig(seed=asked.seed))
    else:
        trains = method in ("sdq", "interpolate")
        epochs = asked.epochs - (asked.search_epochs if trains else 0)
        tuning = sdq.TrainConfig(epochs=epochs, seed=asked.seed)
        sdq.finetune_(qmodel, job.training_images(), teacher=network, config=tuning)
    qmodel.eval()

    def write(file: Path) -> None:
        import export

        export.write(qmodel, file.parent, format="onnx", sample=job.example[:1])

    return Answer(
        qmodel,
        {layer.name: layer.weight_bits for layer in policy},
        {b.name: qmodel.settled_quantizer(b.name)(qmodel.weight(b.name))[0] for b in policy},
        write,
    )
