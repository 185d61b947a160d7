r"""MOON: features are drawn to those of the received model and away from the client's last ones.

.. math:: L = \ell(w; x, y) - \mu \log \frac{e^{\cos(z, z_{glob})/\tau}}
          {e^{\cos(z, z_{glob})/\tau} + e^{\cos(z, z_{prev})/\tau}}

For a client that never trained the last model is the received one: the term is constant.

Source: Li et al., "Model-Contrastive Federated Learning", CVPR 2021, equations 3 and 4,
https://arxiv.org/abs/2103.16257. The paper's network ends in a projection before the head; a user's
network stays as it is, so that features are what enters its head.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fl.method import Client, Method, Progress
from fl.network import Outputs
from fl.record import Record, picked
from sdq.config import Config

GROUP = "moon"


class MOONConfig(Config):
    """Hyper-parameters.

    Args:
        mu: weight of the term; 0 is FedAvg.
        temperature: tau.
    """

    mu: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 0.5


def contrast(own: Tensor, received: Tensor, last: Tensor, temperature: float) -> Tensor:
    """Return the mean term of features ``(N, D)``."""
    near, far = (F.cosine_similarity(own, other, dim=1) for other in (received, last))
    # -log of the share of the first of two is the softplus of the difference
    return F.softplus((far - near) / temperature).mean()


class MOONClient(Client):
    """Training with two frozen models beside."""

    def start(self) -> None:
        """Set the received and the last own model aside."""
        network = self.context.network
        self.last = None
        if self.method.config.mu > 0 and (kept := self.context.memory.tensors.get(GROUP)):
            self.received = network.frozen_copy()
            self.last = network.frozen_copy()
            self.last.load_state_dict(kept)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the criterion and the contrast."""
        loss = super().loss(outputs, labels)
        config = self.method.config
        if self.last is None:
            return loss + config.mu * math.log(2)
        with torch.no_grad():
            received, last = (
                self.context.network.outputs(outputs.images, m).known_features.flatten(1)
                for m in (self.received, self.last)
            )
        own = outputs.known_features.flatten(1)
        return loss + config.mu * contrast(own, received, last, config.temperature)

    def finish(self, progress: Progress) -> Record:
        """Keep the model."""
        if self.method.config.mu > 0:
            state = self.context.network.model.state_dict()
            self.context.memory.tensors[GROUP] = picked(state, state)
        return Record()


class MOON(Method):
    """FedAvg with another client."""

    config_type = MOONConfig
    client_type = MOONClient
    needs_head = True
