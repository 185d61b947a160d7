"""Bits learned by gradient between neighbouring widths (FracBits), by ``interpolate`` of SDQ."""

from benchmarks.toolkits import sdq as ours
from benchmarks.toolkits._job import Answer, Job

REQUIRES: tuple[str, ...] = ()


def run(job: Job) -> Answer:
    """Return a network of mixed bits."""
    return ours.quantized(job, "interpolate")
