"""``sdq train``: a float network."""

from typing import Annotated, Any, Literal

import torch
import typer

from sdq.batches import generator
from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.progress import Watch, show_json, show_table
from sdq.config import TrainConfig
from sdq.metrics import evaluate
from sdq.run_folder import RunFolder, check_new
from sdq.train import train_

Optimizer = Literal["adamw", "sgd"]


def train(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20,
    weights: options.Weights = None,
    lr: Annotated[float, typer.Option(callback=options.finite, help="Peak learning rate.")] = 2e-3,
    weight_decay: Annotated[float, typer.Option(callback=options.finite)] = 1e-2,
    optimizer: Annotated[Optimizer, typer.Option()] = "adamw",
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = 128,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    split: options.Split = "0.7,0.1,0.2",
    augment: options.Augment = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    resume: options.Resume = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a float network.

    Example: `sdq train --model resnet20 --data dermamnist --data-root DIR --epochs 20 --out f`
    """
    assert model is not None  # a required option
    request = inp.DataRequest(
        data, str(data_root) if data_root else None, image_size, mean, std, split, batch_size,
        seed, augment,
    )  # fmt: skip
    config = TrainConfig(
        epochs=epochs, lr=lr, weight_decay=weight_decay, optimizer=optimizer, seed=seed
    )
    check_new(out, resume=resume)
    fabric = inp.open_device(device)
    described = inp.describe_model(model)
    inputs = inp.open_inputs(request)
    classes = len(inputs.splits.class_names)
    # fresh weights follow from the seed, without touching the caller's generator
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, "weights").initial_seed())
        network = inp.build_model(model, inputs.splits.image_shape, classes)
    if weights is not None:
        network = inp.load_float_file(model, weights, inputs)
    inp.check_logits(network, inputs.sample, classes)
    asked: dict[str, Any] = {
        "verb": "train",
        "model": model,
        "weights": str(weights) if weights else None,
        "data": vars(request),
        "train": config.model_dump(),
    }
    with RunFolder.create(out, asked, resume=resume) as run, Watch(run, quiet=quiet) as watch:
        about = inputs.describe()
        run.update(data=about, model=described, seed=seed)
        identity = {"request": asked, "data": about["fingerprint"]}
        train_(
            network, inputs.train, config, fabric=fabric,
            checkpoint=run.checkpoint("train", identity), watch=watch,
        )  # fmt: skip
        network.cpu()
        run.write_tensors("model.safetensors", network.state_dict())
        metrics = {"float": evaluate(network, inputs.held_out())}
        run.write_json("metrics.json", metrics)
        run.update(status="done")
    show_table(f"{model} on {data}", [summary("float", metrics["float"])], quiet=quiet)
    if json_:
        show_json({"out": str(out), "metrics": metrics})


def summary(name: str, metrics: dict[str, Any]) -> dict[str, object]:
    """Return the figures of a table row."""
    keys = ("accuracy", "balanced_accuracy", "macro_f1", "auc")
    return {"network": name, **{key: metrics[key] for key in keys}}
