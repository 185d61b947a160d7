"""A federation that was asked for, run: each method in its folder, and what it writes there."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

import fl
from fl import results
from fl.config import FederationConfig, share_of_clients
from fl.evaluation import MAIN
from fl.method import ClientData, Method
from fl.personal import Personal
from fl.phases import Learning
from fl.setting import Setting
from fl.supervision import check_federation
from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.clients import describe_clients, folder_names
from sdq.cli.federate_bits import BitsRequest, learning_of_request, write
from sdq.cli.federation_progress import FederationWatch
from sdq.cli.plotting import draw_plots
from sdq.cli.report import write_report
from sdq.config import Config
from sdq.errors import RequestError
from sdq.run_folder import RunFolder
from sdq.task import evaluate


@dataclass(frozen=True)
class Federation:
    """What every method of one request has in common."""

    network: nn.Module
    inputs: inp.Inputs
    clients: list[ClientData]
    config: FederationConfig
    described: dict[str, Any]
    division: dict[str, Any]
    """Of the images among the clients, as :func:`sdq.cli.clients.of_client` has it."""
    head: str | None
    quiet: bool
    float_rounds: int
    bits: BitsRequest | None = None

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.inputs.splits.class_names)

    def settings(self, method: Method) -> dict[str, Setting]:
        """Return the settings of all rounds, by what is done in them.

        Raises:
            RequestError: something is wrong with the request.
        """
        check_federation(method, self.clients)
        self.config.check_number(len(method.arrange(self.clients)))
        if self.bits is not None:
            found = self.learning(method).check()
            return {f"{method.name}, {phase}": setting for phase, setting in found.items()}
        return {
            method.name: Setting.of(
                copy.deepcopy(self.network), method, self.config, num_classes=self.classes,
                image_shape=self.inputs.splits.image_shape, head=self.head,
            )
        }  # fmt: skip

    def learning(self, method: Method, **watching: Any) -> Learning:
        """Return the federation as one that learns bits."""
        assert self.bits is not None
        return learning_of_request(
            self.network, self.clients, self.bits, method=method, num_classes=self.classes,
            config=self.config, rounds=self.float_rounds, normalization=self.inputs.normalization,
            augment=self.inputs.train.augment, head=self.head, **watching,
        )  # fmt: skip

    def phases(self) -> dict[str, int]:
        """Return the rounds of each phase that is run."""
        found = {"float": self.float_rounds} if self.float_rounds else {}
        if self.bits is not None:
            if self.bits.learns:
                found["search"] = self.bits.phases.search_rounds
            found["tune"] = self.bits.phases.tune_rounds
        return found


def run_all(
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
                    part.read_metrics()
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
    described = inputs.describe()
    before = run.read_json("run.json").get("data", {}).get("fingerprint")
    if before not in (None, described["fingerprint"]):
        raise RequestError(
            f"{run.path}: data must be as when the run began, but other images are there now; "
            "bring them back, or start in a new folder"
        )
    run.update(
        data=described, model=federation.described, seed=config.seed,
        methods=[method.name], **results.of_method(method),
        command=options.command_line(),
        clients=describe_clients(clients, federation.inputs.splits),
    )  # fmt: skip
    arranged = method.arrange(clients)
    names = [client.name for client in arranged]
    measured = [each.name for client in arranged for each in client.pooled or (client,)]
    asked = share_of_clients(len(names), config.participation)
    watch = FederationWatch(
        run, method.name, federation.phases(), asked, names, quiet=federation.quiet
    )  # fmt: skip
    folder = run.path / "checkpoints"
    if federation.bits is not None:
        learning = federation.learning(
            method, folder=folder, watch=watch.round, hear=watch.answer
        )  # fmt: skip
        with watch:
            learned = learning.go()
        of_client = _of_client(run, arranged, federation)
        metrics = write(run, learning.settings, inputs, learned, names, of_client)
        metrics = {**metrics, **results.metrics(learned, measured)}
        run.write_json("metrics.json", metrics)
        run.update(status="done")
        draw_plots(run, wanted=federation.bits.plots)
        return metrics
    with watch:
        done = fl.run(
            federation.network, method=method, clients=clients, num_classes=federation.classes,
            config=config,
            normalization=inputs.normalization, augment=inputs.train.augment, head=federation.head,
            folder=folder, watch=watch.round, hear=watch.answer,
            keep=_keeper(_of_client(run, arranged, federation)) if config.keep_clients else None,
        )  # fmt: skip
    run.write_tensors("model.safetensors", done.state)
    metrics = results.metrics(done, measured)
    if method.has_server_model and not done.whole:
        run.update(server_model=False)
    elif method.has_server_model and (inputs.splits.test or inputs.splits.val) is not None:
        result = copy.deepcopy(federation.network)  # the next method starts from the same
        result.load_state_dict(done.state)
        metrics = {"float": evaluate(result, inputs.held_out()), **metrics}
    run.write_json("metrics.json", metrics)
    run.update(status="done")
    return metrics


def _of_client(
    run: RunFolder, clients: Sequence[ClientData], federation: Federation
) -> Callable[[int], tuple[Path, dict[str, Any]]]:
    """Return what tells of a client's own model where its run folder is, and what it says.

    Its data are the client's own images.
    """
    names = folder_names([client.name for client in clients])
    document = run.read_json("run.json")
    inputs = federation.inputs

    def describe(number: int) -> tuple[Path, dict[str, Any]]:
        own, data = clients[number], document["request"]["data"]
        splits = inputs.splits
        if not own.pooled:  # else its images are everyone's
            known = {} if own.supervision == "pixel" else {"supervision": own.supervision}
            data = {**data, "client": {**federation.division, "number": number, **known}}
            splits = replace(splits, train=own.train, val=own.val, test=own.test)
        return run.path / "clients" / names[number], {
            "request": {**document["request"], "data": data},
            "data": replace(inputs, splits=splits).describe(),
            **{key: document[key] for key in ("model", "seed", "methods")},
            "client": own.name,
        }

    return describe


def _keeper(
    of_client: Callable[[int], tuple[Path, dict[str, Any]]],
) -> Callable[[int, Personal], None]:
    """Return what writes a client's own model."""

    def keep(number: int, personal: Personal) -> None:
        personal.write(*of_client(number))

    return keep


def rows(metrics: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    """Return the table: what each method is worth, and what it sent."""
    return [
        {
            "method": name,
            **_figures("G", found["generalization"]),
            **_figures("S", found["specialization"]),
            "worst": _worst(found["specialization"] or {}),
            "worst client": found["worst_client"] or "-",
            "MB up": found["bytes_up"] / 1e6,
            "MB down": found["bytes_down"] / 1e6,
            "left out": len(found["failures"]),
            **({"bits": found["avg_weight_bits"]} if "avg_weight_bits" in found else {}),
        }
        for name, found in metrics.items()
    ]


def _worst(special: dict[str, Any]) -> float | None:
    """Return the worst client's figure, whatever the task compares clients by."""
    return next((special[k] for k in map("worst_{}".format, MAIN.values()) if k in special), None)


def _figures(letter: str, metrics: dict[str, Any] | None) -> dict[str, object]:
    """Return a table's cells; a run of one task has no figures of the other's."""
    known = metrics or {}
    names = {"balanced_accuracy": "balanced", "macro_f1": "F1", "auc": "AUC"}
    if MAIN["segmentation"] in known:
        names = {"dice": "Dice", "iou": "IoU", "hd95": "HD95"}
    return {f"{letter} {short}": known.get(key) for key, short in names.items()}
