r"""FedProx: a proximal term holds clients near the server's model.

.. math:: L_k(w) + \frac\mu2 \lVert w - \bar w \rVert^2

Source: Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, equation 2,
https://arxiv.org/abs/1812.06127.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fl.method import Client, Method
from fl.network import Outputs
from sdq.config import Config


class FedProxConfig(Config):
    """Hyper-parameters.

    Args:
        mu: weight of the proximal term; 0 is FedAvg.
    """

    mu: Annotated[float, Field(ge=0)] = 1e-2


class FedProxClient(Client):
    """Training with the proximal term over the parameters that are shared."""

    def start(self) -> None:
        """Remember the server's parameters."""
        self.shared = self.context.shared_parameters()
        self.anchor = {n: p.detach().clone() for n, p in self.shared.items()}

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the criterion and the proximal term."""
        loss = super().loss(outputs, labels)
        if self.method.config.mu == 0:
            return loss
        squares = [(p - self.anchor[n]).square().sum() for n, p in self.shared.items()]
        return loss + self.method.config.mu / 2 * torch.stack(squares).sum()


class FedProx(Method):
    """FedAvg with another client."""

    config_type = FedProxConfig
    client_type = FedProxClient
