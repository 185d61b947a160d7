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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from fl.client import answer
from fl.config import FederationConfig
from fl.method import ClientData, Method
from fl.method import method as method_of
from fl.quant_network import SCALES, float_name, set_act_scales_
from fl.quant_rounds import TEACHER, TOLD_BYTES, Merge, QuantRounds
from fl.record import Record, Reply, Tensors, picked
from fl.rounds import Listener
from fl.run import STATE, Federated, InProcess, Run, Watcher
from fl.search_rounds import GROUP, SearchRounds, SearchRoundsConfig
from fl.setting import Setting
from fl.store import Store
from fl.tune_rounds import TuneRounds, TuneRoundsConfig, policies_as_json
from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.batches import Augmentation, Normalization
from sdq.config import BinReduction, Config, QuantConfig, SearchConfig
from sdq.cost import Budget, Constraint
from sdq.data import ImageSet
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.projection import check_reachable, project
from sdq.quant_model import QuantModel, quantize
from sdq.search import check_search
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace, Unit
from sdq.stochastic import Mixing

Limit = Budget | Callable[[SearchSpace], Budget]
"""A budget, or what makes it for a network, such as a device that is laid out for it."""

SearchMethod = Literal["sdq", "interpolate", "uniform", "random"]
MIXING: dict[str, Mixing] = {"sdq": "draw", "interpolate": "interpolate"}
"""The search methods that learn, and how they mix."""


class PhasesConfig(Config):
    """How a federation learns bits; what its rounds are otherwise is ``FederationConfig``'s.

    Args:
        search_method: ``sdq`` or ``interpolate``, which learn; ``uniform`` or ``random``, which
            need no data and no rounds. Other methods of ``sdq quantize`` need all images at once.
        search_rounds: in which bits are learned.
        tune_rounds: under the policy.
        search: of phase 1; its epochs and ``distill`` do not count here.
        distill: share of the float model's soft labels in the loss, beside the method's own.
        merge: of the clients' activation scales.
        bin_weight: lambda_E of bin regularization.
        bin_warmup: share of the tuning rounds before it acts.
        bin_reduction: over a layer's bins.
        tune_lr_decay: what the learning rate is multiplied with at half and at three quarters of
            the tuning rounds, where the federation's configuration has no decay of its own.
        personal_bits: what the policy of a client with its own budget follows: everyone's bitwidth
            parameters (``global``), or its ``own``, as it last sent them.
    """

    search_method: SearchMethod = "sdq"
    search_rounds: Annotated[int, Field(ge=1)] = 6
    tune_rounds: Annotated[int, Field(ge=1)] = 8
    search: SearchConfig = SearchConfig()
    distill: Annotated[float, Field(ge=0, le=1)] = 0.5
    merge: Merge = "geometric"
    bin_weight: Annotated[float, Field(ge=0)] = 0.1
    bin_warmup: Annotated[float, Field(ge=0, le=1)] = 0.25
    bin_reduction: BinReduction = "mean"
    tune_lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.3
    personal_bits: Literal["global", "own"] = "global"


@dataclass(frozen=True)
class ClientBudget:
    """What one client's network may cost.

    Args:
        limit: on it.
        legal: the weight and activation bitwidths that its device computes with for a unit; None:
            all of the search's.
    """

    limit: Limit
    legal: Callable[[SearchSpace, Unit], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class PersonalModel:
    """A client's own model, after one more round of training on its own images.

    Args:
        policy: its bits.
        state: what a :class:`~sdq.quant_model.QuantModel` under this policy loads.
        evaluation: on the client's own images; see :func:`fl.evaluation.evaluate`.
    """

    policy: BitwidthPolicy
    state: Tensors
    evaluation: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class FederatedBits(Federated):
    """What such a federation gives; ``state`` is the quantized server model's.

    Args:
        policy: the bits of the server's model.
        quant: the configuration it was quantized with.
        float_state: the float model that it was tuned from, and by.
        phases: the result of each, by name; ``float`` and ``search`` only where they were run.
        course: of the search, a record a round.
        personal: models of clients with a budget of their own, by number; of all clients if the
            federation's configuration says ``keep_clients``.
    """

    policy: BitwidthPolicy
    quant: QuantConfig
    float_state: Tensors
    phases: dict[str, Federated]
    course: list[dict[str, Any]]
    personal: dict[int, PersonalModel]


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
        for client in self.personal:
            if not 0 <= client < len(self.clients):
                raise RequestError(
                    f"fl.run: personal budgets must be of clients 0 to {len(self.clients) - 1}, "
                    f"got {client}; name one of these"
                )
        self._check_personal()
        quantized = self._quantized(self.model)
        space = self._space(quantized)
        if self.budget is not None:
            check_search(
                quantized, _budget(self.budget, space), self.phases.search,
                self.phases.search_method,
            )  # fmt: skip
        for client in self.personal:
            check_reachable(self._personal_problem(client, space)[1])
        found = {}
        if self.rounds != 0:
            config = self._float_config()
            found["float"] = self._setting_of(copy.deepcopy(self.model), self.method, config)
            if self.quant.batch_norm == "fold" and found["float"].names(down=False):
                raise RequestError(
                    "quant.batch_norm: must not be fold where clients keep tensors of their own, "
                    f"as with {self.method.name}; use freeze or train"
                )
        if self._learns:
            method = self._search_method(self.model, quantized)
            found["search"] = self._setting(method, quantized, "search")
        if self.policy is not None:
            apply_policy_(quantized, self.policy)
        tuning = self._tune_method(self.model, quantized.policy, {})
        return found | {"tune": self._setting(tuning, quantized, "tune")}

    def _check_personal(self) -> None:
        if self.personal and self.policy is not None:
            raise RequestError(
                "fl.run: a client's own bits must follow from bits that are learned, got a policy; "
                "give a budget instead"
            )
        if self.personal and self.phases.search.granularity == "channel":
            raise RequestError(
                "fl.run: clients with bits of their own must have one bitwidth a layer, got "
                "granularity channel; use layer or block"
            )
        if self.personal and self.phases.search_method == "random":
            raise RequestError(
                "fl.run: a client's own bits must follow from bits that are learned, got random "
                "ones; use sdq, interpolate or uniform"
            )

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
        setting = self._setting_of(network, self.method, self._float_config())
        self._run(setting, "float", self.clients)
        network = copy.deepcopy(self.model)
        network.load_state_dict(self.results["float"].state)
        return network

    def _float_config(self) -> FederationConfig:
        rounds = self.config.rounds if self.rounds is None else self.rounds
        return self.config.replaced(rounds=rounds, keep_clients=False)

    def _policies(self, network: nn.Module) -> tuple[BitwidthPolicy, dict[int, BitwidthPolicy]]:
        """Return the policy of all, and those of clients that have their own."""
        if self.policy is not None:
            return self.policy, {}
        assert self.budget is not None
        quantized = self._quantized(network)
        space = self._space(quantized)
        budget = _budget(self.budget, space)
        if not space.units:
            return quantized.policy, {}
        if not self._learns:
            own = {client: self._personal_problem(client, space) for client in self.personal}
            return self._chosen(quantized, space, budget.constraints(space)), {
                client: self._chosen(quantized, reduced, constraints)
                for client, (reduced, constraints, _) in own.items()
            }
        method = self._search_method(network, quantized)
        setting = self._setting(method, quantized, "search")
        # nothing is chosen by what the network is worth while its bits are drawn
        trained = [replace(c, val=None, test=None, pooled=()) for c in self.clients]
        ended = self._run(setting, "search", trained)
        self.course = ended.rounds.server.memory.values[GROUP]
        utilities = method.utilities_of(ended.rounds.server.memory.tensors[GROUP])
        policy = space.policy_of(project(utilities, budget.constraints(space)))
        return policy, {
            client: self._projected(client, space, self._utilities_of(client, ended, utilities))
            for client in self.personal
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
        quantized = self._quantized(network)
        apply_policy_(quantized, policy)
        method = self._tune_method(network, policy, own)
        setting = self._setting(method, quantized, "tune")
        return self._run(setting, "tune", self.clients)

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

    def _setting_of(self, model: nn.Module, method: Method, config: FederationConfig) -> Setting:
        quantized = isinstance(model, QuantModel) and self.head is not None
        return Setting.of(
            model, method, config, num_classes=self.num_classes,
            image_shape=self.clients[0].train.images.shape[1:], normalization=self.normalization,
            augment=self.augment, head=f"net.{self.head}" if quantized else self.head,
        )  # fmt: skip

    def _setting(self, method: QuantRounds, quantized: QuantModel, phase: str) -> Setting:
        """Return the setting of a quantized phase."""
        config, phases = self.config, self.phases
        rounds = phases.search_rounds if phase == "search" else phases.tune_rounds
        changes: dict[str, Any] = {
            "rounds": rounds, "geometric": (*config.geometric, *SCALES), "keep_clients": False,
        }  # fmt: skip
        if phase == "search":
            changes |= {"evaluate_every": rounds, "select": "last", "evaluate_absent": False}
        elif not config.lr_decay_rounds and config.lr_decay_every is None:
            at = (-(-rounds // 2), -(-3 * rounds // 4))
            changes |= {"lr_decay": phases.tune_lr_decay, "lr_decay_rounds": at}
        model = copy.deepcopy(quantized)
        set_act_scales_(model, {})  # until the clients tell theirs
        return self._setting_of(model, method, config.replaced(**changes))

    def _common(self) -> dict[str, Any]:
        inner = self.method.config.model_dump(mode="json")
        return {
            "around": self.method.name, "inner": inner, "quant": self.quant,
            "distill": self.phases.distill, "merge": self.phases.merge,
        }  # fmt: skip

    def _search_method(self, network: nn.Module, quantized: QuantModel) -> SearchRounds:
        assert self.budget is not None
        space = self._space(quantized)
        constraints = _budget(self.budget, space).constraints(space)
        config = SearchRoundsConfig(
            **self._common(), search=self.phases.search, mixing=MIXING[self.phases.search_method],
            limits={c.name: c.limit for c in constraints},
        )  # fmt: skip
        return SearchRounds(config, copy.deepcopy(self.method), network, space, constraints)

    def _tune_method(
        self, network: nn.Module, policy: BitwidthPolicy, own: dict[int, BitwidthPolicy]
    ) -> TuneRounds:
        config = TuneRoundsConfig(
            **self._common(), policy=policy.to_json(), personal=policies_as_json(own),
            bin_weight=self.phases.bin_weight, bin_warmup=self.phases.bin_warmup,
            bin_reduction=self.phases.bin_reduction,
        )  # fmt: skip
        return TuneRounds(config, copy.deepcopy(self.method), network, policy, own)

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

    def _quantized(self, network: nn.Module) -> QuantModel:
        device = next(network.parameters()).device
        sample = torch.zeros(1, *self.clients[0].train.images.shape[1:], device=device)
        return quantize(network, self.quant, sample=sample)

    def _space(self, quantized: QuantModel) -> SearchSpace:
        return SearchSpace.of(quantized, self.phases.search.granularity)

    def _personal_problem(
        self, client: int, space: SearchSpace, utilities: list[list[float]] | None = None
    ) -> tuple[SearchSpace, list[Constraint], list[list[float]]]:
        """Return a client's space, with what its device computes with, constraints, utilities."""
        asked = self.personal[client]
        rows = utilities or [[0.0] * len(unit.choices) for unit in space.units]
        units, reduced = [], []
        for unit, row in zip(space.units, rows, strict=True):
            legal = unit.choices if asked.legal is None else asked.legal(space, unit)
            if not legal:
                raise RequestError(
                    f"client {client}: unit {unit.name} must have bits that its device computes "
                    f"with, got none of {unit.choices}; offer others"
                )
            units.append(replace(unit, choices=legal))
            reduced.append([u for u, b in zip(row, unit.choices, strict=True) if b in legal])
        own = replace(space, units=tuple(units))
        return own, _budget(asked.limit, own).constraints(own), reduced

    def _projected(
        self, client: int, space: SearchSpace, utilities: list[list[float]]
    ) -> BitwidthPolicy:
        own, constraints, rows = self._personal_problem(client, space, utilities)
        return own.policy_of(project(rows, constraints))


def _budget(limit: Limit, space: SearchSpace) -> Budget:
    return limit if isinstance(limit, Budget) else limit(space)


def _store(ended: Run) -> Store:
    transport = ended.rounds.transport
    assert isinstance(transport, InProcess)
    return transport.store
