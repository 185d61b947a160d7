"""Federated training with sdq on Flower: the server's app and the hospitals'.

Every hospital starts a node with its number, and with its own images:

    flower-supernode --superlink HOST:PORT --node-config 'partition-id=0 data="/images/own.npz"'

Without ``data`` in the node's configuration it takes its share of the built-in set, by centre. A
node that has a ``folder`` there keeps what it learned across runs, so that a federation can be
taken up again, and with ``keep-clients`` its own model as a run folder.
"""

import json
from pathlib import Path

import fl
from fl.apps import Federation, Hospital, Values, client_app, server_app
from fl.bits import ClientBudget, PhasesConfig
from fl.clients import Partition, clients_of
from fl.phase_settings import PhaseSettings
from fl.results import Description, open_run
from fl.setting import Setting
from sdq import plugins
from sdq.batches import first_weights
from sdq.config import QuantConfig
from sdq.cost import Budget
from sdq.data import DataOptions, open_data
from sdq.errors import RequestError


def open_setting(config: Values) -> Setting | PhaseSettings:
    """Return what server and hospitals have in common; with ``bits`` that of all phases."""
    channels, height, width = (int(side) for side in str(config["image-shape"]).split(","))
    seed, classes = int(config["seed"]), int(config["classes"])
    with first_weights(seed):
        build = plugins.load("sdq.models", config["model"]).build
        offered = {"num_classes": classes, "in_channels": channels, "image_size": height}
        model = plugins.call_with_known(build, **offered)
    method = fl.method(config["method"], **json.loads(config["hyper"]))
    federation = fl.FederationConfig(
        rounds=config["rounds"], local_epochs=config["local-epochs"], lr=config["lr"],
        batch_size=config["batch-size"], participation=config["participation"],
        keep_clients=bool(config["keep-clients"]), seed=seed,
    )  # fmt: skip
    shape = (channels, height, width)
    if not config["bits"]:
        return Setting.of(model, method, federation, num_classes=classes, image_shape=shape)
    return PhaseSettings(
        model=model, quant=QuantConfig(act_bits=int(config["act-bits"])),
        budget=Budget(avg_weight_bits=float(config["bits"])), method=method, num_classes=classes,
        image_shape=shape, config=federation,
        phases=PhasesConfig(
            search_rounds=int(config["search-rounds"]), tune_rounds=int(config["tune-rounds"])
        ),
    )  # fmt: skip


def class_names(config: Values) -> tuple[str, ...]:
    """Return the names of the classes in the order of their numbers; empty where none are given."""
    names = tuple(name.strip() for name in str(config["class-names"]).split(",") if name.strip())
    if names and len(set(names)) != int(config["classes"]):
        raise RequestError(
            f"class-names: must be {config['classes']} different names, as many as classes, got "
            f"{', '.join(names)}; set classes to as many"
        )
    return names


def budgets(config: Values) -> dict[int, ClientBudget]:
    """Return the budgets of hospitals that have their own."""
    asked = [part.split(":") for part in str(config["client-bits"]).split(",") if part]
    return {int(k): ClientBudget(Budget(avg_weight_bits=float(bits))) for k, bits in asked}


def open_federation(config: Values) -> Federation:
    """Return the server's side; it has no images."""
    setting = open_setting(config)
    run = None
    if config["out"]:
        names = class_names(config) or [f"class {n}" for n in range(setting.num_classes)]
        run = open_run(Path(config["out"]), Description(setting, config["model"], names))
    return Federation(
        setting, int(config["clients"]), round_seconds=float(config["round-seconds"]), run=run,
        personal=budgets(config),
    )  # fmt: skip


def open_hospital(number: int, config: Values, node: Values) -> Hospital:
    """Return a hospital's side: its own images, or its share of the built-in ones."""
    setting, seed = open_setting(config), int(config["seed"])
    if "data" in node:
        # a hospital may lack a class that others have
        own = str(node["data"])
        names = class_names(config)
        if not names:
            raise RequestError(
                "class-names: must be in the run's configuration where hospitals have data of "
                "their own, or each would number the classes that it has; add "
                'class-names="bcc,mel,nv"'
            )
        splits = open_data(own, DataOptions(seed=seed), every_class=False).numbered(names)
        images = fl.ClientData(f"hospital {number}", splits.train, splits.val, splits.test)
        described = Description(setting, config["model"], splits.class_names, own, splits)
    else:
        splits = open_data(str(config["data"]), DataOptions(seed=seed))
        images = clients_of(splits, Partition.parsed("natural"), None, seed)[number]
        described = Description(setting, config["model"], splits.class_names)
    folder = Path(str(node["folder"])) if "folder" in node else None
    return Hospital(setting, images, folder, described.to_json())


def finish(done: fl.Federated, config: Values) -> None:
    """Say how it went; the model and its figures are in ``out``."""
    best = (done.specialization or {}).get("balanced_accuracy")
    print(f"round {done.round}: balanced accuracy of the hospitals' models {best}")


server = server_app(open_federation, finish)
client = client_app(open_hospital)
