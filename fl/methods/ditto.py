r"""Ditto: a personal model beside the shared one, held near it.

.. math:: \min_{v_k} L_k(v_k) + \frac\lambda2 \lVert v_k - \bar w \rVert^2

The shared model is FedAvg's. A client predicts with its personal one.

Source: Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021,
algorithm 1, https://arxiv.org/abs/2012.04221. Both models see the same batches.
"""

import copy
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fl.method import Client, Method, Side, View
from fl.network import Network, Outputs
from fl.record import Tensors
from sdq.config import Config

PERSONAL = "personal"


class DittoConfig(Config):
    """Hyper-parameters.

    Args:
        weight: lambda; at 0 the personal model is that of a client alone.
    """

    weight: Annotated[float, Field(ge=0)] = 0.1


class DittoClient(Client):
    """Training of both models."""

    def start(self) -> None:
        """Remember the server's parameters."""
        network = self.context.network
        received = dict(network.model.named_parameters())
        self.personal = {
            n: p
            for n, p in network.extras[PERSONAL].named_parameters()
            # while bits are learned, the two models differ in their quantizers
            if p.requires_grad and n in received
        }
        self.anchor = {n: received[n].detach().clone() for n in self.personal}

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return both models' losses and the proximal term; each has a gradient of its own."""
        network, weight = self.context.network, self.method.config.weight
        own = self.context.criterion(network.extras[PERSONAL](outputs.images), labels)
        loss = super().loss(outputs, labels) + own
        if weight == 0:
            return loss
        squares = [(p - self.anchor[n]).square().sum() for n, p in self.personal.items()]
        return loss + weight / 2 * torch.stack(squares).sum()


class Ditto(Method):
    """FedAvg with a personal model."""

    config_type = DittoConfig
    client_type = DittoClient

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the personal model, which begins as the shared one does."""
        network.extras[PERSONAL] = copy.deepcopy(network.model)

    def views(self, side: Side) -> dict[str, View]:
        """Return a client's personal and shared model; the server has the shared one."""
        shared = super().views(side)
        return {"personal": _personal, **shared} if side == "client" else shared

    def personal(self, network: Network) -> Tensors:
        """Return the copy."""
        return dict(network.extras[PERSONAL].state_dict())


def _personal(network: Network, images: Tensor) -> Tensor:
    logits: Tensor = network.extras[PERSONAL](images)
    return logits
