r"""BalanceFL: a client trains as if it had every class, in equal numbers.

Batches are drawn with equal chances for the classes that the client has, and the loss is over these
classes alone. What the received model says of the absent ones is kept:

.. math:: L = \ell(z_{present}, y) + \lambda\, T^2\, KL(q^{glob} \Vert q)

with q the probabilities, at temperature T, of each absent class and of all present ones together.

Source: Shuai et al., "BalanceFL: Addressing Class Imbalance in Long-Tail Federated Learning",
IPSN 2022, https://doi.org/10.1109/IPSN54338.2022.00029: balanced sampling and knowledge
inheritance. The released code distils the absent logits among themselves, which says nothing where
one class is absent; its augmentation of features is left out.
"""

import math
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from fl.method import Client, Method
from fl.network import Outputs
from sdq.batches import Loader
from sdq.config import Config


class BalanceFLConfig(Config):
    """Hyper-parameters.

    Args:
        weight: lambda, of what is inherited.
        temperature: T.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0


def inheritance(logits: Tensor, received: Tensor, absent: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence of logits ``(N, C)``; ``absent`` is bool ``(C,)``, not all."""

    def log_q(z: Tensor) -> Tensor:
        log_p = (z / temperature).log_softmax(1)
        present = log_p[:, ~absent].logsumexp(1, keepdim=True)
        return torch.cat([log_p[:, absent], present], dim=1)

    q, student = log_q(received.detach()), log_q(logits)
    return temperature**2 * (q.exp() * (q - student)).sum(1).mean()


class BalanceFLClient(Client):
    """Training on balanced batches, with the received model beside."""

    def start(self) -> None:
        """Set the received model aside."""
        network = self.context.network
        self.absent = (self.context.own_counts == 0).to(next(network.parameters()).device)
        self.received: nn.Module | None = None
        if bool(self.absent.any()) and self.method.config.weight > 0:
            self.received = network.frozen_copy()

    def batches(self, epoch: int) -> Loader:
        """Return as many images as there are, drawn anew."""
        return self.context.batches(epoch, sampling="balanced")

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the criterion over present classes, and what is inherited."""
        present = outputs.logits.masked_fill(self.absent, -math.inf)
        loss = self.context.criterion(present, labels)
        if self.received is None:
            return loss
        with torch.no_grad():
            received = self.received(outputs.images)
        config = self.method.config
        term = inheritance(outputs.logits, received, self.absent, config.temperature)
        return loss + config.weight * term


class BalanceFL(Method):
    """FedAvg with another client."""

    config_type = BalanceFLConfig
    client_type = BalanceFLClient
    tasks = ("classification",)
