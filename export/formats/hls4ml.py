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
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import cast

from torch import Tensor

from export import graph
from export.findings import Finding
from export.format import Format, Runner, ToolMissing
from export.formats import qonnx
from export.hls4ml_flow import project, rules
from export.hls4ml_flow.builder import Builder
from export.hls4ml_flow.operators import OPERATORS
from export.hls4ml_flow.project import Options
from export.hls4ml_flow.reading import Reader
from export.hls4ml_flow.runtime import Simulation
from sdq.batches import Normalization
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
    values = graph.file_metadata(path).get("normalization")
    prepare = Normalization(**json.loads(values)) if values else None
    return Simulation(path, folder / project.PROJECT, spec, prepare)
