r"""SCAFFOLD: control variates take the difference between clients out of every step.

.. math:: g \leftarrow g - c_k + c

With ``control="steps"`` (option II), after S steps with learning rate :math:`\eta`,
:math:`c_k^+ = c_k - c + (\bar w - w_k) / (S \eta)`; with ``"gradient"`` (option I) the gradient of
the client's loss at :math:`\bar w`. The server adds :math:`\frac{1}{N}\sum_k (c_k^+ - c_k)` to c.
A client takes up :math:`c_k^+` when it hears that the server did: after a reply that was lost, c
would for good not be the mean of the :math:`c_k` any more, and all would converge elsewhere.

Source: Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning",
ICML 2020, algorithm 1, https://arxiv.org/abs/1910.06378.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from fl.composition import refusals
from fl.config import FederationConfig
from fl.method import Aggregated, Client, Method, Progress, Server
from fl.record import Record, Reply, Tensors, misfit
from sdq.batches import balanced_indices
from sdq.config import Config
from sdq.errors import RequestError

GROUP = "scaffold"
PENDING = "scaffold.pending"
"""A client's control variate of which it does not know yet whether the server has it."""
TRAINED = "scaffold_round"
ACCEPTED = "accepted"
"""The last round in which the server took a client's reply; -1: none."""


class ScaffoldConfig(Config):
    """Hyper-parameters.

    Args:
        control: how a client's control variate is renewed. ``steps`` is exact for plain SGD alone;
            None takes it there, and ``gradient``, which costs one more pass, for any other
            optimizer.
        weighting: of the clients' models: ``uniform``, as in the paper, or by ``examples``.
        server_lr: of the server's step.
    """

    control: Literal["steps", "gradient"] | None = None
    weighting: Literal["uniform", "examples"] = "uniform"
    server_lr: Annotated[float, Field(gt=0)] = 1.0


def _control(config: ScaffoldConfig, federation: FederationConfig) -> str:
    plain = federation.optimizer == "sgd" and federation.momentum == 0
    return config.control or ("steps" if plain else "gradient")


class ScaffoldClient(Client):
    """Training with corrected gradients."""

    def start(self) -> None:
        """Read both control variates, zero in the first round, and remember the server's model."""
        self.shared = self.context.shared_parameters()
        self.anchor = {n: p.detach().clone() for n, p in self.shared.items()}
        self.common = self._on_device(self.context.received.tensors.get(GROUP, {}))
        memory, accepted = self.context.memory, self.context.received.values.get(ACCEPTED, -1)
        known = PENDING if memory.values.get(TRAINED) == accepted else GROUP
        self.own = self._on_device(memory.tensors.get(known, {}))
        self.correction = {n: self.common[n] - self.own[n] for n in self.shared}
        self.renewed: Tensors = {}
        if _control(self.method.config, self.context.config) == "gradient":
            self.renewed = self._gradient()

    def _on_device(self, tensors: Tensors) -> Tensors:
        return {
            n: tensors[n].to(p.device) if n in tensors else torch.zeros_like(p)
            for n, p in self.shared.items()
        }

    def _gradient(self) -> Tensors:
        """Return the mean gradient over what it trains on, statistics as they are."""
        total = {n: torch.zeros_like(p) for n, p in self.shared.items()}
        network, context = self.context.network.eval(), self.context
        drawn = None
        if context.config.sampling == "balanced":  # the gradient that steps have on average
            drawn = balanced_indices(
                context.labels, len(context.labels), context.generator("scaffold")
            )
        for images, labels in context.batches(0, augmented=False, indices=drawn):
            device = next(network.parameters()).device
            loss = self.loss(self.forward(images.to(device)), labels.to(device))
            gradients = torch.autograd.grad(loss, list(self.shared.values()), allow_unused=True)
            share = len(labels) / len(self.context.labels)
            for name, gradient in zip(self.shared, gradients, strict=True):
                if gradient is not None:
                    total[name] += share * gradient
        return total

    def correct_gradients_(self) -> None:
        """Add ``c - c_k``."""
        for name, parameter in self.shared.items():
            if parameter.grad is not None:
                parameter.grad += self.correction[name]

    def finish(self, progress: Progress) -> Record:
        """Keep the renewed control variate, and send its change."""
        if not self.renewed:
            scale = 1 / (progress.steps * self.context.lr)
            self.renewed = {
                n: scale * (self.anchor[n] - p.detach()) - self.correction[n]
                for n, p in self.shared.items()
            }
        change = {n: (self.renewed[n] - self.own[n]).cpu() for n in self.shared}
        memory = self.context.memory
        memory.tensors[GROUP] = {n: t.cpu() for n, t in self.own.items()}
        memory.tensors[PENDING] = {n: t.cpu() for n, t in self.renewed.items()}
        memory.values[TRAINED] = self.context.round
        return Record({GROUP: change})


class Scaffold(Method):
    """Control variates on both sides."""

    config_type = ScaffoldConfig
    client_type = ScaffoldClient
    refuses = refusals(noise="control variates leave the client beside the model")

    def check(self, config: FederationConfig) -> None:
        """Refuse ``steps`` with an optimizer for which it is not the mean gradient."""
        plain = config.optimizer == "sgd" and config.momentum == 0
        if self.config.control == "steps" and not plain:
            raise RequestError(
                "scaffold.control: must be 'gradient' unless the optimizer is sgd without "
                f"momentum, got 'steps' with {config.optimizer}; leave it out"
            )

    def start_server(self, server: Server) -> None:
        """Begin with a control variate of zero."""
        # what is trained and comes down is what clients correct
        trained = {n for n, p in server.network.named_parameters() if p.requires_grad}
        server.memory.tensors[GROUP] = {
            n: torch.zeros_like(server.model[n])
            for n in sorted(server.parameter_names() & trained)
            if server.routes[n].comes_down
        }

    def send(self, server: Server, client: int) -> Record:
        """Send the server's control variate, and which of the client's it has."""
        accepted = server.memory.values.get(ACCEPTED, {}).get(str(client), -1)
        return Record({GROUP: server.memory.tensors[GROUP]}, {ACCEPTED: accepted})

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return equal weights, or the images."""
        if self.config.weighting == "uniform":
            return [1.0] * len(replies)
        return super().weights(server, replies)

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Compare with the server's control variate."""
        known, sent = server.memory.tensors[GROUP], reply.record.tensors.get(GROUP, {})
        return misfit({n: sent[n] for n in known.keys() & sent.keys()}, known)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Step towards the mean model, and renew the control variate."""
        mean = super().aggregate(server, replies).model
        trained = server.parameter_names()
        model = {
            n: server.model[n] + self.config.server_lr * (t - server.model[n])
            if n in trained
            else t
            for n, t in mean.items()
        }
        common = server.memory.tensors[GROUP]
        sent = [{n: r.record.tensors[GROUP][n] for n in common} for r in replies]
        change = server.mean(sent, [1.0] * len(replies))
        share = len(replies) / server.num_clients
        server.memory.tensors[GROUP] = {n: c + share * change[n] for n, c in common.items()}
        accepted = {str(r.client): server.round for r in replies}
        server.memory.values[ACCEPTED] = server.memory.values.get(ACCEPTED, {}) | accepted
        return Aggregated(model)
