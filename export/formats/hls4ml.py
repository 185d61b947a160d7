"""hls4ml: a project of C++ for FPGAs, with the QONNX file it states.

The file is that of the format ``qonnx``. In the folder ``hls4ml`` beside it stand the network as
hls4ml is given it (channels last, constants short enough for hardware, a fixed-point type for every
tensor), its configuration, the generated project, and a README with the commands. The C simulation
is the project compiled with g++; it runs in a process of its own, and shows the integer codes.

Source: https://github.com/fastmachinelearning/hls4ml
"""

import functools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from export import graph
from export.findings import Finding
from export.format import Format, Runner, ToolMissing, Trace
from export.formats import qonnx
from export.hls4ml_flow import project, rules, simulation
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.operators import OPERATORS
from export.hls4ml_flow.project import Options
from export.hls4ml_flow.reading import Reader
from sdq.batches import Normalization
from sdq.errors import RunError
from sdq.quant_model import QuantModel

FILE = "model_hls4ml.onnx"
SIMULATION = "hls4ml C simulation"
RUNTIMES = (SIMULATION,)
REWRITES: tuple[str, ...] = ()
ADVICE: dict[str, str] = {}

metadata = qonnx.metadata
bits = qonnx.bits
quantizers = qonnx.quantizers
open_exact = qonnx.open_exact


def configured(options: Options) -> Format:
    """Return this format with other hardware options, to be given to :func:`export.write`.

    >>> configured(Options(part="xczu3eg-sbva484-1-e")).FILE
    'model_hls4ml.onnx'
    """
    names = [name for name in globals() if not name.startswith("_")]
    contract = {name: globals()[name] for name in names}
    contract |= {
        "__name__": __name__,
        "check": functools.partial(check, options=options),
        "write": functools.partial(write, options=options),
    }
    return cast(Format, SimpleNamespace(**contract))


def check(
    qmodel: QuantModel, sample: Tensor, *, options: Options | None = None
) -> tuple[Finding, ...]:
    """Return what hls4ml cannot take in a network."""
    return rules.check(qmodel, sample, (options or Options()).io_type)


def write(
    qmodel: QuantModel,
    folder: Path,
    *,
    sample: Tensor,
    preprocessing: Normalization | None = None,
    metadata: Mapping[str, str],
    options: Options | None = None,
) -> None:
    """Write the network and the project; see :func:`export.write` for the arguments.

    Without the package hls4ml all is written but the project, with a warning.

    Raises:
        RequestError: hls4ml cannot take something in the network.
        RunError: the exporter or hls4ml failed.
    """
    options = options or Options()
    qonnx.write(qmodel, folder, sample=sample, preprocessing=preprocessing, metadata=metadata)
    path = (folder / qonnx.FILE).rename(folder / FILE)
    model = graph.load(path)
    stream = rules.streamed(model, options.io_type)
    builder = Builder(stream, options.parallel_products, options.reuse_factor)
    network = Reader(model, quantizers(path), builder).network(OPERATORS)
    (folder / project.FOLDER).mkdir()
    project.write(folder / project.FOLDER, network, options)


def run(path: Path, inputs: Tensor) -> Tensor:
    """Run the C simulation."""
    return open_runtime(path, SIMULATION, taps=False)(inputs).output


def open_runtime(path: Path, runtime: str, *, taps: bool) -> Runner:
    """Compile the project and return a runner of it.

    Raises:
        ToolMissing: there is no project, for hls4ml was not installed; or no g++.
        RunError: it does not compile.
    """
    folder = path.parent / project.FOLDER
    if not (folder / project.SPEC).is_file():
        raise ToolMissing(
            f"hls4ml was not installed when {path.name} was written, and there is no project; "
            f"{project.INSTALL} and export again"
        )
    if shutil.which("g++") is None:
        raise ToolMissing("g++ compiles the C simulation and is not installed; install it")
    spec = json.loads((folder / project.SPEC).read_text(encoding="utf-8"))
    if not taps:
        spec |= {"traced": {}, "taps": {}}
    values = graph.metadata(graph.load(path)).get("normalization")
    prepare = Normalization(**json.loads(values)) if values else None
    # the export's folder stays as it was written
    work = tempfile.TemporaryDirectory(prefix="sdq-hls4ml-")
    library = _compiled(path, folder / project.PROJECT, Path(work.name))

    def once(inputs: Tensor) -> Trace:
        images = inputs.permute(0, 2, 3, 1) if prepare is None else _prepared(prepare, inputs)
        found = _simulated(path, Path(work.name), library, spec, images)
        output = _channels_first(found["output"], spec["output"]) * spec["output"]["unit"]
        codes = {
            name: torch.round(_channels_first(found[tap["layer"]], tap) / tap["scale"]).int()
            for name, tap in spec["taps"].items()
        }
        return Trace(output.float(), codes)

    return once


def _prepared(normalization: Normalization, pixels: Tensor) -> Tensor:
    return normalization(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _channels_first(values: np.ndarray, place: Mapping[str, Any]) -> Tensor:
    """Return what a layer gave, ``(N, values)``, in the shape the file has it."""
    tensor = torch.from_numpy(values).reshape(len(values), *place["shape"])
    if tensor.dim() == 4:
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    return tensor.flatten(1) if place["flat"] else tensor


def _compiled(path: Path, source: Path, folder: Path) -> Path:
    """Compile a copy of the project; return the library."""
    shutil.copytree(source, folder / "project")
    script = folder / "project" / "build_lib.sh"
    done = subprocess.run(
        ["bash", script.name], cwd=script.parent, capture_output=True, text=True, check=False
    )
    libraries = sorted((script.parent / "firmware").glob("*.so"))
    if done.returncode or not libraries:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise RunError(f"{path}: the hls4ml project does not compile: {lines[0]}")
    return libraries[0]


def _simulated(
    path: Path, folder: Path, library: Path, spec: dict[str, Any], images: Tensor
) -> dict[str, np.ndarray]:
    """Run images ``(N, H, W, C)`` in a process of its own, which may crash."""
    inputs, outputs, plan = folder / "inputs.npy", folder / "outputs.npz", folder / "plan.json"
    outputs.unlink(missing_ok=True)
    np.save(inputs, images.double().numpy() / spec["input"]["unit"])
    sizes = {"output": int(np.prod(spec["output"]["shape"]))}
    plan.write_text(json.dumps(spec | sizes), encoding="utf-8")
    command = [
        sys.executable,
        "-I",
        str(simulation.__file__),
        *map(str, (library, plan, inputs, outputs)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RunError(f"{path}: the C simulation was ended by {name}; the last it said: {said}")
    if not outputs.is_file():
        said = ((done.stderr + done.stdout).strip().splitlines() or ["nothing"])[-1]
        raise RunError(f"{path}: the C simulation failed: {said}")
    with np.load(outputs, allow_pickle=False) as content:
        return {name: content[name] for name in content.files}
