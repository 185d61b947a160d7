"""A federation as Flower apps: the same ServerApp and ClientApp here, in simulation, and deployed.

The ServerApp runs the one round loop, :mod:`fl.rounds`, over a grid; the ClientApp answers with
:func:`fl.node.answered`. A message holds a record: one ArrayRecord a group of tensors, and one
ConfigRecord with the values as JSON.

A federation that learns bits (:mod:`fl.phases`) is given :class:`fl.phase_settings.PhaseSettings`
on both sides, and runs all its phases in one run of the apps.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fl.bits import ClientBudget
from fl.client import CRASHES
from fl.grid_sites import GridSites
from fl.grid_transport import GridTransport
from fl.messages import TYPES, packed, unpacked
from fl.method import pools_images
from fl.node import Hospital, answered
from fl.phase_settings import PhaseSettings
from fl.phases import Learning
from fl.quant_results import close_bits
from fl.record import Record
from fl.results import close_run, log_round
from fl.run import Federated, run_over
from fl.setting import Setting
from sdq.data import ImageSet
from sdq.errors import RequestError
from sdq.run_folder import RunFolder

__all__ = ["Federation", "Hospital", "Values", "client_app", "server_app"]

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Federation:
    """What a server needs to run a federation.

    Args:
        setting: with the method, the configuration and the network; of a federation that learns
            bits, that of all phases.
        num_clients: of the federation; a node's ``partition-id`` is its client's number.
        test: images the server measures generalization on; empty: it has none.
        val: likewise, for the selection of a round.
        folder: where the state is written after each round, and taken up from; or None.
        round_seconds: how long the clients of a round may take; None: as long as Flower keeps a
            message, 12 hours.
        run: a run folder (:func:`fl.results.open_run`) for log, state and result, instead of
            ``folder``.
        personal: where bits are learned, the budgets of clients that have their own, by number.
    """

    setting: Setting | PhaseSettings
    num_clients: int
    test: tuple[ImageSet, ...] = ()
    val: tuple[ImageSet, ...] = ()
    folder: Path | None = None
    round_seconds: float | None = None
    run: RunFolder | None = None
    personal: Mapping[int, ClientBudget] = field(default_factory=dict)


def server_app(
    open_federation: Callable[[Values], Federation],
    finish: Callable[[Federated, Values], None],
) -> ServerApp:
    """Return the server's app.

    Args:
        open_federation: makes the federation from Flower's run configuration.
        finish: takes the result, and the run configuration.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        federation = open_federation(context.run_config)
        with federation.run or contextlib.nullcontext():  # which holds the folder's lock
            done = _run(grid, federation)
        finish(done, context.run_config)

    return app


def client_app(open_hospital: Callable[[int, Values, Values], Hospital]) -> ClientApp:
    """Return the clients' app.

    Args:
        open_hospital: makes what a client needs from its number (the node's ``partition-id``),
            the run configuration and the node's.
    """
    app = ClientApp()

    def respond(kind: str, message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        try:
            hospital = open_hospital(client, context.run_config, context.node_config)
            found = answered(kind, client, hospital, unpacked(message.content), context)
        except CRASHES as error:
            failed = {"client": client, "failure": f"{type(error).__name__}: {error}"}
            found = Record({}, failed)
        return Message(packed(found), reply_to=message)

    for kind, type_ in TYPES.items():
        category, _, action = type_.partition(".")
        register = app.train if category == "train" else app.query
        register(action or "default")(lambda m, c, kind=kind: respond(kind, m, c))
    return app


def _run(grid: Grid, federation: Federation) -> Federated:
    """Run a federation over a grid, and write what came of it."""
    setting, number, run = federation.setting, federation.num_clients, federation.run
    _check_apart(setting)
    folder, watch = federation.folder, None
    if run is not None:
        folder, watch = run.path / "checkpoints", partial(log_round, run)
    names = [f"client {k}" for k in range(number)]
    if isinstance(setting, PhaseSettings):
        sites = GridSites(grid, setting, number, federation.round_seconds)
        learned = Learning(
            setting, sites, federation.personal, federation.test, federation.val, folder, watch
        ).go()
        if run is not None:
            close_bits(run, setting, learned, names)
        return learned
    done = run_over(
        setting, GridTransport(grid, setting, number, federation.round_seconds), number,
        test=federation.test, val=federation.val, folder=folder, watch=watch,
    )  # fmt: skip
    if run is not None:
        close_run(run, done, names)
    return done


def _check_apart(setting: Setting | PhaseSettings) -> None:
    """Raise RequestError for what is right in a simulation alone.

    The method needs the clients' images in one place, or the noise of privacy follows from a seed
    that everybody knows.
    """
    method, privacy = setting.method, setting.config.privacy
    if privacy is not None and privacy.noise != "secret":
        raise RequestError(
            f"privacy.noise: must be 'secret' between nodes, got {privacy.noise!r}: what follows "
            "from the federation's seed can be subtracted"
        )
    if setting.config.count_epsilon is not None and privacy is None:
        raise RequestError(
            "count_epsilon: must stand with privacy.noise 'secret' between nodes: noise that "
            "follows from the federation's seed can be subtracted; add privacy, or leave it out"
        )
    if pools_images(method):
        raise RequestError(
            f"{method.name}: must have every client's images in one place, and here each is on its "
            "own node; choose another method"
        )
