"""``sdq demo``: the whole path on built-in data, in a few minutes."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import hw
from sdq import plugins
from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.export_run import describe, write_and_verify
from sdq.cli.option_groups import ImageOptions, PlaceOptions, RunOptions, SourceOptions
from sdq.cli.plan import Limits, Plan
from sdq.cli.progress import Watch, show_json, show_table
from sdq.cli.quantize import asked_for, open_source, prepare, run_quantize
from sdq.cli.report import FILE as REPORT
from sdq.cli.report import network_beside, write_report
from sdq.cli.run_data import run_inputs
from sdq.cli.train import train
from sdq.config import QuantConfig, SearchConfig, TrainConfig
from sdq.errors import RequestError, RunError
from sdq.parallel import open_fabric
from sdq.policy import FLOAT_BITS, BitwidthPolicy
from sdq.quant_model import quantize
from sdq.run_folder import RunFolder

FORMATS = ("onnx", "qonnx")
MODEL, DATA, BITS = "vgg_like", "synthetic_derm", 2.0
EPOCHS = {"float": 7, "search": 3, "finetune": 2}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the demo's runs; must be new.")] = Path(
        "sdq-demo"
    ),
    seed: options.Seed = 0,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train, quantize uniformly and with SDQ, export, verify: on built-in data, no download.

    Example: `sdq demo --out demo`
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RequestError(f"--out: folder must be new or empty, got {str(out)!r}")
    for format_ in FORMATS:  # refuses before minutes of training, not after
        plugins.load("export.formats", format_)
    train(
        MODEL, DATA, out / "float", epochs=EPOCHS["float"], images=ImageOptions(seed=seed),
        place=PlaceOptions("cpu"), ending=RunOptions(quiet=quiet),
    )  # fmt: skip
    uniform = _quantized(out, "uniform", seed, quiet)
    learned = _quantized(out, "sdq", seed, quiet)
    rows = [
        _row("float", learned["float"], float_cost(out / "sdq")),
        _row(f"uniform {BITS:g} bits", uniform["quantized"], uniform),
        _row("SDQ", learned["quantized"], learned),
    ]
    show_table(f"{MODEL} on {DATA}, {learned['float']['num_examples']} test images", rows)
    folder = RunFolder.open(out / "sdq")
    qmodel, inputs = inp.load_quantized(folder), run_inputs(folder)
    exports = {}
    for format_ in FORMATS:
        document = write_and_verify(
            folder, qmodel, inputs, format_, out / "sdq" / "export" / format_, quiet=quiet
        )
        exports[format_] = document
        print(f"\n{format_}: " + describe(document))
    write_report(folder, inputs, wanted=True, beside=[network_beside(folder, out / "uniform")])
    print(f"\nthe same as a page: {out / 'sdq' / REPORT}")
    if json_:
        show_json({"rows": rows, "exports": exports})
    if not all(d["verification"]["verified"] for d in exports.values()):
        raise RunError("demo: an exported file does not compute what PyTorch computes; see above")


def _quantized(out: Path, method: str, seed: int, quiet: bool) -> dict[str, Any]:
    plan = Plan(
        # every layer is searched, so that all of the weights are equally many bytes in both
        QuantConfig(first_last_bits=None),
        Limits(bits=BITS),
        method,
        SearchConfig(epochs=EPOCHS["search"], seed=seed),
        TrainConfig(epochs=EPOCHS["finetune"], seed=seed),
    )
    request = inp.DataRequest(DATA, seed=seed)
    asked_source = SourceOptions(from_=out / "float")
    source = open_source(asked_source, request)
    asked = asked_for("quantize", asked_source, source.inputs.request, plan)
    fabric = open_fabric("cpu")
    with (
        RunFolder.create(out / method, asked, resume=False) as run,
        Watch(run, quiet=quiet) as watch,
    ):
        return run_quantize(run, source, plan, prepare(source, plan), fabric, watch, seed)


def float_cost(run: Path) -> dict[str, float]:
    """Return what the float network of a quantized run costs."""
    folder = RunFolder.open(run)
    document = folder.read_json("run.json")
    config = QuantConfig(**document["quant"])
    network = inp.load_float(folder)
    sample = torch.zeros(1, *document["data"]["image_shape"])
    qmodel = quantize(network, config, sample=sample)
    floats = BitwidthPolicy(
        tuple(
            type(b)(b.name, FLOAT_BITS, FLOAT_BITS, b.searched, b.num_weights)
            for b in qmodel.policy
        )
    )
    return {
        "avg_weight_bits": float(FLOAT_BITS),
        "weight_bytes": floats.weight_bytes,
        "bops": hw.total_bops(qmodel.layers, floats),
    }


def _row(name: str, metrics: dict[str, Any], cost: dict[str, Any]) -> dict[str, object]:
    return {
        "network": name,
        "accuracy": metrics["accuracy"],
        "balanced accuracy": metrics["balanced_accuracy"],
        "auc": metrics["auc"],
        "average bits": cost["avg_weight_bits"],
        "weight bytes": int(cost["weight_bytes"]),
        "BitOPs (M)": round(cost["bops"] / 1e6, 1),
    }
