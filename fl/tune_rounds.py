r"""Rounds under fixed bits: one policy for all, or a client's own.

What travels are the float master weights, whatever bits a client has; each client quantizes them at
its own in every forward pass, and the server averages masters as the method does. A scale belongs
to a bitwidth: the server keeps one set for each bitwidth that someone has at a layer,

.. math:: \log s_{l,b} \leftarrow \sum_{k:\, b_k(l) = b} \frac{w_k}{W} \log s_{l,k}

over the clients k with b bits at layer l, and each client gets those of its own bits; the others'
scales stay. To the loss comes the entropy-aware bin regularization of SDQ, equation 10, once the
bins have settled.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fl.method import Aggregated, Method, Server, Side, View
from fl.network import Network, Outputs
from fl.quant_network import (
    by_bits,
    distinct_acts,
    quant_models,
    set_bits_,
    set_head_bits_,
)
from fl.quant_rounds import QuantClient, QuantRounds, QuantRoundsConfig
from fl.record import Reply, Tensors
from sdq.config import BinReduction, Config, TrainConfig
from sdq.finetune import FineTuning
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel

GROUP = "scales"


class TuneRoundsConfig(QuantRoundsConfig):
    """What server and clients agree on while weights are tuned.

    Args:
        bin_weight: lambda_E of bin regularization.
        bin_warmup: share of the rounds before it acts.
        bin_reduction: over a layer's bins; see :class:`sdq.config.TrainConfig`.
        policy: of the server's model, as JSON text.
        personal: of clients that have their own, by number.
    """

    bin_weight: Annotated[float, Field(ge=0)] = 0.1
    bin_warmup: Annotated[float, Field(ge=0, le=1)] = 0.25
    bin_reduction: BinReduction = "mean"
    policy: str = ""
    personal: dict[str, str] = {}  # noqa: RUF012 - pydantic copies defaults


class TuneClient(QuantClient):
    """The inner client under its own bits."""

    method: "TuneRounds"

    def start(self) -> None:
        """Take the client's bits; its scales have come with the weights."""
        context, config = self.context, self.method.config
        self.method.set_bits_(context.network, context.client)
        late = context.round >= config.bin_warmup * context.config.rounds
        self.bins: list[FineTuning] = []
        if late and config.bin_weight:
            tuning = TrainConfig(bin_weight=config.bin_weight, bin_reduction=config.bin_reduction)
            self.bins = [FineTuning(q, tuning) for q in quant_models(context.network).values()]
        super().start()

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the mixed loss and the bin regularization."""
        loss = super().loss(outputs, labels)
        for tuning in self.bins:
            loss = loss + tuning.config.bin_weight * tuning.bin_loss()
        return loss


class TuneRounds(QuantRounds):
    """The tuning around a method.

    Args:
        config: of the phase.
        inner: the method.
        model: the float network.
        policy: of the server's model.
        personal: of clients that have their own.
    """

    config_type: ClassVar[type[Config]] = TuneRoundsConfig
    client_type = TuneClient

    def __init__(
        self,
        config: TuneRoundsConfig,
        inner: Method,
        model: nn.Module,
        policy: BitwidthPolicy,
        personal: Mapping[int, BitwidthPolicy],
    ) -> None:
        super().__init__(config, inner, model)
        self.policy, self.own = policy, dict(personal)

    def policy_of(self, client: int) -> BitwidthPolicy:
        """Return a client's policy."""
        return self.own.get(client, self.policy)

    def message_bits(self, network: Network, client: int) -> dict[str, int]:
        """Return the bits of the weights that the client shares."""
        policy = self._shared_policy(network, client)
        return {f"model.net.{b.name}.weight": b.weight_bits for b in policy if b.searched}

    def set_bits_(self, network: Network, client: int | None) -> None:
        """Give the network a client's bits, or the server's.

        A personal model that stands beside the shared one has the client's; the shared one, which
        travels, then has everyone's.
        """
        if not self.own:
            return
        own = self.policy if client is None else self.policy_of(client)
        models = quant_models(network)
        for path, qmodel in models.items():
            set_bits_(qmodel, self.policy if path == "model" and len(models) > 1 else own)
        set_head_bits_(network, own)

    def views(self, side: Side) -> dict[str, View]:
        """Return the inner views; the server's have the server's bits."""
        found = super().views(side)
        if side == "client" or not self.own:
            return found

        def at_own_bits(view: View) -> View:
            def predict(network: Network, images: Tensor) -> Tensor:
                self.set_bits_(network, None)
                return view(network, images)

            return predict

        return {name: at_own_bits(view) for name, view in found.items()}

    def widths(self) -> dict[str, tuple[int, ...]]:
        """Return the bits that some policy gives each activation."""
        assert self.template is not None
        found = {path: {int(q.bits)} for path, q in distinct_acts(self.template).items()}  # type: ignore[arg-type]
        for path, readers in self.template.searched_acts().items():
            found[path] |= {p[readers[0]].act_bits for p in self.own.values()}
        return {path: tuple(sorted(bits)) for path, bits in found.items()}

    # --- server

    def start_server(self, server: Server) -> None:
        """Prepare a set of scales for each bitwidth that someone has."""
        super().start_server(server)
        if self.own:
            server.memory.tensors[GROUP] = self._first_scales(server)
        self.set_bits_(server.network, None)

    def _first_scales(self, server: Server) -> Tensors:
        """Return scales that fit the first weights, and the merged ones of activations."""
        network, merged = server.network, self._merged(server)
        qmodel = network.model
        assert isinstance(qmodel, QuantModel)
        found: Tensors = {}
        for policy in (self.policy, *self.own.values()):
            set_bits_(qmodel, policy)
            for bits in policy:
                if bits.searched:
                    quantizer = qmodel.new_weight_quantizer(bits.name, bits.weight_bits)
                    path = f"model.net.{bits.name}.weight_quant.tensor_quant"
                    for name in ("base", "gain"):
                        value = getattr(quantizer, name).detach().cpu().clone()
                        found[f"{bits.weight_bits}@{path}.{name}"] = value
            for path, each in by_bits(qmodel).items():
                for width in each:
                    scale = merged.get(f"{path}@{width}", torch.ones(()))
                    found |= self._act_scale(qmodel, path, width, scale)
        return found

    def _act_scale(self, qmodel: QuantModel, path: str, bits: int, scale: Tensor) -> Tensors:
        """Return an activation's scale by the names of all modules that share it."""
        quantizers = qmodel.act_quantizers()
        found = {}
        for other, quantizer in quantizers.items():
            if quantizer is quantizers[path]:
                name = f"model.net.{other}.act_quant.fused_activation_quant_proxy.tensor_quant"
                found[f"{bits}@{name}.base"] = scale.reshape(())
                found[f"{bits}@{name}.gain"] = torch.ones(())
        return found

    def _widths_of(self, policy: BitwidthPolicy) -> dict[str, int]:
        """Return the bits that a policy gives each scale, by the scale's name without its bits."""
        assert self.template is not None
        found = {}
        for bits in policy:
            if bits.searched:
                found[f"model.net.{bits.name}.weight_quant.tensor_quant"] = bits.weight_bits
        quantizers = self.template.act_quantizers()
        first = {id(quantizers[path]): path for path in distinct_acts(self.template)}
        learned = self.template.searched_acts()
        for path, quantizer in quantizers.items():
            stands = first[id(quantizer)]
            width = policy[learned[stands][0]].act_bits if stands in learned else quantizer.bits
            found[f"model.net.{path}.act_quant.fused_activation_quant_proxy.tensor_quant"] = width
        return found

    def _scales_for(self, server: Server, policy: BitwidthPolicy) -> Tensors:
        """Return the current scales of a policy's bits, by their names in the network."""
        known = server.memory.tensors[GROUP]
        return {
            f"{path}.{name}": known[f"{bits}@{path}.{name}"]
            for path, bits in self._widths_of(policy).items()
            for name in ("base", "gain")
            if server.routes[f"{path}.{name}"].comes_down
        }

    def state_for(self, server: Server, client: int) -> Tensors:
        """Return the inner state with the scales of the client's bits."""
        state = super().state_for(server, client)
        if not self.own:
            return state
        return {**state, **self._scales_for(server, self._shared_policy(server.network, client))}

    def _shared_policy(self, network: Network, client: int) -> BitwidthPolicy:
        """Return the policy of what a client shares."""
        beside = len(quant_models(network)) > 1
        return self.policy if beside else self.policy_of(client)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Average masters as the method does, and scales among those of equal bits."""
        weights = self.weights(server, replies)  # a method may change them when it aggregates
        found = super().aggregate(server, replies)
        if not self.own:
            return found
        known = dict(server.memory.tensors[GROUP])
        groups: dict[tuple[str, int], list[int]] = {}
        for i, reply in enumerate(replies):
            own = self._widths_of(self._shared_policy(server.network, reply.client))
            for path, bits in own.items():
                groups.setdefault((path, bits), []).append(i)
        for (path, bits), members in groups.items():
            if not any(weights[i] for i in members):
                continue
            for name in ("base", "gain"):
                full = f"{path}.{name}"
                if not server.routes[full].goes_up:
                    continue
                states = [{full: replies[i].model[full]} for i in members]
                mean = server.mean(states, [weights[i] for i in members])
                known[f"{bits}@{full}"] = mean[full]
        server.memory.tensors[GROUP] = known
        model = {**found.model, **self._scales_for(server, self.policy)}
        return Aggregated(model, found.clients)


def policies_as_json(policies: Mapping[int, BitwidthPolicy]) -> dict[str, Any]:
    """Return policies by client as a configuration has them."""
    return {str(client): policy.to_json() for client, policy in sorted(policies.items())}
