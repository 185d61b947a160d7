"""``sdq federate``: train across clients that share no images."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

import fl
from fl.client import share_of_clients
from fl.config import FederationConfig, Select
from fl.config import Optimizer as OptimizerKind
from fl.losses import LossConfig, LossName
from fl.method import ClientData, Method
from fl.setting import Setting
from fl.state import BatchNormPolicy
from sdq.batches import Normalization, generator
from sdq.cli import completion, options
from sdq.cli import inputs as inp
from sdq.cli.federation import ClientRequest, describe_clients, make_methods
from sdq.cli.federation_progress import FederationWatch
from sdq.cli.plan import ConfigFile
from sdq.cli.progress import show_json, show_table
from sdq.cli.report import write_report
from sdq.config import Config
from sdq.errors import RequestError
from sdq.metrics import evaluate
from sdq.parallel import open_fabric
from sdq.run_folder import RunFolder, check_new

DEFAULTS = FederationConfig()


@dataclass(frozen=True)
class Federation:
    """What every method of one request has in common."""

    network: nn.Module
    inputs: inp.Inputs
    clients: list[ClientData]
    config: FederationConfig
    described: dict[str, Any]
    head: str | None
    quiet: bool


def federate(
    model: options.Model,
    data: options.Data,
    out: options.Out,
    rounds: Annotated[int, typer.Option(min=1, help="Exchanges between server and clients.")],
    method: Annotated[
        str,
        typer.Option(
            help="One or several, X,Y (see `sdq list methods`).",
            autocompletion=completion.several("fl.methods"),
        ),
    ] = "fedavg",
    clients: Annotated[
        str | None,
        typer.Option(help="How many, or a SPLIT.csv with file or index, client and split."),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="natural (by centre), iid, dirichlet:ALPHA, or the class counts of a published "
            "federation: counts:ich10, ich5, isic2019, dermoscopic4."
        ),
    ] = None,
    local_epochs: Annotated[
        int, typer.Option(min=1, help="Passes over a client's images in a round.")
    ] = DEFAULTS.local_epochs,
    loss: Annotated[
        LossName | None, typer.Option(help="What clients minimise; default: the method's.")
    ] = None,
    hyper: Annotated[
        list[str] | None,
        typer.Option(help="KEY=VALUE, or METHOD.KEY=VALUE with several. Repeatable."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with what has no option of its own: "
            '{"federation": {...}, "loss": {...}, "methods": {METHOD: {...}}}.'
        ),
    ] = None,
    participation: Annotated[
        float, typer.Option(callback=options.finite, help="Share of clients asked in a round.")
    ] = DEFAULTS.participation,
    batch_norm: Annotated[
        BatchNormPolicy | None,
        typer.Option(help="What of batch normalisation travels; default: the method's."),
    ] = None,
    lr: Annotated[
        float, typer.Option(callback=options.finite, help="Learning rate of the clients.")
    ] = DEFAULTS.lr,
    optimizer: Annotated[
        OptimizerKind, typer.Option(help="Of the clients; starts anew each round.")
    ] = DEFAULTS.optimizer,
    momentum: Annotated[
        float, typer.Option(callback=options.finite, help="Of sgd.")
    ] = DEFAULTS.momentum,
    weight_decay: Annotated[
        float, typer.Option(callback=options.finite, help="Not on biases and normalisation.")
    ] = DEFAULTS.weight_decay,
    evaluate_every: Annotated[
        int, typer.Option(min=1, help="Rounds between evaluations.")
    ] = DEFAULTS.evaluate_every,
    adjust: Annotated[
        float,
        typer.Option(callback=options.finite, help="Tau of test-time logit adjustment; 0: none."),
    ] = DEFAULTS.adjust,
    select: Annotated[
        Select, typer.Option(help="Which round is the result, by validation images.")
    ] = DEFAULTS.select,
    head: Annotated[
        str | None, typer.Option(help="Path of the network's head, where it is not found.")
    ] = None,
    bits: Annotated[float | None, typer.Option(hidden=True)] = None,
    act_bits: Annotated[int | None, typer.Option(hidden=True)] = None,
    supervision: Annotated[str | None, typer.Option(hidden=True)] = None,
    weights: options.Weights = None,
    data_root: options.DataRoot = None,
    batch_size: options.BatchSize = DEFAULTS.batch_size,
    image_size: options.ImageSize = None,
    mean: options.Mean = None,
    std: options.Std = None,
    split: options.Split = "0.7,0.1,0.2",
    augment: options.Augment = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    report: options.Report = True,
    resume: options.Resume = False,
    json_: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train across clients that share no images, with one or several federated methods.

    Example: `sdq federate --method fedavg,fca --model resnet20 --data synthetic_derm
    --partition natural --rounds 20 --out fed`
    """
    assert model is not None  # a required option
    _refuse_planned(bits, act_bits, supervision)
    asked_clients = ClientRequest.of(clients, partition)
    file = ConfigFile.read(config, "federation", "loss", "methods")
    chosen = make_methods(method, hyper, file)
    settings = file.changed("federation", FederationConfig(
        rounds=rounds, local_epochs=local_epochs, batch_size=batch_size, optimizer=optimizer,
        lr=lr, momentum=momentum, weight_decay=weight_decay, participation=participation,
        batch_norm=batch_norm, loss=_loss(loss, file), evaluate_every=evaluate_every,
        adjust=adjust, select=select, seed=seed,
    ))  # fmt: skip
    request = inp.DataRequest(
        data, str(data_root) if data_root else None, image_size, mean, std, split, batch_size,
        seed, augment, split_file=asked_clients.split_file,
    )  # fmt: skip
    check_new(out, resume=resume)
    target = open_fabric(device).device
    described = inp.describe_model(model)
    inputs = _open_inputs(request)
    hospitals = asked_clients.divide(inputs.splits, seed)
    network = _network(model, weights, inputs, seed).to(target)
    for each in chosen:  # whatever is wrong with the request shows before a folder is made
        Setting.of(
            copy.deepcopy(network), each, settings, num_classes=len(inputs.splits.class_names),
            image_shape=inputs.splits.image_shape, head=head,
        )  # fmt: skip
    federation = Federation(network, inputs, hospitals, settings, described, head, quiet)
    asked = {
        "verb": "federate",
        "model": model,
        "weights": str(weights) if weights else None,
        "data": vars(request),
        "clients": clients,
        "partition": vars(asked_clients.partition) | {"alpha": str(asked_clients.partition.alpha)},
        "federation": settings.model_dump(mode="json"),
        "head": head,
    }
    metrics = _run_all(out, chosen, federation, asked, resume=resume, report=report)
    show_table(f"{model} on {data}, {rounds} rounds", _rows(metrics), quiet=quiet)
    if json_:
        found = next(iter(metrics.values())) if len(chosen) == 1 else {"methods": metrics}
        show_json({"out": str(out), "metrics": found})


def _refuse_planned(bits: float | None, act_bits: int | None, supervision: str | None) -> None:
    if bits is not None or act_bits is not None:
        raise RequestError(
            "--bits, --act-bits: a federation cannot learn bitwidths yet; train without them, then "
            "run `sdq quantize --from RUN --bits B`"
        )
    if supervision is not None:
        raise RequestError("--supervision: segmentation with mixed labels is not built yet")


def _loss(name: LossName | None, file: ConfigFile) -> LossConfig | None:
    if name is None and "loss" not in file.sections:
        return None
    return file.changed("loss", LossConfig() if name is None else LossConfig(name=name))


def _open_inputs(request: inp.DataRequest) -> inp.Inputs:
    """Open the data; without ``--mean`` and ``--std`` nothing of the pixels is measured.

    Statistics over all images would be knowledge of every client's.
    """
    inputs = inp.open_inputs(request)
    if request.mean is not None:
        return inputs
    half = (0.5,) * inputs.splits.image_shape[0]
    return replace(inputs, normalization=Normalization(half, half))


def _network(model: str, weights: Path | None, inputs: inp.Inputs, seed: int) -> nn.Module:
    classes = len(inputs.splits.class_names)
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, "weights").initial_seed())
        network = inp.build_model(model, inputs.splits.image_shape, classes)
    if weights is not None:
        network = inp.load_float_file(model, weights, inputs)
    inp.check_logits(network, inputs.sample, classes)
    return network


def _run_all(
    out: Path,
    methods: list[Method],
    federation: Federation,
    asked: dict[str, Any],
    *,
    resume: bool,
    report: bool,
) -> dict[str, dict[str, Any]]:
    """Run each method, in the run's folder or, of several, in one below it for each."""
    configs = {m.name: _hyper_parameters(m.config) for m in methods}
    with RunFolder.create(out, {**asked, "methods": configs}, resume=resume) as run:
        if len(methods) == 1:
            metrics = {methods[0].name: _run_one(run, methods[0], federation)}
            write_report(run, federation.inputs, wanted=report)
            return metrics
        metrics = {}
        run.update(methods=list(configs), command=options.command_line())
        for method in methods:
            own = {**asked, "methods": {method.name: configs[method.name]}}
            begun = (out / method.name / "run.json").is_file()
            with RunFolder.create(out / method.name, own, resume=begun) as part:
                metrics[method.name] = (
                    part.read_json("metrics.json")
                    if begun and part.done
                    else _run_one(part, method, federation)
                )
        run.write_json("metrics.json", {"methods": metrics})
        run.update(status="done")
        write_report(run, federation.inputs, wanted=report)
    return metrics


def _hyper_parameters(config: Config) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _run_one(run: RunFolder, method: Method, federation: Federation) -> dict[str, Any]:
    """Run one method and write what came of it."""
    inputs, config, clients = federation.inputs, federation.config, federation.clients
    classes = len(inputs.splits.class_names)
    run.update(
        data=inputs.describe(), model=federation.described, seed=config.seed,
        methods=[method.name], server_model=method.has_server_model,
        command=options.command_line(),
        clients=describe_clients(clients, classes),
    )  # fmt: skip
    arranged = method.arrange(clients)
    names = [client.name for client in arranged]
    measured = [each.name for client in arranged for each in client.pooled or (client,)]
    asked = share_of_clients(len(names), config.participation)
    watch = FederationWatch(
        run, method.name, config.rounds, asked, names, quiet=federation.quiet
    )  # fmt: skip
    with watch:
        done = fl.run(
            federation.network, method=method, clients=clients, num_classes=classes, config=config,
            normalization=inputs.normalization, augment=inputs.train.augment, head=federation.head,
            folder=run.path / "checkpoints", watch=watch.round, hear=watch.answer,
        )  # fmt: skip
    run.write_tensors("model.safetensors", done.state)
    metrics = _metrics(done, measured)
    if method.has_server_model and (inputs.splits.test or inputs.splits.val) is not None:
        result = copy.deepcopy(federation.network)  # the next method starts from the same
        result.load_state_dict(done.state)
        metrics = {"float": evaluate(result, inputs.held_out()), **metrics}
    run.write_json("metrics.json", metrics)
    run.update(status="done")
    return metrics


def _metrics(done: fl.Federated, names: list[str]) -> dict[str, Any]:
    special = done.specialization
    return {
        "generalization": done.generalization,
        "specialization": special,
        "worst_client": names[special["worst_client"]] if special else None,
        "rounds": len(done.history),
        "selected_round": done.round,
        "selected_by": done.selected_by,
        "bytes_up": done.bytes_up,
        "bytes_down": done.bytes_down,
        "failures": [
            {"round": r["round"] + 1, **failure} for r in done.history for failure in r["failures"]
        ],
    }


def _rows(metrics: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    """Return the table: what each method is worth, and what it sent."""
    return [
        {
            "method": name,
            **_figures("G", found["generalization"]),
            **_figures("S", found["specialization"]),
            "worst": (found["specialization"] or {}).get("worst_balanced_accuracy"),
            "worst client": found["worst_client"] or "-",
            "MB up": found["bytes_up"] / 1e6,
            "MB down": found["bytes_down"] / 1e6,
            "left out": len(found["failures"]),
        }
        for name, found in metrics.items()
    ]


def _figures(letter: str, metrics: dict[str, Any] | None) -> dict[str, object]:
    names = {"balanced_accuracy": "balanced", "macro_f1": "F1", "auc": "AUC"}
    return {f"{letter} {short}": (metrics or {}).get(key) for key, short in names.items()}
