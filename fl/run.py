"""Run a federation in this process: deterministic, resumable after any round."""

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fl import evaluation
from fl.client import try_answer
from fl.config import FederationConfig
from fl.method import ClientData, Method
from fl.method import method as method_of
from fl.personal import Personal
from fl.record import ANEW, Failure, Record, Reply, Request, Tensors, load
from fl.rounds import Listener, RoundReport, Rounds, Transport, listed
from fl.setting import Setting
from fl.store import Store
from fl.supervision import check_federation
from sdq.batches import Augmentation, Normalization
from sdq.checkpoint import write_bytes_atomically
from sdq.config import QuantConfig
from sdq.data import ImageSet
from sdq.errors import RequestError

STATE = "federation.safetensors"
"""The file of a federation's state in its folder."""

ASKED = "asked.json"
"""How often each client was asked, where every answer has noise of its own."""

Watcher = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Federated:
    """What a federation gives.

    Args:
        state: the selected round's model, by the user's names: what ``load_state_dict`` takes.
            Tensors that stay with the clients are their mean, or the initial ones where
            ``assemble`` is off.
        round: the selected round, counted from 1.
        selected_by: ``last``, ``generalization`` or ``specialization`` (on validation images).
        generalization: metrics of the server's model, or None where there is none; in segmentation
            with ``clients``, those on each of the test sets by its place, and ``client_mean``.
        specialization: of the clients' models, or None where no client has test images.
        history: one summary a round.
        bytes_up: of all rounds.
        bytes_down: of all rounds.
        whole: whether ``state`` is a whole model, and no parts of it are with the clients alone.
        privacy: the guarantee, see :meth:`fl.privacy.PrivacyConfig.spent`; None: there is none.
    """

    state: Tensors
    round: int
    selected_by: str
    generalization: dict[str, Any] | None
    specialization: dict[str, Any] | None
    history: list[dict[str, Any]]
    bytes_up: int
    bytes_down: int
    privacy: dict[str, Any] | None
    whole: bool = True

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Who was left out of which round, counted from 1, and why."""
        return left_out(self.history)


def left_out(history: Sequence[Mapping[str, Any]], before: int = 0) -> list[dict[str, Any]]:
    """Return who was left out of which of these rounds, which come after ``before`` others."""
    return [
        {"round": before + r["round"] + 1, **failure} for r in history for failure in r["failures"]
    ]


class InProcess:
    """Clients in this process, one after the other on the one network.

    Args:
        setting: of the federation.
        clients: their images.
        store: what they keep.
    """

    def __init__(self, setting: Setting, clients: Sequence[ClientData], store: Store) -> None:
        self.setting = setting
        self.clients = clients
        self.store = store

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Answer each request in turn."""
        for request in requests:
            client = request.client
            kept = self.store.get(client)
            reply, keeps = try_answer(self.setting, self.clients[client], request, kept)
            if keeps is not None:
                self.store.put(client, keeps, request.round)
            yield reply

    def commit(self, rounds: int) -> dict[str, Any]:
        """Return which round each client's state is of."""
        return {str(client): round for client, round in self.store.index.items()}

    def restore(self, committed: dict[str, Any]) -> None:
        """Take up the states of those rounds."""
        index = {int(client): round for client, round in committed.items()}
        self.store = Store(self.store.folder, index)

    def forget_old_(self) -> None:
        """Delete the states of older rounds."""
        self.store.forget_old_()


def run(
    model: nn.Module,
    *,
    method: str | Method = "fedavg",
    clients: Sequence[ClientData],
    num_classes: int,
    config: FederationConfig | None = None,
    rounds: int | None = None,
    test: Sequence[ImageSet] | None = None,
    val: Sequence[ImageSet] | None = None,
    normalization: Normalization | None = None,
    augment: Augmentation | None = None,
    head: str | None = None,
    folder: Path | None = None,
    watch: Watcher | None = None,
    hear: Listener | None = None,
    keep: Callable[[int, Personal], None] | None = None,
    quant: QuantConfig | None = None,
    **bits: Any,
) -> Federated:
    """Train a model across clients.

    Args:
        model: what every client starts from; a copy is trained, on the model's device.
        method: a name, or a method made with :func:`fl.method`.
        clients: their images; a client is known by its place in the sequence.
        num_classes: of the task.
        config: everything that does not depend on the method.
        rounds: instead of the configuration's.
        test: what generalization is measured on; None: the clients' test images together.
        val: likewise, for the selection of a round.
        normalization: see :meth:`fl.setting.Setting.of`.
        augment: of training images, or None.
        head: path of the network's head, or None to find it.
        folder: where the state is written after each round, and taken up from if there is one;
            clients' states are then on disk. None: everything in memory.
        watch: called with each round's summary.
        hear: called with each client's answer, and what it was asked.
        keep: called at the end with each client's own model, if the configuration says
            ``keep_clients``; one that was never evaluated has none.
        quant: then also learn a bitwidth for each layer within ``budget=``, and tune the weights
            under these bits; see :func:`fl.phases.learning`, which takes what ``bits`` has.
        bits: ``budget``, ``phases``, ``policy`` and ``personal``.

    Returns:
        The selected model and its figures; with ``quant`` a :class:`fl.bits.FederatedBits`.

    Raises:
        RequestError: method, configuration, network and data do not go together.
        RunError: a round failed.
    """
    if quant is not None:
        from fl import phases  # they are rounds of this file's

        return phases.learning(
            model, quant=quant, method=method, clients=clients, num_classes=num_classes,
            config=config, rounds=rounds, test=test, val=val, normalization=normalization,
            augment=augment, head=head, folder=folder, watch=watch, hear=hear, **bits,
        ).go()  # fmt: skip
    if bits:
        raise RequestError(f"fl.run: {', '.join(bits)} must stand with quant=; give a QuantConfig")
    config = config or FederationConfig()
    if rounds is not None:
        config = config.replaced(rounds=rounds)
    method = method_of(method) if isinstance(method, str) else method
    if not clients:
        raise RequestError("clients: there must be at least one, got none")
    check_federation(method, clients)
    clients = method.arrange(clients)
    setting = Setting.of(
        copy.deepcopy(model), method, config, num_classes=num_classes,
        image_shape=clients[0].train.images.shape[1:], normalization=normalization,
        augment=augment, head=head,
    )  # fmt: skip
    transport = InProcess(setting, clients, Store(None if folder is None else folder / "clients"))
    done = run_over(
        setting,
        transport,
        len(clients),
        [[c.name, len(c.train), c.supervision] for c in clients],
        test=[c.test for c in clients] if test is None else test,
        val=[c.val for c in clients] if val is None else val,
        folder=folder, watch=watch, hear=hear,
    )  # fmt: skip
    if keep is not None:
        for client in sorted(transport.store.index):
            personal = Personal.taken(transport.store[client])
            if personal is not None:
                keep(client, personal)
    return done


def run_over(
    setting: Setting,
    transport: Transport,
    num_clients: int,
    clients: Any = None,
    *,
    test: Iterable[ImageSet | None] = (),
    val: Iterable[ImageSet | None] = (),
    folder: Path | None = None,
    watch: Watcher | None = None,
    hear: Listener | None = None,
) -> Federated:
    """Run the rounds with clients that are wherever the transport finds them.

    Args:
        setting: of the federation.
        transport: to the clients.
        num_clients: of the federation.
        clients: what is known of them, as JSON has it; a federation that is taken up again must
            have the same.
        test: what the server measures generalization on; empty: it has no images.
        val: likewise, for the selection of a round.
        folder: see :func:`run`, as are the others.
        watch: called with each round's summary.
        hear: called with each client's answer.
    """
    return Run(setting, transport, num_clients, clients, test, val, folder, watch, hear).go()


class Run:
    """One run: rounds, evaluation, selection, and the file they are kept in.

    See :func:`run_over` for the arguments. When it is done ``rounds`` has what server and clients
    keep.
    """

    def __init__(
        self,
        setting: Setting,
        transport: Transport,
        num_clients: int,
        clients: Any,
        test: Iterable[ImageSet | None],
        val: Iterable[ImageSet | None],
        folder: Path | None,
        watch: Watcher | None,
        hear: Listener | None,
    ) -> None:
        setting.config.check_number(num_clients)
        self.setting, self.folder, self.watch = setting, folder, watch
        self.test, self.val = _with_images(test), _with_images(val)
        own, references = (
            Store(None if folder is None else folder / name) for name in ("own", "references")
        )
        self.rounds = Rounds(setting, transport, num_clients, own, hear, references)
        self.history: list[dict[str, Any]] = []
        self.asked: Counter[int] = Counter()
        """How often each client was asked, of rounds that were repeated too."""
        self.best: dict[str, Any] = {"round": 0, "score": None}
        self.best_model: Tensors = {}
        self.identity = {**setting.identity(), "clients": clients, "number": num_clients}

    def go(self) -> Federated:
        """Run what is left of the rounds."""
        if not self._resume():
            failures = self.rounds.begin()
            if self.folder is not None and self.setting.config.count_epsilon is not None:
                self._save(self.folder)  # asked again, clients would tell counts with other noise
            if failures and self.watch:
                self.watch({"counts": listed(failures)})
        self._take_up_asked()
        total = self.setting.config.rounds
        while self.rounds.server.round < total:
            number = self.rounds.server.round + 1
            due = number == total or number % self.setting.config.evaluate_every == 0
            self._note_asked()
            report = self.rounds.round(evaluate=due)
            summary = report.summary()
            if due:
                self._evaluate(report, summary, last=number == total)
            self.history.append(summary)
            if self.watch:  # before the state: a round that is repeated replaces its record
                self.watch(summary)
            if self.folder is not None:
                self._save(self.folder)
        chosen = self.history[self.best["round"] - 1]
        return Federated(
            state={
                n.removeprefix("model."): t
                for n, t in self.best_model.items()
                if n.startswith("model.")
            },
            round=self.best["round"],
            selected_by=self.setting.config.select if self.best["score"] is not None else "last",
            generalization=chosen.get("generalization", {}).get("test"),
            specialization=chosen.get("specialization", {}).get("test"),
            history=self.history,
            bytes_up=sum(r["bytes_up"] for r in self.history),
            bytes_down=sum(r["bytes_down"] for r in self.history),
            privacy=self._spent(),
            whole="generalization" in chosen,
        )

    def _spent(self) -> dict[str, Any] | None:
        """Return the guarantee of the client that was asked most often."""
        privacy = self.setting.config.privacy
        asked = Counter(client for r in self.history for client in r["asked"]) | self.asked
        return None if privacy is None else privacy.spent(max(asked.values()))

    def _note_asked(self) -> None:
        """Write whom the next round asks before it does, where each answer has noise of its own.

        A round that fails or is interrupted is repeated: the server has then seen two answers.
        """
        privacy = self.setting.config.privacy
        if privacy is None or (privacy.noise, privacy.noise_from) != ("secret", "client"):
            return
        self.asked.update(self.rounds.sample())
        if self.folder is not None:
            counts = {str(client): times for client, times in sorted(self.asked.items())}
            write_bytes_atomically(self.folder / ASKED, json.dumps(counts).encode())

    def _take_up_asked(self) -> None:
        if self.folder is None or not (path := self.folder / ASKED).is_file():
            return
        try:
            found = json.loads(path.read_text())
            self.asked = Counter({int(client): int(times) for client, times in found.items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise RequestError(
                f"{path}: must say how often each client was asked, but: {error!s:.200}; {ANEW}"
            ) from error

    def _evaluate(self, report: RoundReport, summary: dict[str, Any], *, last: bool) -> None:
        clients = dict(report.evaluations)
        config = self.setting.config
        # a round that may be selected is judged by all clients, or other ones are compared
        of_all = last or config.select != "last"
        if of_all and config.evaluate_absent and config.privacy is None:
            absent = [k for k in range(self.rounds.server.num_clients) if k not in report.asked]
            adapted, failures = self.rounds.adapt(absent)
            clients |= adapted
            summary["failures"] += listed(failures)
        summary["specialization"] = {
            part: evaluation.specialization(known)
            for part in ("val", "test")
            if (known := {k: e[part] for k, e in clients.items() if part in e})
        }
        before = self.rounds.collected
        if self.rounds.load_model_():
            summary["generalization"] = self._generalization()
        summary["bytes_up"] += self.rounds.collected - before
        self._select(summary)

    def _generalization(self) -> dict[str, Any]:
        setting, found = self.setting, {}
        for part, sets in (("val", self.val), ("test", self.test)):
            if sets:
                views = evaluation.evaluate(
                    setting.network,
                    setting.method.views("server"),
                    {k: setting.test_batches(images) for k, images in sets.items()},
                    self.rounds.server.all_counts,
                    adjust=setting.config.adjust,
                    by_client=True,
                )
                found[part] = {**evaluation.primary(views), "views": views}
        return found

    def _select(self, summary: dict[str, Any]) -> None:
        """Keep this round's model if it is the best so far, by validation images alone."""
        select = self.setting.config.select
        score = None
        if select != "last":
            main = evaluation.MAIN[self.setting.task.name]
            score = summary.get(select, {}).get("val", {}).get(main)
        best = self.best["score"]
        if best is None or (score is not None and score >= best):
            self.best = {"round": summary["round"] + 1, "score": score}
            state = self.setting.network.state_dict()
            self.best_model = {n: t.detach().cpu().clone() for n, t in state.items()}

    # --- state

    def _save(self, folder: Path) -> None:
        values = {"history": self.history, "best": self.best, "identity": self.identity}
        path = folder / STATE
        self.rounds.save(path, Record({"best": self.best_model}, values))

    def _resume(self) -> bool:
        if self.folder is None or not (path := self.folder / STATE).is_file():
            return False
        saved = load(path)
        identity = saved.values.get("identity")
        now = json.loads(json.dumps(self.identity))
        for key, value in now.items():
            before = identity.get(key) if isinstance(identity, dict) else None
            if before != value:
                raise RequestError(
                    f"{path}: {key} must be as in the interrupted federation, "
                    f"{before!r:.200}, got {value!r:.200}; "
                    "repeat the same request, or start in a new folder"
                )
        try:
            self.rounds.load_(saved)
            self.history, self.best = saved.values["history"], saved.values["best"]
        except RequestError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(
                f"{path}: must be a federation's state, but: {type(error).__name__}: "
                f"{error!s:.200}; {ANEW}"
            ) from error
        self.best_model = saved.tensors.get("best", {})
        return True


def _with_images(sets: Iterable[ImageSet | None]) -> dict[int, ImageSet]:
    return {k: s for k, s in enumerate(sets) if s is not None and len(s)}
