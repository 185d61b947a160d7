"""SDQ's quantizers and training with equal bits in all inner layers."""

from benchmarks.toolkits import sdq as ours
from benchmarks.toolkits._job import Answer, Job

REQUIRES: tuple[str, ...] = ()


def run(job: Job) -> Answer:
    """Return a network of uniform bits."""
    return ours.quantized(job, "uniform")
