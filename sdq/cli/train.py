"""``sdq train``: a float network."""

from typing import Annotated, Any

import typer

from sdq.batches import first_weights
from sdq.cli import inputs as inp
from sdq.cli import options, processes
from sdq.cli.option_groups import ImageOptions, PlaceOptions, RunOptions, TrainingOptions
from sdq.cli.progress import Watch, show_json, show_table
from sdq.cli.report import write_report
from sdq.metrics import predict
from sdq.report.predictions import Predictions
from sdq.run_folder import check_new
from sdq.task import task_of
from sdq.train import train_


def train(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20,
    weights: options.Weights = None,
    lr: Annotated[float, typer.Option(callback=options.finite, help="Peak learning rate.")] = 2e-3,
    training: TrainingOptions = TrainingOptions(weight_decay=1e-2),
    images: ImageOptions = ImageOptions(),
    place: PlaceOptions = PlaceOptions(),
    ending: RunOptions = RunOptions(),
) -> None:
    """Train a float network.

    Example: `sdq train --model resnet20 --data dermamnist --data-root DIR --epochs 20 --out f`
    """
    assert model is not None  # a required option
    request = images.request(data)
    config = training.config(epochs=epochs, lr=lr, seed=images.seed)
    check_new(out, resume=ending.resume)
    fabric = place.fabric()
    described = inp.describe_model(model)
    inputs = inp.open_inputs(request).for_model(model)
    classes = len(inputs.splits.class_names)
    with first_weights(images.seed):
        network = inp.build_model(model, inputs.splits.image_shape, classes)
    if weights is not None:
        network = inp.load_float_file(model, weights, inputs)
    inputs.task.check_logits(network, inputs.sample, classes)
    inputs.task.selection(config.select)
    inputs.held_out()  # without images to measure on there is an error before any training
    asked: dict[str, Any] = {
        "verb": "train",
        "model": model,
        "weights": str(weights) if weights else None,
        "data": vars(request),
        "train": config.model_dump(),
        **place.asked(),
    }
    run = processes.begin(fabric, out, asked, resume=ending.resume)
    ending = ending.of_process(fabric)
    with run, Watch(run, quiet=ending.quiet) as watch:
        about = inputs.describe()
        run.update(data=about, model=described, seed=images.seed, command=options.command_line())
        identity = {"request": asked, "data": about["fingerprint"]}
        trained = train_(
            network, inputs.train, config, validation=inputs.validation, fabric=fabric,
            checkpoint=run.checkpoint("train", identity), watch=watch,
        )  # fmt: skip
        network.cpu()
        run.write_tensors("model.safetensors", network.state_dict())
        logits, labels = predict(network, inputs.held_out())
        metrics: dict[str, Any] = {"float": task_of(logits).metrics(logits, labels)}
        Predictions(labels, logits).save(run)
        metrics |= trained.to_json()
        run.write_json("metrics.json", metrics)
        run.update(status="done")
        processes.end(fabric)
        write_report(run, inputs, wanted=ending.report)
    show_table(f"{model} on {data}", [summary("float", metrics["float"])], quiet=ending.quiet)
    if ending.json_:
        show_json({"out": str(out), "metrics": metrics})


def summary(name: str, metrics: dict[str, Any]) -> dict[str, object]:
    """Return the figures of a table row."""
    keys = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "dice", "iou", "hd95")
    return {"network": name, **{key: metrics[key] for key in keys if key in metrics}}
