r"""FCA, federated classifier anchoring: a personal head anchors the federated one.

.. math:: L_k = \lambda_1 \ell(f(\phi(x)), y) + \lambda_2 \ell(h_k(\phi(x)), y)
          + \lambda_3 KL(\mathrm{sg}\,\mathrm{softmax}\,h_k \,\Vert\, \mathrm{softmax}\,f)

with the features :math:`\phi`, the federated head f, the client's own head :math:`h_k`, the
balanced softmax loss for :math:`\ell`, and sg: no gradient. The personal head goes up, for the
server's model alone.

Source: Wicaksana et al., "FCA: Taming Long-tailed Federated Medical Image Classification by
Classifier Anchoring", 2023, https://arxiv.org/abs/2305.00738.
"""

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.config import FederationConfig
from fl.losses import Criterion, LossConfig, criterion
from fl.method import Client, Method, Side, View
from fl.network import Network, Outputs
from fl.record import Tensors
from fl.state import Route
from sdq.config import Config

Consistency = Literal["kl", "code"]
HEAD = "personal_head"

PAPER = FederationConfig(
    rounds=80, batch_size=64, weight_decay=5e-4, lr=1e-3, lr_decay=0.1, lr_decay_rounds=(60, 70)
)
"""The paper's federation."""


class FCAConfig(Config):
    """Hyper-parameters; the defaults are the paper's.

    Args:
        federated_weight: lambda 1.
        personal_weight: lambda 2.
        consistency_weight: lambda 3.
        consistency: ``kl``, or as in the released ``code``, whose third term is no divergence; see
            :func:`consistency`.
        federated_prior: class counts in the federated head's loss: the client's (``local``, as in
            the released code) or everyone's (``global``).
        server_head: which head is the server's: ``federated``, or ``personal``, the mean of the
            personal heads, as in the released code. Both are reported.
        client_head: which head is a client's: ``personal``, or ``federated`` as in the code.
    """

    federated_weight: Annotated[float, Field(ge=0)] = 1.0
    personal_weight: Annotated[float, Field(ge=0)] = 3.0
    consistency_weight: Annotated[float, Field(ge=0)] = 1.0
    consistency: Consistency = "kl"
    federated_prior: Literal["local", "global"] = "local"
    server_head: Literal["federated", "personal"] = "federated"
    client_head: Literal["federated", "personal"] = "personal"


def consistency(federated: Tensor, personal: Tensor, kind: Consistency) -> Tensor:
    r"""Return the anchoring term of logits ``(N, C)``; no gradient flows into ``personal``.

    ``kl`` is :math:`KL(p_2 \Vert p_1)`, mean over the batch. ``code`` is what the released code
    computes: it hands probabilities to a function that takes their logarithms, and means over the
    classes too, which leaves :math:`-\langle p_1, p_2\rangle / C` and a constant.
    """
    p2 = personal.detach().softmax(1)
    if kind == "code":
        return F.kl_div(federated.softmax(1), p2, reduction="none").mean()
    return F.kl_div(federated.log_softmax(1), p2, reduction="batchmean")


class FCAClient(Client):
    """Training of the features and both heads."""

    def start(self) -> None:
        """Choose the prior of the federated head."""
        context, config = self.context, self.method.config
        self.of_everyone: Criterion | None = None
        # the prior of cpa is everyone's in any case, and its weights are a wrapper's
        if config.federated_prior == "global" and context.loss.name != "cpa":
            progress = context.round / context.config.rounds
            counts = context.all_counts
            self.of_everyone = criterion(context.loss, counts, counts, progress)

    @property
    def federated(self) -> Criterion:
        """The federated head's; the client's own may change within a round."""
        return self.of_everyone or self.context.criterion

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the three terms."""
        config = self.method.config
        personal = self.context.network.extras[HEAD](outputs.known_features)
        return (
            config.federated_weight * self.federated(outputs.logits, labels)
            + config.personal_weight * self.context.criterion(personal, labels)
            + config.consistency_weight * consistency(outputs.logits, personal, config.consistency)
        )


class FCA(Method):
    """Two heads on shared features."""

    config_type = FCAConfig
    client_type = FCAClient
    refuses = refusals(noise="personal heads go up, and are no change of what came down")
    tasks = ("classification",)
    loss = LossConfig(name="balanced_softmax")
    needs_head = True

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the personal head, with first weights of its own."""
        network.extras[HEAD] = network.new_head(generator)

    def route(self, name: str, network: Network) -> Route:
        """Share the network; the personal heads go up but not down."""
        return Route.SHARE if name.startswith("model.") else Route.UPLOAD

    def views(self, side: Side) -> dict[str, View]:
        """Return both heads, the one that counts first."""
        views: dict[str, View] = {"federated": _federated, "personal": _personal}
        first = self.config.server_head if side == "server" else self.config.client_head
        return {first: views[first], **views}

    def personal(self, network: Network) -> Tensors:
        """Return the model with the head that counts in place of its own."""
        state = super().personal(network)
        if self.config.client_head == "personal":
            head = network.extras[HEAD].state_dict()
            state |= {f"{network.head_name}.{name}": tensor for name, tensor in head.items()}
        return state


def _federated(network: Network, images: Tensor) -> Tensor:
    return network.outputs(images).logits


def _personal(network: Network, images: Tensor) -> Tensor:
    logits: Tensor = network.extras[HEAD](network.outputs(images).known_features)
    return logits
