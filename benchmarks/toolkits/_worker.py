"""Runs one toolkit on one job, in the toolkit's own environment.

    python -P -m benchmarks.toolkits._worker TOOLKIT JOB OUT

``benchmarks/peers.py`` calls it. Only data crosses: ``JOB`` holds float weights and images, ``OUT``
a request, and gets logits of the test images, bits, weights, seconds, memory and, if it can be, an
ONNX file.
"""

import importlib
import importlib.metadata
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks._reports import resident
from benchmarks.toolkits._job import Answer, Job, Request


def main() -> None:
    name, folder, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    job = Job(Request.load(out / "request.json"), folder)
    toolkit = importlib.import_module(f"benchmarks.toolkits.{name}")
    torch.manual_seed(job.request.seed)
    job.calibration  # noqa: B018  # read before the clock starts
    wall, cpu = time.perf_counter(), time.process_time()
    answer: Answer = toolkit.run(job)
    found = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": resident("VmHWM"),  # this program's own; getrusage has its parent's
        "bits": dict(answer.bits),
        "note": answer.note,
        "versions": versions(toolkit.REQUIRES),
        "onnx": "",
    }
    with torch.no_grad():
        logits = torch.cat([answer.module(images) for images in job.test_images()])
    np.savez(out / "logits.npz", logits=logits.float().numpy())
    save_file(
        {k: v.detach().contiguous() for k, v in answer.weights.items()}, out / "weights.safetensors"
    )
    if answer.write is not None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                answer.write(out / "model.onnx")
        except Exception as error:  # noqa: BLE001  # a toolkit's own exporter may raise anything
            found["onnx"] = f"{type(error).__name__}: {(str(error) or ' ').splitlines()[0]}"[:300]
    (out / "result.json").write_text(json.dumps(found))


def versions(requirements: tuple[str, ...]) -> dict[str, str]:
    names = ["torch", "brevitas", *(requirement.split("==")[0] for requirement in requirements)]
    return {d.name: d.version for d in importlib.metadata.distributions() if d.name in names}


if __name__ == "__main__":
    main()
