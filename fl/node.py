"""A client on a node of its own: what it answers to one message, from what it remembers.

It keeps nothing in the process: Flower may start a new one for each message.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from flwr.app import Context

from fl.client import try_answer
from fl.grid_transport import identity
from fl.method import ClientData
from fl.node_memory import NodeMemory
from fl.opening import Opening, carried, check_masks_known, data_of
from fl.personal import Personal
from fl.phase_settings import PhaseSettings
from fl.quant_results import write_own
from fl.record import Failure, Kind, Record, Reply, Request, Tensors, digest
from fl.setting import Setting
from sdq.errors import RequestError


@dataclass(frozen=True)
class Hospital:
    """What a client needs: the same setting, its own images, and where it keeps what it learned.

    ``folder=None`` keeps it in Flower's context: in memory, for as long as the run lasts. With a
    folder a federation can be taken up again in another run.

    ``described`` is what ``run.json`` says of data and network
    (:meth:`fl.results.Description.to_json`). Where the federation says ``keep_clients``, or the
    client has a budget of its own, a client that has it and a folder writes its own model as a run
    folder, ``FEDERATION/NUMBER/model``.
    """

    setting: Setting | PhaseSettings
    data: ClientData
    folder: Path | None = None
    described: Mapping[str, Any] | None = None


def answered(kind: str, client: int, hospital: Hospital, asked: Record, context: Context) -> Record:
    """Return a client's answer to a message.

    Args:
        kind: of the message.
        client: its number.
        hospital: what it has.
        asked: what came.
        context: Flower's, which may be changed.

    Raises:
        RequestError: server and node are of different federations.
    """
    memory = NodeMemory(hospital.folder, context, str(asked.values.pop("federation")), client)
    phase = asked.values.pop("phase", None)
    setting = hospital.setting
    if isinstance(setting, PhaseSettings):
        if phase is None:
            raise RequestError(
                f"client {client}: bits must be learned by all or by none, got a server that "
                "learns none; give both the same settings"
            )
        return _Learner(client, hospital, setting, memory).answered(kind, phase, asked)
    if kind == "hello":
        return Record({}, {"client": client, "identity": identity(setting)})
    trained = asked.values.pop("trained", False)
    request = _request(kind, client, asked)
    kept = memory.before(request.round)
    anew = _begins_anew(setting, trained, kept)
    answer, keeps = try_answer(setting, hospital.data, request, kept)
    if keeps is not None:
        memory.write(keeps, request.round)
        own = Personal.taken(keeps)
        if own is not None and hospital.described is not None and memory.folder is not None:
            own.write(memory.folder / "model", hospital.described)
    return _said(answer, anew=anew)


def _request(kind: str, client: int, asked: Record) -> Request:
    return Request(cast(Kind, kind), client, int(asked.values.pop("round")), asked)


def _said(answer: Reply | Failure, *, anew: bool) -> Record:
    if isinstance(answer, Failure):
        return Record({}, {"failure": answer.reason})
    if anew:
        answer.record.values["anew"] = True
    return answer.record


def _begins_anew(setting: Setting, trained: object, kept: Record | None) -> bool:
    """Return whether a client that has trained no longer has what stays with it."""
    return bool(trained) and kept is None and bool(setting.names(down=False))


@dataclass(frozen=True)
class _Learner:
    """A client of a federation that learns bits."""

    client: int
    hospital: Hospital
    settings: PhaseSettings
    memory: NodeMemory

    def answered(self, kind: str, phase: str, asked: Record) -> Record:
        if kind == "hello":
            return self._greeted({**asked.values, "phase": phase}, asked.tensors)
        told = self.memory.opening()
        models = {} if told is None else self._models(told["models"])
        if told is None or told["phase"] != phase or models.keys() != told["models"].keys():
            # a node without a folder that ended and is back under the same name
            why = f"the node does not remember how the phase {phase} began, and is told again"
            return Record({}, {"failure": why, "unmet": True})
        trained = asked.values.pop("trained", False)
        request = _request(kind, self.client, asked)
        return self._asked(Opening.of(told, models), request, trained)

    def _greeted(self, told: dict[str, Any], models: Mapping[str, Tensors]) -> Record:
        """Take up a phase; say what this node takes the federation to be."""
        check_masks_known(self.hospital.data)
        for name, state in models.items():
            self.memory.put_model(name, state)
        known, agreed = self._models(told["models"]), self.settings.identity()
        sent = {name: Record({name: self.memory.model(name)}).num_bytes() for name in known}
        said = {"client": self.client, "sent": sent}
        lacks = sorted(told["models"].keys() - known.keys())
        if lacks:
            return Record({}, {**said, "identity": agreed, "lacks": lacks})
        setting = self.settings.setting(Opening.of(told, known))
        self.memory.open(told)
        return Record({}, {**said, "identity": {**agreed, **identity(setting)}})

    def _models(self, wanted: Mapping[str, str]) -> dict[str, Tensors]:
        """Return the models with these digests that the node has; one may be the first weights."""
        found, first = {}, self.settings.first
        for name, told in wanted.items():
            for known in (self.memory.model(name), first):
                if known and digest(known) == told:
                    found[name] = known
                    break
        return found

    def _asked(self, opening: Opening, request: Request, trained: object) -> Record:
        phase, memory = opening.phase, self.memory
        setting = self.settings.setting(opening)
        kept = memory.before(request.round, phase)
        anew = _begins_anew(setting, trained, kept)
        if kept is None and phase != "float":
            searched = memory.last("search") if opening.start else None
            kept = carried(memory.last("float"), setting, searched)
        data = data_of(self.hospital.data, phase)
        answer, keeps = try_answer(setting, data, request, kept)
        if keeps is not None and request.kind == "own":
            self._write(opening, keeps)
        elif keeps is not None:
            memory.write(keeps, request.round, phase)
        return _said(answer, anew=anew)

    def _write(self, opening: Opening, keeps: Record) -> None:
        """Write the client's own model as a run folder, if there is a place."""
        own, described = Personal.taken(keeps), self.hospital.described
        if own is None or described is None or self.memory.folder is None:
            return
        assert opening.policy is not None
        policy = opening.own.get(self.client, opening.policy)
        qmodel = self.settings.tuned(opening.network, policy, own.state)
        write_own(
            self.memory.folder / "model", described, qmodel, opening.network, policy.figures(),
            own.evaluation.get("test"),
        )  # fmt: skip
