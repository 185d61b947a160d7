"""The compiled project, run on images in a process of its own."""

import json
import math
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.format import Trace
from export.hls4ml_flow import simulation
from sdq.batches import Normalization
from sdq.errors import RunError


class Simulation:
    """A project compiled with g++, in a folder of its own that goes with it.

    Args:
        path: of the file the project belongs to, for messages.
        source: the project; left as it is.
        spec: what its arrays mean, see :mod:`export.hls4ml_flow.project`.
        prepare: what is done with pixels before they come in.

    Raises:
        RunError: the project does not compile.
    """

    def __init__(
        self, path: Path, source: Path, spec: dict[str, Any], prepare: Normalization | None
    ) -> None:
        self.path, self.spec, self.prepare = path, spec, prepare
        self.folder = Path(tempfile.mkdtemp(prefix="sdq-hls4ml-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        project = Path(shutil.copytree(source, self.folder / "project"))
        done = subprocess.run(
            ["bash", "build_lib.sh"], cwd=project, capture_output=True, text=True, check=False
        )
        libraries = sorted((project / "firmware").glob("*.so"))
        if done.returncode or not libraries:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            message = lines[0] if lines else "no message"
            raise RunError(f"{path}: the hls4ml project does not compile: {message}")
        self.library = libraries[0]

    def __call__(self, inputs: Tensor) -> Trace:
        """Run normalised images ``(N, C, H, W)``; or pixels ``(N, H, W, C)``, which it prepares.

        Raises:
            RunError: the simulation crashes.
        """
        images = inputs if self.prepare is None else self.prepare(inputs.permute(0, 3, 1, 2))
        found = self._simulated(images.permute(0, 2, 3, 1))
        place = self.spec["output"]
        output = _channels_first(found["output"], place) * place["unit"]
        codes = {
            name: torch.round(_channels_first(found[tap["layer"]], tap) / tap["scale"]).int()
            for name, tap in self.spec["taps"].items()
        }
        return Trace(output.float(), codes)

    def _simulated(self, images: Tensor) -> dict[str, np.ndarray]:
        """Run images ``(N, H, W, C)`` in a process that may crash."""
        inputs, outputs = self.folder / "inputs.npy", self.folder / "outputs.npz"
        plan = self.folder / "plan.json"
        outputs.unlink(missing_ok=True)
        np.save(inputs, images.double().numpy() / self.spec["input"]["unit"])
        size = {"output": math.prod(self.spec["output"]["shape"])}
        plan.write_text(json.dumps(self.spec | size), encoding="utf-8")
        files = (simulation.__file__, self.library, plan, inputs, outputs)
        done = subprocess.run(
            [sys.executable, "-I", *map(str, files)], capture_output=True, text=True, check=False
        )
        if done.returncode < 0 or not outputs.is_file():
            end = "failed"
            if done.returncode < 0:
                end = f"was ended by {signal.Signals(-done.returncode).name}"
            said = (done.stderr + done.stdout).strip().splitlines()
            last = f"; the last it said was: {said[-1]}" if said else ""
            raise RunError(f"{self.path}: the C simulation {end}{last}")
        with np.load(outputs, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}


def _channels_first(values: np.ndarray, place: Mapping[str, Any]) -> Tensor:
    """Return what a layer gave, ``(N, values)``, in the shape the file has it."""
    tensor = torch.from_numpy(values).reshape(len(values), *place["shape"])
    if tensor.dim() == 4:
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    return tensor.flatten(1) if place["flat"] else tensor
