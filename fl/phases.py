"""A federation that ends in a mixed-precision model: bits learned by all, from nobody's images.

Three phases, each of which is rounds like any others, with the method's own way to aggregate:

1. *float*: the ordinary federation (none, where the model comes trained);
2. *search*: weights and bitwidth parameters together; the server projects the latter to the best
   policy within the budget (:mod:`fl.search_rounds`);
3. *tune*: from the float weights again, or from the search's, under that policy, with bin
   regularization and the float model for a teacher (:mod:`fl.tune_rounds`). Clients with a budget
   of their own have a policy of their own.

What a client kept in the float phase (a head, its normalisation, a personal model) it starts the
other two from; what a method's client or server noted beside begins anew with each phase.

With ``folder=`` each phase has a folder of its own there, and a run that was killed goes on in the
phase and round where it was: phases that are done are read, not run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fl.bits import (
    ClientBudget,
    FederatedBits,
    Limit,
    PersonalModel,
    PhasesConfig,
    budget_of,
)
from fl.config import FederationConfig
from fl.method import ClientData, Method
from fl.method import method as method_of
from fl.opening import Opening
from fl.personal_bits import PersonalProblem, check_personal
from fl.phase_settings import PhaseSettings
from fl.quant_rounds import TOLD_BYTES, QuantRounds
from fl.record import Failure, Tensors
from fl.rounds import Listener, listed
from fl.run import Federated, Run, Watcher
from fl.search_rounds import GROUP, SearchRounds, last_sent
from fl.setting import Setting
from fl.sites import Here, Sites
from fl.tune_rounds import TuneRounds
from sdq import plugins
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


def learning(
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
    normalization: Normalization | None = None,
    augment: Augmentation | None = None,
    head: str | None = None,
    test: Sequence[ImageSet] | None = None,
    val: Sequence[ImageSet] | None = None,
    **others: Any,
) -> "Learning":
    """Return a federation of clients in this process that learns bits.

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
        normalization: as of :func:`fl.run.run`, as are the next.
        augment: of training images, or None.
        head: path of the network's head.
        test: what generalization is measured on.
        val: likewise, for the selection of a round.
        others: ``folder``, ``watch`` and ``hear``, as of :func:`fl.run.run`; a summary that is
            watched names its ``phase``.

    Raises:
        RequestError: there are no clients, or one has no masks.
    """
    chosen = method_of(method) if isinstance(method, str) else method
    here = Here(clients, chosen)
    settings = PhaseSettings(
        model=model, quant=quant, budget=budget, policy=policy, method=chosen,
        num_classes=num_classes, image_shape=here.clients[0].train.images.shape[1:],
        config=config or FederationConfig(), rounds=rounds, phases=phases or PhasesConfig(),
        normalization=normalization, augment=augment, head=head,
    )  # fmt: skip
    return Learning(
        settings, here, dict(personal or {}),
        [c.test for c in here.clients] if test is None else test,
        [c.val for c in here.clients] if val is None else val,
        **others,
    )  # fmt: skip


@dataclass
class Learning:
    """All phases of one federation, wherever its clients are.

    Args:
        settings: that all share.
        sites: of the clients.
        personal: budgets of clients that have their own, by number.
        test: what generalization is measured on; empty: the server has no images.
        val: likewise, for the selection of a round.
        folder: where each phase has a folder for its state; None: nothing is written.
        watch: called with each round's summary, which names its ``phase``.
        hear: called with each client's answer, and what it was asked.
    """

    settings: PhaseSettings
    sites: Sites
    personal: Mapping[int, ClientBudget] = field(default_factory=dict)
    test: Sequence[ImageSet | None] = ()
    val: Sequence[ImageSet | None] = ()
    folder: Path | None = None
    watch: Watcher | None = None
    hear: Listener | None = None

    def __post_init__(self) -> None:
        self.done: dict[str, Run] = {}
        self.results: dict[str, Federated] = {}
        self.course: list[dict[str, Any]] = []

    # --- what can be told before anything is trained

    def check(self) -> dict[str, Setting]:
        """Return the settings of the phases as far as they are known before a round is run.

        Raises:
            RequestError: something is wrong with the request.
        """
        settings = self.settings
        budget, phases = settings.budget, settings.phases
        if (budget is None) == (settings.policy is None):
            got = "neither" if budget is None else "both"
            raise RequestError(f"fl.run: must have a budget or a policy, got {got}; give one")
        check_personal(self.personal, self.sites.number, settings.policy, phases)
        quantized = settings.quantized(settings.model)
        space = settings.space(quantized)
        if budget is not None:
            check_search(quantized, budget_of(budget, space), phases.search, phases.search_method)
        for client, asked in self.personal.items():
            PersonalProblem.of(client, asked, space).check()
        return self._settings(quantized.policy, searches=settings.learns and bool(space.units))

    def _settings(self, widest: BitwidthPolicy, *, searches: bool) -> dict[str, Setting]:
        settings, found = self.settings, {}
        if settings.rounds != 0:
            found["float"] = settings.setting(Opening("float"))
            if settings.quant.batch_norm == "fold" and found["float"].names(down=False):
                raise RequestError(
                    "quant.batch_norm: must not be fold where clients keep tensors of their own, "
                    f"as with {settings.method.name}; use freeze or train"
                )
        if searches:
            if settings.quant.batch_norm == "fold" and settings.phases.tune_from == "search":
                raise RequestError(
                    "quant.batch_norm: must not be fold where tuning starts from the search's "
                    "weights, which have it folded in; use freeze or train, or tune from float"
                )
            found["search"] = settings.setting(Opening("search", settings.first))
        policy = widest if settings.policy is None else settings.policy
        start = settings.first if searches and settings.phases.tune_from == "search" else {}
        own = dict.fromkeys(self.personal, policy)
        opening = Opening("tune", settings.first, policy, own, start)
        return found | {"tune": settings.setting(opening)}

    # --- the phases

    def go(self) -> FederatedBits:
        """Run what is left of them."""
        self.check()
        network = self._float()
        policy, own = self._policies(network)
        tune = self._run(Opening("tune", network, policy, own, self._searched(network)))
        done = self.results["tune"]
        parts = self.results.values()
        return FederatedBits(
            **{
                **vars(done),
                "bytes_up": sum(r.bytes_up for r in parts) + self._introductions(),
                "bytes_down": sum(r.bytes_down for r in parts) + self.sites.opened_bytes,
            },
            policy=policy, quant=self.settings.quant, float_state=network, phases=self.results,
            course=self.course, personal=self._personal_models(tune, own),
        )  # fmt: skip

    def _float(self) -> Tensors:
        """Return the state of the float network, trained."""
        if self.settings.rounds != 0:
            self._run(Opening("float"))
            return self.results["float"].state
        return self.settings.first

    def _policies(self, network: Tensors) -> tuple[BitwidthPolicy, dict[int, BitwidthPolicy]]:
        """Return the policy of all, and those of clients that have their own."""
        settings = self.settings
        if settings.policy is not None:
            return settings.policy, {}
        assert settings.budget is not None
        quantized = settings.quantized(settings.network(network))
        space = settings.space(quantized)
        if not space.units:
            return quantized.policy, dict.fromkeys(self.personal, quantized.policy)
        constraints = budget_of(settings.budget, space).constraints(space)
        problems = {k: PersonalProblem.of(k, asked, space) for k, asked in self.personal.items()}
        if not settings.learns:
            return self._chosen(quantized, space, constraints), {
                client: self._chosen(quantized, problem.space, problem.constraints)
                for client, problem in problems.items()
            }
        ended = self._run(Opening("search", network))
        method, memory = ended.setting.method, ended.rounds.server.memory
        assert isinstance(method, SearchRounds)
        self.course = memory.values[GROUP]
        utilities = method.utilities_of(memory.tensors[GROUP])
        found = {}
        for client, problem in problems.items():
            theirs = memory.tensors.get(last_sent(client)) if self._by_own_bits else None
            row = utilities if theirs is None else method.utilities_of(theirs)
            found[client] = problem.policy_of(row, space)
        return space.policy_of(project(utilities, constraints)), found

    def _searched(self, network: Tensors) -> Tensors:
        """Return the float model with the search's weights, if tuning starts from them."""
        if self.settings.phases.tune_from == "float" or "search" not in self.results:
            return {}
        state = self.results["search"].state
        return {name: state[f"net.{name}"] for name in network}

    @property
    def _by_own_bits(self) -> bool:
        return self.settings.phases.personal_bits == "own"

    def _chosen(
        self, quantized: QuantModel, space: SearchSpace, constraints: list[Constraint]
    ) -> BitwidthPolicy:
        """Return a policy that needs no data."""
        phases = self.settings.phases
        problem = SearchProblem(quantized, [], space, constraints, phases.search)
        method = plugins.load("sdq.search_methods", phases.search_method)
        return space.policy_of(method.choose(problem))

    def _personal_models(
        self, ended: Run, own: Mapping[int, BitwidthPolicy]
    ) -> dict[int, PersonalModel]:
        """Return clients' own models: each trains on the final one for a round more."""
        everyone = self.settings.config.keep_clients
        clients = range(self.sites.number) if everyone else sorted(own)
        method, found, failures = ended.setting.method, {}, []
        assert isinstance(method, TuneRounds)
        for model in self.sites.own_models(ended.rounds, clients) if clients else []:
            if isinstance(model, Failure):
                failures.append(model)
                continue
            policy = method.policy_of(model.client)
            found[model.client] = PersonalModel(policy, model.state, model.evaluation)
        if failures and self.watch is not None:
            self.watch({"phase": "tune", "own": listed(failures)})
        return found

    # --- parts

    def _run(self, opening: Opening) -> Run:
        phase = opening.phase
        setting = self.settings.setting(opening)
        if isinstance(setting.method, SearchRounds) and self._by_own_bits:
            setting.method.remembered = frozenset(self.personal)
        folder = None if self.folder is None else self.folder / phase
        watch = self.watch
        going = Run(
            setting, self.sites.open(opening, setting, folder), self.sites.number,
            self.sites.known, () if phase == "search" else self.test,
            () if phase == "search" else self.val, folder,
            None if watch is None else lambda summary: watch({"phase": phase, **summary}),
            self.hear,
        )  # fmt: skip
        self.results[phase] = going.go()
        self.done[phase] = going
        return going

    def _introductions(self) -> int:
        """Return the bytes of the scales that clients told."""
        total = 0
        for going in self.done.values():
            if isinstance(going.setting.method, QuantRounds):
                total += going.rounds.server.memory.values.get(TOLD_BYTES, 0)
        return total
