"""What all phases of a federation share, and from it the setting of each one's rounds."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fl.bits import MIXING, Limit, PhasesConfig, budget_of
from fl.config import FederationConfig
from fl.method import Method
from fl.opening import Opening
from fl.quant_network import SCALES, set_act_scales_
from fl.quant_rounds import QuantRounds
from fl.record import Tensors, picked
from fl.search_rounds import SearchRounds, SearchRoundsConfig
from fl.setting import Setting
from fl.tune_rounds import TuneRounds, TuneRoundsConfig, policies_as_json
from sdq.apply_policy import apply_policy_
from sdq.batches import Augmentation, Normalization
from sdq.config import QuantConfig
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize
from sdq.search_space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """What server and clients of a federation that learns bits have in common.

    Args:
        model: with the first weights; left as it is.
        quant: how it is quantized.
        budget: what the policy of all may cost.
        policy: instead of a budget and a search.
        method: of every phase.
        num_classes: of the task.
        image_shape: (C, H, W).
        config: of the float phase, and of the others but for what their phase decides.
        rounds: of the float phase, instead of the configuration's; 0: the model is trained.
        phases: everything else.
        normalization: see :meth:`fl.setting.Setting.of`, as are the others.
        augment: of training images, or None.
        head: path of the network's head, or None to find it.
    """

    model: nn.Module
    quant: QuantConfig
    budget: Limit | None = None
    policy: BitwidthPolicy | None = None
    method: Method
    num_classes: int
    image_shape: tuple[int, int, int]
    config: FederationConfig = field(default_factory=FederationConfig)
    rounds: int | None = None
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    normalization: Normalization | None = None
    augment: Augmentation | None = None
    head: str | None = None

    @property
    def first(self) -> Tensors:
        """Return a copy of the first weights."""
        state = self.model.state_dict()
        return picked(state, state)

    @property
    def learns(self) -> bool:
        """Whether there are rounds in which bits are learned."""
        return self.policy is None and self.phases.search_method in MIXING

    def setting(self, opening: Opening) -> Setting:
        """Return the setting of a phase.

        Raises:
            RequestError: see :meth:`fl.setting.Setting.of`; or the policy does not fit the network.
        """
        network = self.network(opening.network)
        if opening.phase == "float":
            return self._float_phase(network)
        quantized = self.quantized(self.network(opening.start) if opening.start else network)
        if opening.phase == "search":
            setting = self._search_phase(network, quantized)
        else:
            assert opening.policy is not None
            apply_policy_(quantized, opening.policy)
            setting = self._tune_phase(network, quantized, opening.policy, opening.own)
        assert isinstance(setting.method, QuantRounds)
        setting.method.begins = opening.models
        return setting

    def identity(self) -> dict[str, Any]:
        """Return what server and clients must agree on beside each phase, as JSON has it."""
        limits = None
        if self.budget is not None:
            space = self.space(self.quantized(self.model))
            limits = {c.name: c.limit for c in budget_of(self.budget, space).constraints(space)}
        return {
            "quant": self.quant.model_dump(mode="json"),
            "budget": limits,
            "policy": None if self.policy is None else self.policy.to_json(),
            "phases": self.phases.model_dump(mode="json"),
        }

    def network(self, state: Tensors) -> nn.Module:
        """Return the float network with this state, or with the first weights if it is empty."""
        network = copy.deepcopy(self.model)
        if state:
            network.load_state_dict(state)
        return network

    def tuned(self, network: Tensors, policy: BitwidthPolicy, state: Tensors) -> QuantModel:
        """Return a quantized model on the CPU.

        Args:
            network: the float model's state.
            policy: its bits.
            state: what it learned under them.
        """
        qmodel = self.quantized(self.network(network).cpu())
        apply_policy_(qmodel, policy)
        qmodel.load_state_dict(state)
        return qmodel

    def quantized(self, network: nn.Module) -> QuantModel:
        """Return a float network quantized."""
        sample = torch.zeros(1, *self.image_shape, device=next(network.parameters()).device)
        return quantize(network, self.quant, sample=sample)

    def space(self, quantized: QuantModel) -> SearchSpace:
        """Return what is decided."""
        return SearchSpace.of(quantized, self.phases.search.granularity)

    def _float_phase(self, network: nn.Module) -> Setting:
        rounds = self.config.rounds if self.rounds is None else self.rounds
        compress = self.config.compress
        if compress is not None:
            compress = compress.replaced(policy_bits=False)  # there is none yet
        config = self.config.replaced(rounds=rounds, keep_clients=False, compress=compress)
        return self._setting(network, copy.deepcopy(self.method), config, self.head)

    def _search_phase(self, network: nn.Module, quantized: QuantModel) -> Setting:
        assert self.budget is not None
        space = self.space(quantized)
        constraints = budget_of(self.budget, space).constraints(space)
        config = SearchRoundsConfig(
            **self._common(), search=self.phases.search, mixing=MIXING[self.phases.search_method],
            limits={c.name: c.limit for c in constraints},
        )  # fmt: skip
        method = SearchRounds(config, copy.deepcopy(self.method), network, space, constraints)
        rounds = self.phases.search_rounds
        return self._quantized_phase(
            method, quantized, rounds=rounds, evaluate_every=rounds, select="last",
            evaluate_absent=False,
        )  # fmt: skip

    def _tune_phase(
        self, network: nn.Module, quantized: QuantModel, policy: BitwidthPolicy,
        own: Mapping[int, BitwidthPolicy],
    ) -> Setting:  # fmt: skip
        config = TuneRoundsConfig(
            **self._common(), policy=policy.to_json(), personal=policies_as_json(own),
            bin_weight=self.phases.bin_weight, bin_warmup=self.phases.bin_warmup,
            bin_reduction=self.phases.bin_reduction,
        )  # fmt: skip
        method = TuneRounds(config, copy.deepcopy(self.method), network, policy, own)
        rounds = self.phases.tune_rounds
        at = (-(-rounds // 2), -(-3 * rounds // 4))
        return self._quantized_phase(
            method, quantized, rounds=rounds, lr_decay=self.phases.tune_lr_decay, lr_decay_rounds=at
        )

    def _quantized_phase(
        self, method: QuantRounds, quantized: QuantModel, **changes: Any
    ) -> Setting:
        # rounds at which the learning rate falls are counted in the float phase
        ours = {"keep_clients": False, "lr_decay_rounds": (), "lr_decay_every": None}
        geometric = (*self.config.geometric, *SCALES)
        config = self.config.replaced(**{"geometric": geometric, **ours, **changes})
        model = copy.deepcopy(quantized)
        set_act_scales_(model, {})  # until the clients tell theirs
        head = self.head if self.head is None else f"net.{self.head}"
        return self._setting(model, method, config, head)

    def _setting(
        self, model: nn.Module, method: Method, config: FederationConfig, head: str | None
    ) -> Setting:
        return Setting.of(
            model, method, config, num_classes=self.num_classes, image_shape=self.image_shape,
            normalization=self.normalization, augment=self.augment, head=head,
        )  # fmt: skip

    def _common(self) -> dict[str, Any]:
        inner = self.method.config.model_dump(mode="json")
        return {
            "around": self.method.name, "inner": inner, "quant": self.quant,
            "distill": self.phases.distill, "merge": self.phases.merge,
        }  # fmt: skip
