"""A federation that ends in a mixed-precision model: bits learned by all, from nobody's images.

Three phases, each of which is rounds like any others, with the method's own way to aggregate:

1. *float*: the ordinary federation (none, where the model comes trained);
2. *search*: weights and bitwidth parameters together; the server projects the latter to the best
   policy within the budget (:mod:`fl.search_rounds`);
3. *tune*: from the float weights again, under that policy, with bin regularization and the float
   model for a teacher (:mod:`fl.tune_rounds`). Clients with a budget of their own have a policy of
   their own.

What a client kept in the float phase (a head, its normalisation, a personal model) it starts the
other two from; what a method's client or server noted beside begins anew with each phase.

With ``folder=`` each phase has a folder of its own there, and a run that was killed goes on in the
phase and round where it was: phases that are done are read, not run.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from fl.bits import (
    MIXING,
    ClientBudget,
    FederatedBits,
    Limit,
    PersonalModel,
    PhasesConfig,
    budget_of,
)
from fl.client import answer
from fl.config import FederationConfig
from fl.method import ClientData, Method
from fl.method import method as method_of
from fl.personal_bits import PersonalProblem, check_personal
from fl.phase_settings import PhaseSettings
from fl.quant_network import float_name
from fl.quant_rounds import TEACHER, TOLD_BYTES, QuantRounds
from fl.record import Record, Reply, picked
from fl.rounds import Listener
from fl.run import STATE, Federated, InProcess, Run, Watcher
from fl.search_rounds import GROUP, SearchRounds
from fl.setting import Setting
from fl.store import Store
from fl.tune_rounds import TuneRounds
from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.batches import Augmentation, Normalization
from sdq.config import QuantConfig
from sdq.cost import Constraint
from sdq.data import ImageSet
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.projection import project
from sdq.quant_model import QuantModel
from sdq.search import check_search
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace


def run(
    model: nn.Module,
    *,
    quant: QuantConfig,
    budget: Limit | None = None,
    method: str | Method = "fedavg",
    clients: Sequence[ClientData],
    num_classes: int,
    config: FederationConfig | None = None,
    rounds: int | None = None,
    phases: PhasesConfig | None = None,
    policy: BitwidthPolicy | None = None,
    personal: Mapping[int, ClientBudget] | None = None,
    **others: Any,
) -> FederatedBits:
    """Train across clients, learn a bitwidth for each layer, and tune the weights under them.

    Args:
        model: what every client starts from; left as it is.
        quant: how it is quantized.
        budget: what the policy may cost; it is never exceeded.
        method: of every phase.
        clients: their images.
        num_classes: of the task.
        config: of the float phase, and of the others but for what their phase decides.
        rounds: of the float phase, instead of the configuration's; 0: the model is trained.
        phases: everything else.
        policy: instead of a budget and a search.
        personal: budgets of clients that have their own, by number.
        others: ``test``, ``val``, ``normalization``, ``augment``, ``head``, ``folder``, ``watch``
            and ``hear``, as of :func:`fl.run.run`; a summary that is watched names its ``phase``.

    Raises:
        RequestError: as of :func:`fl.run.run`; or no policy fits a budget, or the method does not
            go with a quantized network.
        RunError: a round failed.
    """
    return Learning(
        model, quant, budget, method_of(method) if isinstance(method, str) else method, clients,
        num_classes, config or FederationConfig(), rounds, phases or PhasesConfig(), policy,
        dict(personal or {}), **others,
    ).go()  # fmt: skip


@dataclass
class Learning:
    """All phases of one federation; see :func:`run`."""

    model: nn.Module
    quant: QuantConfig
    budget: Limit | None
    method: Method
    clients: Sequence[ClientData]
    num_classes: int
    config: FederationConfig
    rounds: int | None
    phases: PhasesConfig
    policy: BitwidthPolicy | None = None
    personal: dict[int, ClientBudget] = field(default_factory=dict)
    test: Sequence[ImageSet] | None = None
    val: Sequence[ImageSet] | None = None
    normalization: Normalization | None = None
    augment: Augmentation | None = None
    head: str | None = None
    folder: Path | None = None
    watch: Watcher | None = None
    hear: Listener | None = None

    def __post_init__(self) -> None:
        if not self.clients:
            raise RequestError("clients: there must be at least one, got none")
        for client in self.clients:
            if client.supervision != "pixel":
                raise RequestError(
                    f"client {client.name!r}: supervision must be pixel where bits are learned, "
                    f"got {client.supervision!r}; train the float model first, and quantize it "
                    "with masks (sdq quantize --from)"
                )
        self.clients = self.method.arrange(self.clients)
        self.settings = PhaseSettings(
            quant=self.quant, method=self.method, num_classes=self.num_classes,
            image_shape=self.clients[0].train.images.shape[1:], config=self.config,
            rounds=self.rounds, phases=self.phases, normalization=self.normalization,
            augment=self.augment, head=self.head,
        )  # fmt: skip
        self.done: dict[str, Run] = {}
        self.results: dict[str, Federated] = {}
        self.course: list[dict[str, Any]] = []

    # --- what can be told before anything is trained

    def check(self) -> dict[str, Setting]:
        """Return the settings of the phases as far as they are known before a round is run.

        Raises:
            RequestError: something is wrong with the request.
        """
        if (self.budget is None) == (self.policy is None):
            got = "neither" if self.budget is None else "both"
            raise RequestError(f"fl.run: must have a budget or a policy, got {got}; give one")
        check_personal(self.personal, len(self.clients), self.policy, self.phases)
        quantized = self.settings.quantized(self.model)
        space = self.settings.space(quantized)
        if self.budget is not None:
            check_search(
                quantized, budget_of(self.budget, space), self.phases.search,
                self.phases.search_method,
            )  # fmt: skip
        for client, asked in self.personal.items():
            PersonalProblem.of(client, asked, space).check()
        return self._settings(quantized, space)

    def _settings(self, quantized: QuantModel, space: SearchSpace) -> dict[str, Setting]:
        found = {}
        if self.rounds != 0:
            found["float"] = self.settings.float_phase(copy.deepcopy(self.model))
            if self.quant.batch_norm == "fold" and found["float"].names(down=False):
                raise RequestError(
                    "quant.batch_norm: must not be fold where clients keep tensors of their own, "
                    f"as with {self.method.name}; use freeze or train"
                )
        if self._learns:
            assert self.budget is not None
            search = self.settings.search_method(self.model, space, self.budget)
            found["search"] = self.settings.search_phase(search, quantized)
        if self.policy is not None:
            apply_policy_(quantized, self.policy)
        tuning = self.settings.tune_method(self.model, quantized.policy, {})
        return found | {"tune": self.settings.tune_phase(tuning, quantized)}

    @property
    def _learns(self) -> bool:
        return self.policy is None and self.phases.search_method in MIXING

    # --- the phases

    def go(self) -> FederatedBits:
        """Run what is left of them."""
        self.check()
        network = self._float()
        policy, own = self._policies(network)
        tune = self._tune(network, policy, own)
        done = self.results["tune"]
        float_state = picked(network.state_dict(), network.state_dict())
        # the phases' first weights, which are also the teacher, reach each client once
        first = sum(t.nbytes for t in float_state.values()) * len(self.clients)
        parts = self.results.values()
        return FederatedBits(
            **{
                **vars(done),
                "bytes_up": sum(r.bytes_up for r in parts) + self._introductions(),
                "bytes_down": sum(r.bytes_down for r in parts) + first,
            },
            policy=policy, quant=self.quant, float_state=float_state, phases=self.results,
            course=self.course, personal=self._personal_models(tune, own),
        )  # fmt: skip

    def _float(self) -> nn.Module:
        """Return the float network, trained."""
        network = copy.deepcopy(self.model)
        if self.rounds == 0:
            return network
        self._run(self.settings.float_phase(network), "float", self.clients)
        network = copy.deepcopy(self.model)
        network.load_state_dict(self.results["float"].state)
        return network

    def _policies(self, network: nn.Module) -> tuple[BitwidthPolicy, dict[int, BitwidthPolicy]]:
        """Return the policy of all, and those of clients that have their own."""
        if self.policy is not None:
            return self.policy, {}
        assert self.budget is not None
        quantized = self.settings.quantized(network)
        space = self.settings.space(quantized)
        if not space.units:
            return quantized.policy, {}
        constraints = budget_of(self.budget, space).constraints(space)
        problems = {k: PersonalProblem.of(k, asked, space) for k, asked in self.personal.items()}
        if not self._learns:
            return self._chosen(quantized, space, constraints), {
                client: self._chosen(quantized, problem.space, problem.constraints)
                for client, problem in problems.items()
            }
        method = self.settings.search_method(network, space, self.budget)
        # nothing is chosen by what the network is worth while its bits are drawn
        trained = [replace(c, val=None, test=None, pooled=()) for c in self.clients]
        ended = self._run(self.settings.search_phase(method, quantized), "search", trained)
        self.course = ended.rounds.server.memory.values[GROUP]
        utilities = method.utilities_of(ended.rounds.server.memory.tensors[GROUP])
        return space.policy_of(project(utilities, constraints)), {
            client: problem.policy_of(self._utilities_of(client, ended, utilities), space)
            for client, problem in problems.items()
        }

    def _utilities_of(
        self, client: int, ended: Run, everyones: list[list[float]]
    ) -> list[list[float]]:
        """Return what a client's policy follows."""
        store = _store(ended)
        if self.phases.personal_bits == "global" or client not in store:
            return everyones
        method = ended.setting.method
        assert isinstance(method, SearchRounds)
        return method.utilities_of(store[client].tensors[GROUP])

    def _chosen(
        self, quantized: QuantModel, space: SearchSpace, constraints: list[Constraint]
    ) -> BitwidthPolicy:
        """Return a policy that needs no data."""
        problem = SearchProblem(quantized, [], space, constraints, self.phases.search)
        method = plugins.load("sdq.search_methods", self.phases.search_method)
        return space.policy_of(method.choose(problem))

    def _tune(
        self, network: nn.Module, policy: BitwidthPolicy, own: dict[int, BitwidthPolicy]
    ) -> Run:
        quantized = self.settings.quantized(network)
        apply_policy_(quantized, policy)
        method = self.settings.tune_method(network, policy, own)
        return self._run(self.settings.tune_phase(method, quantized), "tune", self.clients)

    def _personal_models(
        self, ended: Run, own: Mapping[int, BitwidthPolicy]
    ) -> dict[int, PersonalModel]:
        """Return clients' own models: each trains on the final one for a round more."""
        found = {}
        store, method = _store(ended), ended.setting.method
        assert isinstance(method, TuneRounds)
        for client in range(len(self.clients)) if self.config.keep_clients else sorted(own):
            (request,) = ended.rounds.requests("train", [client], None, evaluate=True)
            reply, _ = answer(ended.setting, self.clients[client], request, store.get(client))
            assert isinstance(reply, Reply)
            state = method.personal(ended.setting.network)
            evaluations = reply.record.values["evaluations"]
            # of one that pools others there are only theirs
            evaluation = {} if self.clients[client].pooled else evaluations.get(str(client), {})
            found[client] = PersonalModel(
                method.policy_of(client), picked(state, state), evaluation
            )
        return found

    # --- parts

    def _run(self, setting: Setting, phase: str, clients: Sequence[ClientData]) -> Run:
        folder = None if self.folder is None else self.folder / phase
        store = Store(None if folder is None else folder / "clients")
        begun = folder is not None and (folder / STATE).is_file()
        if phase != "float" and "float" in self.done and not begun:
            self._carry_over_(setting, store)
        test = [c.test for c in clients] if self.test is None else self.test
        val = [c.val for c in clients] if self.val is None else self.val
        none: Sequence[ImageSet | None] = ()
        watch = self.watch
        going = Run(
            setting, InProcess(setting, clients, store), len(clients),
            [[c.name, len(c.train)] for c in clients], none if phase == "search" else test,
            none if phase == "search" else val, folder,
            None if watch is None else lambda summary: watch({"phase": phase, **summary}),
            self.hear,
        )  # fmt: skip
        self.results[phase] = going.go()
        self.done[phase] = going
        return going

    def _carry_over_(self, setting: Setting, store: Store) -> None:
        """Let clients start a phase from what they kept in the float one."""
        kept = _store(self.done["float"])
        names = {n: float_name(n, setting.network) for n in setting.names(down=False)}
        for client in kept.index:
            known = kept[client].model
            if not known:
                continue
            own = {n: known.get(f, setting.initial[n]) for n, f in names.items()}
            teacher = {n: t for n, t in known.items() if n.startswith("model.")}
            store.put(client, Record({"model": own, TEACHER: teacher}), 0)

    def _introductions(self) -> int:
        """Return the bytes of the scales that clients told."""
        total = 0
        for going in self.done.values():
            if isinstance(going.setting.method, QuantRounds):
                total += going.rounds.server.memory.values.get(TOLD_BYTES, 0)
        return total


def _store(ended: Run) -> Store:
    transport = ended.rounds.transport
    assert isinstance(transport, InProcess)
    return transport.store
