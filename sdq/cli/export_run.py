"""``sdq export``: a run's network as a file for another runtime, checked against PyTorch."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import export
import hw
from export.findings import refuse
from export.format import VERIFICATION, ToolMissing
from sdq import plugins
from sdq.batches import Normalization
from sdq.cli import completion, options
from sdq.cli import inputs as inp
from sdq.cli.progress import finite, show_json, show_table, stages
from sdq.cli.run_data import run_inputs
from sdq.errors import RequestError, RunError
from sdq.quant_model import QuantModel
from sdq.run_folder import RunFolder

SAMPLES, SIMULATED = 500, 10
"""Images that are verified on, and that layers are simulated with, by default."""


def export_run(
    run: Annotated[Path, typer.Argument(help="Run folder of `sdq quantize`.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="A name (see `sdq list formats`), or several, separated by commas.",
            autocompletion=completion.several("export.formats", dashes=True),
        ),
    ] = "onnx",
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; default RUN/export/FORMAT. Of several formats, its parent."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Write nothing; say what the format cannot take, and what to do."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Run the file and compare it with PyTorch.")
    ] = False,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing",
            help="Put the normalisation into the file, which then takes uint8 N x H x W x C.",
        ),
    ] = False,
    samples: Annotated[
        int | None, typer.Option(min=1, help=f"Images to verify on; default {SAMPLES}.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier export.")
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="Of ONNX; default: what the format prefers.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Board that the files are for (finn: pynq_z2, ultra96, zcu102, ...)."),
    ] = None,
    fps: Annotated[
        int | None, typer.Option(min=1, help="Frames a second that the hardware is folded for.")
    ] = None,
    build: Annotated[
        bool,
        typer.Option(
            "--build",
            help="Run the compiler too, as far as its tools are installed; reports land in --out.",
        ),
    ] = False,
    simulate_layer: Annotated[
        str | None,
        typer.Option(
            help="With --build: simulate a layer of it in Verilator: its name, an activation "
            "quantizer, first or all."
        ),
    ] = None,
    simulate_samples: Annotated[
        int | None, typer.Option(min=1, help=f"Images to simulate; default {SIMULATED}.")
    ] = None,
    data: options.OptionalData = None,
    data_root: options.DataRoot = None,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a run's network in file formats; with --verify, prove that they compute the same.

    With --check it only says what a format cannot take, all at once; exit code 2 if there is any.

    Examples:
    - written, and compared with PyTorch: `sdq export q --format onnx,qonnx --verify`

    - what FINN could not take, and why: `sdq export q --format finn --check`
    """
    formats = {name: plugins.load("export.formats", name) for name in _split(format_)}
    for option, given in (("--build", build), ("--target", target), ("--fps", fps)):
        if given and not any(hasattr(plugin, "build") for plugin in formats.values()):
            raise RequestError(
                f"export: {option} must be asked of a format with a compiler, got {format_!r}; "
                "leave it out"
            )
    if check and (build or verify or out is not None):
        raise RequestError(
            "--check: must stand without --out, --build and --verify; it writes nothing"
        )
    hardware = [name for name, plugin in formats.items() if hasattr(plugin, "simulate")]
    if simulate_layer is not None and not (build and hardware):
        raise RequestError(
            "--simulate-layer: must stand with --build and a format that generates hardware (finn)"
        )
    for option, given, other, needed in (
        ("--samples", samples, "--verify", verify),
        ("--simulate-samples", simulate_samples, "--simulate-layer", simulate_layer is not None),
    ):
        if given is not None and not needed:
            raise RequestError(f"{option}: must stand with {other}, got {given} without it")
    wanted = {"target": target, "fps": fps}
    asked = {key: str(value) for key, value in wanted.items() if value is not None}
    for plugin in formats.values():  # before the first of them is written
        if hasattr(plugin, "board_of"):
            plugin.board_of(asked)
    folder = RunFolder.open(run)
    qmodel = inp.load_quantized(folder)
    if check:
        found = [check_run(folder, qmodel, name, quiet=quiet) for name in formats]
        if json_:
            show_json(found[0] if len(found) == 1 else {"exports": found})
        raise typer.Exit(0 if all(one["accepted"] for one in found) else 2)
    sample = torch.zeros(1, *folder.read_json("run.json")["data"]["image_shape"])
    for name in formats:  # all of them before the first is written
        refuse(name, export.check(qmodel, format=name, sample=sample))
    expected = {
        name: _expected(qmodel, target, fps)
        for name, plugin in formats.items()
        if target is not None and fps is not None and target in getattr(plugin, "BOARDS", ())
    }
    inputs = None
    # open the data first: a wrong --data-root must not leave a file behind
    if verify or simulate_layer is not None:
        inputs = run_inputs(folder, data, str(data_root) if data_root else None)
    documents, wrong = [], []
    for name, plugin in formats.items():
        place = _folder_of(name, run, out, alone=len(formats) == 1)
        wishes = asked if hasattr(plugin, "build") else {}
        document = write_and_verify(
            folder, qmodel, inputs if verify else None, name, place, with_preprocessing,
            samples or SAMPLES, overwrite, opset, wishes, quiet=quiet,
        )  # fmt: skip
        if name in expected:
            document["expected"] = expected[name]
        if build and hasattr(plugin, "build"):
            try:
                document["build"] = plugin.build(place)
            except ToolMissing as error:  # the other formats need no such tool
                wrong.append(f"{place}: written, not built: {error}")
        built = "build" in document
        if simulate_layer is not None and inputs is not None and name in hardware and built:
            pixels = _pixels(inputs, simulate_samples or SIMULATED)
            document |= simulate(
                qmodel, place, name, simulate_layer,
                pixels if with_preprocessing else _normalization(folder)(pixels),
            )  # fmt: skip
        if not quiet:
            print(describe(document), flush=True)
        if document.get("verification", {}).get("verified") is False:
            wrong.append(f"{place}: the file does not compute what PyTorch computes")
        if any(layer["different"] for layer in document.get("simulation", ())):
            wrong.append(f"{place}: the hardware does not compute what FINN's Python computes")
        documents.append(document)
    if json_:
        show_json(documents[0] if len(formats) == 1 else {"exports": documents})
    if wrong:
        raise RunError(f"{'; '.join(wrong)}; see above")


def _expected(qmodel: QuantModel, target: str, fps: int) -> dict[str, float]:
    """Return what our model of a target says of a network at a rate.

    FINN folds by the rules that the model has: each layer as little as keeps the rate.

    Raises:
        RequestError: the rate cannot be reached.
    """
    found = hw.report(qmodel.layers, qmodel.policy, target, hw.Demand(fps))
    return {name: value for name, value in found.totals.items() if name != "latency_s"}


def _split(formats: str) -> list[str]:
    names = [name.strip() for name in formats.split(",")]
    if len(set(names)) < len(names):
        raise RequestError(f"--format: must name each format once, got {formats!r}; drop one")
    return names


def _folder_of(name: str, run: Path, out: Path | None, *, alone: bool) -> Path:
    own = plugins.named(name)
    if out is None:
        return run / "export" / own
    return out if alone else out / own


def check_run(
    folder: RunFolder, qmodel: QuantModel, format_: str, *, quiet: bool
) -> dict[str, Any]:
    """Print what a format cannot take in a run's network; return it as JSON values."""
    sample = torch.zeros(1, *folder.read_json("run.json")["data"]["image_shape"])
    findings = [f.to_json() for f in export.rehearse(qmodel, format=format_, sample=sample)]
    if findings:
        show_table(f"{format_} cannot take {folder.path}", findings, quiet=quiet)
    elif not quiet:
        print(f"{format_} takes {folder.path} as it is")
    return {"format": format_, "accepted": not findings, "findings": findings}


def write_and_verify(
    folder: RunFolder,
    qmodel: QuantModel,
    inputs: inp.Inputs | None,
    format_: str,
    out: Path,
    with_preprocessing: bool = False,
    samples: int = SAMPLES,
    overwrite: bool = False,
    opset: int | None = None,
    wishes: Mapping[str, str] | None = None,
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write one format and, given data, verify it. Return what both report, as JSON values.

    ``wishes`` are the format's own options; they go into the file's metadata. Unless ``quiet``, how
    far the comparison is shows on standard error.
    """
    recorded = folder.read_json("run.json")["data"]
    normalization = _normalization(folder)
    preprocessing = normalization if with_preprocessing else None
    result = export.write(
        qmodel,
        out,
        format=format_,
        sample=torch.zeros(1, *recorded["image_shape"]),
        preprocessing=preprocessing,
        metadata={
            "class_names": recorded["class_names"],
            "mean": recorded["mean"],
            "std": recorded["std"],
            "run": str(folder.path.name),
            "run_sha256": _sha256(folder.path / "model.safetensors"),
            **(wishes or {}),
        },
        overwrite=overwrite,
        opset=opset,
    )
    document: dict[str, Any] = {"export": {**result.to_json(), "path": str(result.path)}}
    if inputs is not None:
        pixels = _pixels(inputs, samples)
        images = pixels if with_preprocessing else normalization(pixels)
        with stages(f"verify {format_}", quiet=quiet) as watch:
            report = export.verify(qmodel, out, format=format_, inputs=images, watch=watch)
        document["verification"] = finite(report.to_json())
        _keep(out, document["verification"])
        document["summary"] = list(report.lines)
    return document


def _keep(folder: Path, verification: dict[str, Any]) -> None:
    """Write what a verification found beside the file; other formats' in the folder stay."""
    path = folder / VERIFICATION
    before = RunFolder(folder).read_json(VERIFICATION) if path.is_file() else {}
    RunFolder(folder).write_json(VERIFICATION, before | {verification["format"]: verification})


def simulate(
    qmodel: QuantModel, place: Path, format_: str, layer: str, images: torch.Tensor
) -> dict[str, Any]:
    """Simulate layers of a build; return what is reported, and the same for people."""
    found = export.simulate_layers(qmodel, place, inputs=images, layer=layer, format=format_)
    return {
        "simulation": [layer.to_json() for layer in found],
        "simulated": [layer.line for layer in found],
    }


def _normalization(folder: RunFolder) -> Normalization:
    recorded = folder.read_json("run.json")["data"]
    return Normalization(tuple(recorded["mean"]), tuple(recorded["std"]))


def _pixels(inputs: inp.Inputs, samples: int) -> torch.Tensor:
    """Return images of the test set ``(N, C, H, W)``, uint8, evenly over it."""
    part = inputs.splits.test or inputs.splits.val or inputs.splits.train
    count = min(samples, len(part))
    return part.images.take(torch.linspace(0, len(part) - 1, count).long())


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(document: dict[str, Any]) -> str:
    """Return what a person wants to read of an export."""
    written = document["export"]
    stored = written["container_bytes"]
    weights = f"weights: {written['weight_bytes']:,.0f} bytes of information"
    if stored is not None:
        weights += f", {stored:,} in their containers"
    lines = [
        f"{written['path']}  {written['file_bytes']:,} bytes  sha256 {written['sha256'][:12]}",
        weights,
    ]
    lines += document.get("summary", [])
    if "expected" in document:
        lines.append(f"expected (docs/hardware.md): {_counts(document['expected'])}")
    lines += _describe_build(document)
    return "\n".join(lines + document.get("simulated", []))


def _describe_build(document: dict[str, Any]) -> list[str]:
    found = document.get("build")
    if found is None:
        return []
    counts = _counts(found["resources"])
    rate = found["performance"]["estimated_throughput_fps"]
    return [f"estimated: {counts}; {rate:,.0f} frames a second; reports in {found['reports']}"]


def _counts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{value:,.0f} {name}" for name, value in resources.items())
