"""``sdq federate``: train across clients that share no images."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from torch import nn

from fl.bits import PhasesConfig, SearchMethod
from fl.compression import CompressionConfig
from fl.config import FederationConfig, Sampling, Select
from fl.config import Optimizer as OptimizerKind
from fl.losses import LossConfig, LossName
from fl.setting import centred
from fl.state import BatchNormPolicy
from sdq.batches import first_weights
from sdq.cli import completion, options
from sdq.cli import inputs as inp
from sdq.cli.clients import ClientRequest, supervised
from sdq.cli.federate_bits import BitsRequest, prepare
from sdq.cli.federation import make_methods
from sdq.cli.federation_leaves import show_leaves
from sdq.cli.federation_run import Federation, rows, run_all
from sdq.cli.option_groups import BudgetOptions, ImageOptions, QuantOptions, RunOptions
from sdq.cli.plan import ConfigFile, Limits, make_plan, make_quantization, set_by_options
from sdq.cli.progress import show_json, show_table
from sdq.cli.quantize import open_from
from sdq.config import SearchConfig
from sdq.errors import RequestError
from sdq.parallel import open_fabric
from sdq.run_folder import check_new

DEFAULTS = FederationConfig()
PHASES = PhasesConfig()


def federate(
    data: options.Data,
    model: options.Model = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Exchanges between server and clients; with --bits those in float, which a "
            "network with --weights or --from need not have.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to write; must be new or empty.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="One or several, X,Y (see `sdq list methods`, or path/to/file.py).",
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
            help="natural (by centre), iid, iid:SHARE,SHARE,... (a share for each client), "
            "dirichlet:ALPHA, or the class counts of a published federation: counts:ich10, ich5, "
            "isic2019, dermoscopic4."
        ),
    ] = None,
    local_epochs: Annotated[
        int, typer.Option(min=1, help="Passes over a client's images in a round.")
    ] = DEFAULTS.local_epochs,
    loss: Annotated[
        LossName | None, typer.Option(help="What clients minimise; default: the method's.")
    ] = None,
    sampling: Annotated[
        Sampling,
        typer.Option(
            help="Of an epoch: all of a client's images once, or as many with equal chances for "
            "its classes (balanced)."
        ),
    ] = DEFAULTS.sampling,
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
    compress: Annotated[
        str | None,
        typer.Option(
            help="Bits of the changes that travel: BITS for both ways, or up=BITS,down=BITS; "
            "policy beside or alone: tuned weights in the learned bits."
        ),
    ] = None,
    aggregation: Annotated[
        str, typer.Option(help="mean, median or trimmed_mean:SHARE.")
    ] = DEFAULTS.aggregation,
    what_leaves: Annotated[
        bool, typer.Option("--what-leaves", help="List what would be sent, and train nothing.")
    ] = False,
    keep_clients: Annotated[
        bool,
        typer.Option(help="Write each client's own model too: RUN/clients/NAME."),
    ] = False,
    head: Annotated[
        str | None, typer.Option(help="Path of the network's head, where it is not found.")
    ] = None,
    budget: BudgetOptions = BudgetOptions(),
    policy: Annotated[
        Path | None, typer.Option(help="A policy.json to use instead of learning bits.")
    ] = None,
    client_target: Annotated[
        list[str] | None,
        typer.Option(
            help="'NAME=bits:2.0' or 'NAME=TARGET:latency_ms=5': a client with a budget, and so "
            "bits, of its own. Repeatable."
        ),
    ] = None,
    quantization: QuantOptions = QuantOptions(),
    search_method: Annotated[
        SearchMethod, typer.Option(help="How the bits are chosen; others need all images at once.")
    ] = PHASES.search_method,
    search_rounds: Annotated[
        int, typer.Option(min=1, help="In which bits are learned.")
    ] = PHASES.search_rounds,
    tune_rounds: Annotated[
        int, typer.Option(min=1, help="In which weights are tuned under the bits.")
    ] = PHASES.tune_rounds,
    distill: Annotated[
        float,
        typer.Option(
            callback=options.finite, help="Share of the float model's soft labels in the loss."
        ),
    ] = PHASES.distill,
    bin_weight: Annotated[
        float, typer.Option(callback=options.finite, help="lambda_E of bin regularization.")
    ] = PHASES.bin_weight,
    plots: options.Plots = True,
    supervision: Annotated[
        str | None,
        typer.Option(
            help="Of segmentation, what each client knows of its training images, in the clients' "
            "order: pixel (masks), box, image (which classes) or none; default: masks."
        ),
    ] = None,
    weights: options.Weights = None,
    from_: options.From = None,
    images: ImageOptions = ImageOptions(batch_size=DEFAULTS.batch_size),
    device: options.Device = "auto",
    ending: RunOptions = RunOptions(),
) -> None:
    """Train across clients that share no images, with one or several federated methods.

    Example: `sdq federate --method fedavg,fca --model resnet20 --data synthetic_derm
    --partition natural --rounds 20 --out fed`; with --bits 2 it ends in a quantized model.
    """
    limits = Limits.of(budget)
    learns = limits.given or policy is not None
    parts = ("quant", "search", "phases") if learns else ()
    asked_clients = ClientRequest.of(clients, partition)
    file = ConfigFile.read(config, "federation", "loss", "methods", *parts)
    chosen = make_methods(method, hyper, file)
    asked_bits = None
    if learns:
        quant, limits = make_quantization(file, limits, quantization, "train")
        searching = SearchConfig(granularity=quantization.granularity, seed=images.seed)
        searching = file.changed("search", searching)
        phases = file.changed("phases", PhasesConfig(
            search_method=search_method, search_rounds=search_rounds, tune_rounds=tune_rounds,
            search=searching, distill=distill, bin_weight=bin_weight,
        ))  # fmt: skip
        plan = make_plan(
            quant, limits, search_method=search_method, search=searching, train=None,
            policy=policy, prepared_for=quantization.for_,
        )  # fmt: skip
        asked_bits = BitsRequest(plan, phases, tuple(client_target or ()), plots)
    _check_given(model, weights, from_, rounds, learns=learns)
    settings = file.changed("federation", FederationConfig(
        rounds=rounds or 1, local_epochs=local_epochs, batch_size=images.batch_size,
        optimizer=optimizer, lr=lr, momentum=momentum, weight_decay=weight_decay,
        participation=participation, batch_norm=batch_norm, loss=_loss(loss, file),
        sampling=sampling,
        evaluate_every=evaluate_every, adjust=adjust, select=select, keep_clients=keep_clients,
        seed=images.seed, aggregation=aggregation,
        compress=None if compress is None else CompressionConfig.parsed(compress),
    ))  # fmt: skip
    request = images.request(data, asked_clients.split_file)
    if out is not None:
        check_new(out, resume=ending.resume)
    elif not what_leaves:
        raise RequestError("--out: must be given, got none; name a new folder for the run")
    place = open_fabric(device).device
    if from_ is not None:
        source = open_from(from_, request)
        described, inputs, network = source.described, source.inputs, source.network
    else:
        assert model is not None
        described = inp.describe_model(model)
        inputs = _open_inputs(request).for_model(model)
        network = _network(model, weights, inputs, images.seed)
    hospitals = asked_clients.divide(inputs.splits, images.seed)
    if supervision is not None:
        hospitals = supervised(hospitals, supervision, inputs.splits, images.seed)
    network = network.to(place)
    if asked_bits is not None:
        asked_bits = prepare(network, inputs, asked_bits)
    clients = asked_clients.split_file or clients
    division = {"clients": clients, "partition": partition, "seed": images.seed}
    federation = Federation(
        network, inputs, hospitals, settings, described, division, head, ending.quiet,
        rounds or 0, asked_bits,
    )  # fmt: skip
    # whatever is wrong with the request shows before a folder is made
    checked = {name: s for each in chosen for name, s in federation.settings(each).items()}
    if out is None or what_leaves:
        show_leaves(checked, quiet=ending.quiet, json=ending.json_)
        return
    asked = {
        "verb": "federate",
        "model": model,
        "weights": str(weights) if weights else None,
        "from": str(from_) if from_ else None,
        "data": vars(inputs.request),
        "clients": clients,
        "partition": vars(asked_clients.partition) | {"alpha": str(asked_clients.partition.alpha)},
        "supervision": supervision,
        "federation": settings.model_dump(mode="json"),
        "head": head,
        "rounds": rounds,
        **(asked_bits.to_json() if asked_bits is not None else {}),
    }
    metrics = run_all(out, chosen, federation, asked, resume=ending.resume, report=ending.report)
    show_table(
        f"{model or from_} on {data}, {rounds or 0} rounds", rows(metrics), quiet=ending.quiet
    )
    if ending.json_:
        found = next(iter(metrics.values())) if len(chosen) == 1 else {"methods": metrics}
        show_json({"out": str(out), "metrics": found})


def _check_given(
    model: str | None, weights: Path | None, from_: Path | None, rounds: int | None, *, learns: bool
) -> None:
    """Raise RequestError where a network or what is to be done with it is missing."""
    if (from_ is None) == (model is None):
        got = "neither" if from_ is None else "both"
        raise RequestError(f"network: must be named by --model M or by --from RUN, got {got}")
    if from_ is not None and weights is not None:
        raise RequestError("--weights: must go with --model, got --from as well; drop one")
    if rounds is None and not (learns and (from_ is not None or weights is not None)):
        raise RequestError(
            "--rounds: must say how many rounds there are, got none; only --bits with --weights "
            "or --from can do without rounds in float"
        )
    if learns:
        return
    of_bits = (*set_by_options("quant").values(), *set_by_options("phases").values())
    others = ("client_target", "granularity", "learn_act_bits", "for_", "target")
    for name in (*of_bits, *others):
        if options.given(name):
            raise RequestError(
                f"--{name.rstrip('_').replace('_', '-')}: must stand with a budget of bits; pass "
                "--bits 2.0, --weight-kb, --bops-g or --target with --latency-ms"
            )


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
    return replace(inputs, normalization=centred(inputs.splits.image_shape[0]))


def _network(model: str, weights: Path | None, inputs: inp.Inputs, seed: int) -> nn.Module:
    classes = len(inputs.splits.class_names)
    with first_weights(seed):
        network = inp.build_model(model, inputs.splits.image_shape, classes)
    if weights is not None:
        network = inp.load_float_file(model, weights, inputs)
    inputs.task.check_logits(network, inputs.sample, classes)
    return network
