"""The one round loop, whoever carries the messages; and the server's state in one file.

After every round the server's state is written whole; together with the clients' files it is
enough to go on, on a CPU to the same last bit.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fl.channel import ServerEnd
from fl.config import share_of_clients
from fl.evaluation import specialization
from fl.method import Server, pools_images
from fl.privacy import privatised
from fl.record import (
    MOST,
    Failure,
    Kind,
    Record,
    Reply,
    Request,
    Tensors,
    Unreached,
    misfit,
    no_number,
    not_finite,
    save,
    shortened,
)
from fl.robust import too_large
from fl.setting import Setting
from fl.state import load_
from fl.store import Store
from sdq.batches import generator
from sdq.errors import RunError


class Transport(Protocol):
    """What carries requests to clients and their replies back."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        """Yield one answer a request, in any order; a client that fails is a Failure."""
        ...

    def commit(self, rounds: int) -> dict[str, Any]:
        """Make what clients keep after this many rounds last; return what finds it again."""
        ...

    def restore(self, committed: dict[str, Any]) -> None:
        """Take clients up as :meth:`commit` described them."""
        ...

    def forget_old_(self) -> None:
        """Delete what no committed round needs any more."""
        ...


Listener = Callable[[Kind, Reply | Failure], None]


@dataclass
class RoundReport:
    """What happened in one round; ``round`` counts from 0."""

    round: int
    asked: list[int]
    replied: list[int] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    sat_out: list[Failure] = field(default_factory=list)
    train_loss: float | None = None
    bytes_up: int = 0
    sent: dict[int, int] = field(default_factory=dict)
    """Bytes that were sent, by client."""
    anew: list[int] = field(default_factory=list)
    """Clients that have lost what they kept, and began anew."""
    evaluations: dict[int, Any] = field(default_factory=dict)

    @property
    def bytes_down(self) -> int:
        """Return what was sent to all clients."""
        return sum(self.sent.values())

    def summary(self) -> dict[str, Any]:
        """Return it as JSON has it, without the clients' metrics."""
        return {
            "round": self.round,
            "asked": self.asked,
            "replied": self.replied,
            "failures": listed(self.failures),
            "sat_out": listed(self.sat_out),
            "train_loss": self.train_loss,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            **({"anew": sorted(self.anew)} if self.anew else {}),
        }


class Rounds:
    """A federation in progress: the server's half of every round.

    Args:
        setting: of the federation.
        transport: to the clients.
        num_clients: of the federation; they are numbered from 0.
        own: the states a method makes for single clients.
        references: what each client has of a compressed model.
        hear: called with each answer as it comes, and what was asked.
    """

    def __init__(
        self,
        setting: Setting,
        transport: Transport,
        num_clients: int,
        own: Store | None = None,
        hear: Listener | None = None,
        references: Store | None = None,
    ) -> None:
        self.setting = setting
        self.transport = transport
        self.end = ServerEnd(setting, references or Store())
        self.collected = 0
        """Bytes that came up for evaluations of the server's model."""
        self._sent: dict[int, Tensors] = {}  # what each client of this round is to start from
        self.hear = hear or (lambda kind, answer: None)
        self.server = Server(
            config=setting.config,
            network=setting.network,
            routes=setting.routes,
            num_clients=num_clients,
            counts={},
            round=0,
            model={name: setting.initial[name] for name in setting.names(up=True)},
            memory=Record(),
            own=own or Store(),
            generator=lambda purpose: generator(
                setting.config.seed, f"server {purpose}", self.server.round
            ),
        )

    def begin(self) -> list[Failure]:
        """Exchange class counts, once; return the clients that told none.

        Raises:
            RunError: no client told any.
        """
        failures = self._introduce(range(self.server.num_clients))
        if not self.server.counts:
            raise RunError(f"federation: some client must have images, got none: {_why(failures)}")
        self.setting.method.start_server(self.server)
        self.server.told = {}
        return sorted(failures, key=lambda f: f.client)

    def _introduce(self, clients: Iterable[int]) -> list[Failure]:
        """Take what clients tell before they train; return those that tell nothing usable."""
        failures = []
        requests = (Request("counts", k, 0, Record()) for k in clients)
        for answer in self._ask("counts", requests):
            if isinstance(answer, Failure):
                failures.append(answer)
            elif (why := self._misfit_told(answer.record)) is not None:
                failures.append(Failure(answer.client, why))
            else:
                counts = torch.tensor(answer.record.values["class_counts"], dtype=torch.float32)
                self.server.counts[answer.client] = counts
                self.server.told[answer.client] = answer.record
        return failures

    def sample(self) -> list[int]:
        """Return the clients this round asks, ascending."""
        total = self.server.num_clients
        count = share_of_clients(total, self.setting.config.participation)
        order = torch.randperm(total, generator=self.server.generator("participation"))
        return sorted(order[:count].tolist())

    def round(self, *, evaluate: bool) -> RoundReport:
        """Run one round: ask, check, aggregate. Where all sit out the model stays as it is.

        Raises:
            RunError: fewer clients replied than must; nothing of the server is changed.
        """
        server = self.server
        report = RoundReport(server.round, self.sample())
        if late := [k for k in report.asked if k not in server.counts]:
            self._introduce(late)  # who is not there now is left out of the round, and named there
            server.told = {}  # what methods make of it they have made
        replies: list[Reply] = []
        requests = self.requests("train", report.asked, report, evaluate=evaluate)
        for answer in self._ask("train", requests):
            if isinstance(answer, Reply):
                report.bytes_up += answer.record.num_bytes()
                if answer.record.values.pop("anew", False):
                    report.anew.append(answer.client)
            if isinstance(answer, Unreached):
                del report.sent[answer.client]
            checked = answer if isinstance(answer, Failure) else self._checked(answer)
            if isinstance(checked, Failure):
                report.failures.append(checked)
            elif checked.sits_out is not None:
                report.sat_out.append(Failure(checked.client, checked.sits_out))
                report.evaluations |= _evaluations(checked)
            else:
                replies.append(checked)
        # the order in which replies come must not change a sum's last bit
        replies = self._screened(sorted(replies, key=lambda r: r.client), report)
        for left_out in (report.failures, report.sat_out):
            left_out.sort(key=lambda f: f.client)
        report.replied = [r.client for r in replies]
        answers = len(replies) + len(report.sat_out)
        if answers < self.setting.config.min_replies:
            raise RunError(
                f"round {server.round + 1}: at least {self.setting.config.min_replies} clients "
                f"must reply, got {answers} of {len(report.asked)}: {_why(report.failures)}"
            )
        self._conclude(replies, report)
        return report

    def adapt(self, clients: Iterable[int]) -> tuple[dict[int, Any], list[Failure]]:
        """Return the metrics of clients that train on the current model and forget it again.

        And the clients that failed.
        """
        found: dict[int, Any] = {}
        failures = []
        requests = self.requests("adapt", clients, None, evaluate=True)
        for answer in self._ask("adapt", requests):
            if isinstance(answer, Failure):
                failures.append(answer)
            elif (why := self._misfit_evaluations(answer)) is not None:
                failures.append(Failure(answer.client, why))
            else:
                found |= _evaluations(answer)
        return found, failures

    def load_model_(self) -> bool:
        """Put the server's model into the setting's network; tell whether it is one to evaluate.

        Tensors of the model that stay with the clients are collected and averaged over those that
        have trained, if the configuration says so, and the method has a use for that.
        """
        load_(self.setting.network, self.setting.initial | self.server.model)
        if not self.setting.method.has_server_model:
            return False
        missing = [n for n in self.setting.names(up=False) if n.startswith("model.")]
        if not missing:
            return True
        if not self.setting.config.assemble or self.setting.config.privacy is not None:
            return False
        return self._assemble_()

    def _assemble_(self) -> bool:
        sums: Tensors = {}
        last: Tensors = {}
        total = 0.0
        clients = sorted(self.server.counts)
        requests = (Request("collect", k, self.server.round, Record()) for k in clients)
        # one at a time: a thousand models need not be in memory
        for answer in self._ask("collect", requests):
            if isinstance(answer, Failure) or not answer.model:
                continue
            self.collected += answer.record.num_bytes()
            weight = float(self.server.counts[answer.client].sum()) or 1.0
            total += weight
            for name, tensor in answer.model.items():
                if tensor.is_floating_point():
                    sums[name] = sums.get(name, 0) + tensor.double() * weight
                else:
                    last.setdefault(name, tensor)
        if not total:
            return False
        load_(self.setting.network, {n: t / total for n, t in sums.items()} | last)
        return True

    def requests(
        self, kind: Kind, clients: Iterable[int], report: RoundReport | None, *, evaluate: bool
    ) -> Iterator[Request]:
        """Yield what is asked of clients, with the model that each starts from."""
        server, method = self.server, self.setting.method
        down = self.setting.names(down=True)
        counts = server.all_counts.tolist()
        for client in clients:
            state = method.state_for(server, client)
            extra = method.send(server, client)
            record = Record(
                {"model": {n: state[n] for n in down}, **extra.tensors},
                {"class_counts": counts, "evaluate": evaluate, **extra.values},
            )
            request = self.end.packed(Request(kind, client, server.round, record))
            if report is not None:
                self._sent[client] = state
                report.sent[client] = request.record.num_bytes()
            yield request

    def _ask(self, kind: Kind, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for answer in self.transport.ask(requests):
            self.hear(kind, answer)
            yield answer

    def _misfit_told(self, told: Record) -> str | None:
        counts, asked = told.values.get("class_counts"), self.setting.num_counts
        if not (
            isinstance(counts, list)
            and len(counts) == asked
            and not any(no_number({"": n}, "", least=0) for n in counts)
        ):
            return (
                f"its class counts are {shortened(counts)} instead of {asked} numbers from 0 to "
                f"{MOST:g}"
            )
        if (name := not_finite(told)) is not None:
            return f"what it tells before the first round is NaN or infinite in {name!r}"
        if (why := self.setting.method.misfit_told(self.server, told)) is not None:
            return f"what it tells before the first round is not the method's: {why}"
        return None

    def _checked(self, reply: Reply) -> Reply | Failure:
        if (why := self._misfit_evaluations(reply)) is not None:
            return Failure(reply.client, why)
        if reply.sits_out is not None:
            name = not_finite(reply.record)
            return reply if name is None else Failure(reply.client, f"{name!r} is not finite")
        try:
            reply = self.end.unpacked(reply, self._sent[reply.client])
        except RunError as error:
            return Failure(reply.client, str(error))
        expected = {n: self.setting.initial[n] for n in self.setting.names(up=True)}
        if (why := misfit(reply.model, expected)) is not None:
            return Failure(reply.client, f"its model is not the federation's: {why}")
        if (name := not_finite(reply.record)) is not None:
            return Failure(reply.client, f"its reply is NaN or infinite in {name!r}")
        values = reply.record.values
        why = no_number(values, "num_examples", least=1)
        if why is None and "train_loss" in values:
            why = no_number(values, "train_loss")
        if why is not None or not isinstance(values["num_examples"], int):
            return Failure(reply.client, f"its {why or 'num_examples is no whole number'}")
        if (why := self.setting.method.misfit(self.server, reply)) is not None:
            return Failure(reply.client, f"its reply is not the method's: {why}")
        return reply

    def _misfit_evaluations(self, reply: Reply) -> str | None:
        """Return why what a client says of its own model cannot be used, or None."""
        try:
            found = _evaluations(reply)
            for parts in found.values():
                for part in parts.values():
                    specialization({reply.client: part})
        except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
            return f"its evaluations cannot be read: {type(error).__name__}"
        strangers = found.keys() - {reply.client}
        if strangers and not pools_images(self.setting.method):
            return f"its evaluations are of client {min(strangers)}"
        return None

    def _screened(self, replies: list[Reply], report: RoundReport) -> list[Reply]:
        """Return the replies that count, clipped where the server sees to privacy."""
        config, server = self.setting.config, self.server
        if config.privacy is not None and config.privacy.noise_from == "server":
            clip = config.privacy.clip
            clipped = [privatised(r.model, self._sent[r.client], clip, 0.0, None) for r in replies]
            return [
                Reply(r.client, Record({**r.record.tensors, "model": model}, r.record.values))
                for r, model in zip(replies, clipped, strict=True)
            ]
        if config.max_update_ratio is None or not self.setting.method.comparable_updates:
            return replies
        names = server.parameter_names() & set(self.setting.names(down=True))
        images = {k: float(counts.sum()) for k, counts in server.counts.items()}
        refused = too_large(replies, self._sent, images, sorted(names), config.max_update_ratio)
        report.failures += refused
        return [r for r in replies if r.client not in {f.client for f in refused}]

    def _conclude(self, replies: list[Reply], report: RoundReport) -> None:
        server = self.server
        if replies:
            self._aggregate(replies)
        told = [
            (r.record.values["train_loss"], r.num_examples)
            for r in replies
            if "train_loss" in r.record.values
        ]
        if told:
            report.train_loss = sum(loss * n for loss, n in told) / sum(n for _, n in told)
        report.evaluations |= {k: e for r in replies for k, e in _evaluations(r).items()}
        self.end.conclude(report.asked, report.replied, server.round)
        self._sent.clear()
        server.round += 1

    def _aggregate(self, replies: list[Reply]) -> None:
        server = self.server
        aggregated = self.setting.method.aggregate(server, replies)
        for name, tensor in aggregated.model.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise RunError(
                    f"round {server.round + 1}: the aggregated model must be finite, got NaN or "
                    f"infinity in {name!r}; lower the server's learning rate"
                )
        server.model = aggregated.model
        for client, state in aggregated.clients.items():
            server.own.put(client, Record({"model": state}), server.round)

    # --- state

    def save(self, path: Path, rest: Record) -> None:
        """Write the server's state, and what the caller adds to it, to one file."""
        server = self.server
        groups = {f"memory:{g}": t for g, t in server.memory.tensors.items()}
        values = {
            "round": server.round,
            "counts": {str(k): c.tolist() for k, c in server.counts.items()},
            "memory": server.memory.values,
            "own": {str(k): r for k, r in server.own.index.items()},
            "references": {str(k): r for k, r in self.end.references.index.items()},
            "transport": self.transport.commit(server.round),
            **rest.values,
        }
        save(path, Record({"model": server.model, **groups, **rest.tensors}, values))
        server.own.forget_old_()
        self.end.references.forget_old_()
        self.transport.forget_old_()

    def load_(self, saved: Record) -> None:
        """Take up such a state; clients' states are in the folders of the stores."""
        server = self.server
        server.round = saved.values["round"]
        server.counts = {int(k): torch.tensor(c) for k, c in saved.values["counts"].items()}
        server.own = _taken_up(server.own, saved.values["own"])
        self.end.references = _taken_up(self.end.references, saved.values.get("references", {}))
        server.model = saved.model
        groups = {
            g.removeprefix("memory:"): t
            for g, t in saved.tensors.items()
            if g.startswith("memory:")
        }
        server.memory = Record(groups, saved.values["memory"])
        self.transport.restore(saved.values["transport"])


def _taken_up(store: Store, index: dict[str, int]) -> Store:
    return Store(store.folder, {int(client): round for client, round in index.items()})


def _evaluations(reply: Reply) -> dict[int, Any]:
    """Return metrics by client: its own, or those of the clients that it pools."""
    return {int(k): e for k, e in reply.record.values.get("evaluations", {}).items()}


def listed(failures: Iterable[Failure]) -> list[dict[str, Any]]:
    """Return failures as JSON has them."""
    return [{"client": f.client, "reason": f.reason} for f in failures]


def _why(failures: Iterable[Failure]) -> str:
    return "; ".join(f"client {f.client}: {f.reason}" for f in failures)
