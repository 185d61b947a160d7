"""``sdq evaluate``: a run's network on a test set."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.progress import show_json, show_table
from sdq.cli.run_data import run_inputs
from sdq.cli.train import summary
from sdq.errors import RequestError
from sdq.metrics import predict
from sdq.run_folder import RunFolder
from sdq.task import task_of


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder of `sdq train` or `sdq quantize`.")
    ] = None,
    data: options.OptionalData = None,
    model: options.Model = None,
    weights: options.Weights = None,
    data_root: options.DataRoot = None,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    split: options.Split = "0.7,0.1,0.2",
    batch_size: options.BatchSize = 256,
    seed: options.Seed = 0,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a run's network, or a --model with --weights, on the data's test split.

    Examples:
    - a run on its own data: `sdq evaluate q`

    - on other data of the same classes: `sdq evaluate q --data other.npz`

    - weights without a run: `sdq evaluate --model resnet20 --weights w.safetensors --data own.npz`
    """
    root = str(data_root) if data_root else None
    metrics: dict[str, Any]
    alone = model is not None or weights is not None
    if run is not None and alone:
        raise RequestError("sdq evaluate: must have a run folder or a --model, got both; drop one")
    divided = {name: options.given(name) for name in ("split", "seed")}
    if data is None and (any(divided.values()) or (image_size, mean, std) != (None, None, None)):
        raise RequestError(
            "--image-size, --mean, --std, --split, --seed: must go with --data; a run's own data "
            "are prepared and divided as they were"
        )
    if run is None:
        if model is None or weights is None or data is None:
            raise RequestError(
                "sdq evaluate: must have a run folder, or --model, --weights and --data"
            )
        request = inp.DataRequest(data, root, image_size, mean, std, split, batch_size, seed)
        inputs = inp.open_inputs(request).for_model(model)
        network = inp.load_float_file(model, weights, inputs)
        logits, labels = predict(network, inputs.held_out())
        metrics = {"float": task_of(logits).metrics(logits, labels)}
    else:
        folder = RunFolder.open(run)
        inputs = run_inputs(
            folder, data, root, image_size, mean, std, split if divided["split"] else None,
            batch_size if options.given("batch_size") else None,
            seed if divided["seed"] else None,
        )  # fmt: skip
        logits, labels = predict(inp.load_float(folder), inputs.held_out())
        task = task_of(logits)
        metrics = {"float": task.metrics(logits, labels)}
        if folder.read_json("run.json").get("quant"):
            quantized, _ = predict(inp.load_quantized(folder), inputs.held_out())
            metrics["quantized"] = task.metrics(quantized, labels)
            metrics["agreement"] = task.agreement(quantized, logits)
    rows = [summary(k, v) for k, v in metrics.items() if isinstance(v, dict)]
    show_table(f"{run or model}, {len(labels):,} images", rows, quiet=quiet)
    if json_:
        show_json(metrics)
