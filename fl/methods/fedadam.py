r"""FedAdam: the server steps as Adam does, with the clients' mean change for a gradient.

.. math:: m \leftarrow \beta_1 m + (1-\beta_1)\Delta, \quad
          v \leftarrow \beta_2 v + (1-\beta_2)\Delta^2, \quad
          \bar w \leftarrow \bar w + \eta\, m / (\sqrt v + \tau)

from m = 0 and :math:`v = \tau^2`. Statistics of batch normalisation are the clients' mean.

Source: Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2,
https://arxiv.org/abs/2003.00295.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from fl.method import Aggregated, Method, Server
from fl.record import Reply
from sdq.config import Config

FIRST, SECOND = "fedadam.first", "fedadam.second"


class FedAdamConfig(Config):
    """Hyper-parameters.

    Args:
        beta1: of the first moment.
        beta2: of the second.
        server_lr: eta: about how far a weight moves in a round.
        tau: adaptivity: changes well below it move a weight in proportion.
    """

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    server_lr: Annotated[float, Field(gt=0)] = 1e-2
    tau: Annotated[float, Field(gt=0)] = 1e-3


class FedAdam(Method):
    """FedAvg with another step."""

    config_type = FedAdamConfig

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Step along the moments."""
        config = self.config
        model = dict(super().aggregate(server, replies).model)
        first, second = (server.memory.tensors.get(group, {}) for group in (FIRST, SECOND))
        m, v = {}, {}
        for name in sorted(server.parameter_names()):
            change = model[name] - server.model[name]
            m0 = first.get(name, torch.zeros_like(change))
            v0 = second.get(name, torch.full_like(change, config.tau**2))
            m[name] = config.beta1 * m0 + (1 - config.beta1) * change
            v[name] = config.beta2 * v0 + (1 - config.beta2) * change.square()
            step = m[name] / (v[name].sqrt() + config.tau)
            model[name] = server.model[name] + config.server_lr * step
        server.memory.tensors[FIRST], server.memory.tensors[SECOND] = m, v
        return Aggregated(model)
