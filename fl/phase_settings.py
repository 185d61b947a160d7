"""What the rounds of each phase are: the method around the method, and its setting."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fl.bits import MIXING, Limit, PhasesConfig, budget_of
from fl.config import FederationConfig
from fl.method import Method
from fl.quant_network import SCALES, set_act_scales_
from fl.quant_rounds import QuantRounds
from fl.search_rounds import SearchRounds, SearchRoundsConfig
from fl.setting import Setting
from fl.tune_rounds import TuneRounds, TuneRoundsConfig, policies_as_json
from sdq.batches import Augmentation, Normalization
from sdq.config import QuantConfig
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize
from sdq.search_space import SearchSpace


@dataclass(frozen=True, kw_only=True)
class PhaseSettings:
    """What makes the settings of one federation's phases; arguments as of :func:`fl.phases.run`.

    Args:
        image_shape: (C, H, W).
    """

    quant: QuantConfig
    method: Method
    num_classes: int
    image_shape: tuple[int, int, int]
    config: FederationConfig
    rounds: int | None
    phases: PhasesConfig
    normalization: Normalization | None
    augment: Augmentation | None
    head: str | None

    def quantized(self, network: nn.Module) -> QuantModel:
        """Return a float network quantized."""
        sample = torch.zeros(1, *self.image_shape, device=next(network.parameters()).device)
        return quantize(network, self.quant, sample=sample)

    def space(self, quantized: QuantModel) -> SearchSpace:
        """Return what is decided."""
        return SearchSpace.of(quantized, self.phases.search.granularity)

    def float_phase(self, network: nn.Module) -> Setting:
        """Return the setting of the float phase, which trains this very network."""
        rounds = self.config.rounds if self.rounds is None else self.rounds
        compress = self.config.compress
        if compress is not None:
            compress = compress.replaced(policy_bits=False)  # there is none yet
        config = self.config.replaced(rounds=rounds, keep_clients=False, compress=compress)
        return self._setting(network, self.method, config, self.head)

    def search_method(self, network: nn.Module, space: SearchSpace, limit: Limit) -> SearchRounds:
        """Return the method of the search phase.

        Args:
            network: the float one.
            space: what is decided.
            limit: on the policy.
        """
        constraints = budget_of(limit, space).constraints(space)
        config = SearchRoundsConfig(
            **self._common(), search=self.phases.search, mixing=MIXING[self.phases.search_method],
            limits={c.name: c.limit for c in constraints},
        )  # fmt: skip
        return SearchRounds(config, copy.deepcopy(self.method), network, space, constraints)

    def search_phase(self, method: SearchRounds, quantized: QuantModel) -> Setting:
        """Return the setting of the search phase."""
        rounds = self.phases.search_rounds
        return self._quantized_phase(
            method, quantized, rounds=rounds, evaluate_every=rounds, select="last",
            evaluate_absent=False,
        )  # fmt: skip

    def tune_method(
        self, network: nn.Module, policy: BitwidthPolicy, own: Mapping[int, BitwidthPolicy]
    ) -> TuneRounds:
        """Return the method of the tuning phase.

        Args:
            network: the float one.
            policy: of the server's model.
            own: of clients with bits of their own, by number.
        """
        config = TuneRoundsConfig(
            **self._common(), policy=policy.to_json(), personal=policies_as_json(own),
            bin_weight=self.phases.bin_weight, bin_warmup=self.phases.bin_warmup,
            bin_reduction=self.phases.bin_reduction,
        )  # fmt: skip
        return TuneRounds(config, copy.deepcopy(self.method), network, policy, dict(own))

    def tune_phase(self, method: TuneRounds, quantized: QuantModel) -> Setting:
        """Return the setting of the tuning phase."""
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
