r"""FedAvgM: the server steps with momentum.

.. math:: v \leftarrow \beta v + \Delta, \qquad \bar w \leftarrow \bar w + \eta v

with the difference :math:`\Delta` of the clients' mean and the model. Statistics of batch
normalisation are the clients' mean: a variance with momentum could become negative.

Source: Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019, section 4.3, https://arxiv.org/abs/1909.06335.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from fl.method import Aggregated, Method, Server
from fl.record import Reply
from sdq.config import Config

GROUP = "fedavgm"


class FedAvgMConfig(Config):
    """Hyper-parameters.

    Args:
        momentum: beta; 0 is FedAvg.
        server_lr: eta.
    """

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    server_lr: Annotated[float, Field(gt=0)] = 1.0


class FedAvgM(Method):
    """FedAvg with another step."""

    config_type = FedAvgMConfig

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Step along the momentum."""
        model = dict(super().aggregate(server, replies).model)
        before = server.memory.tensors.get(GROUP, {})
        velocity = {}
        for name in sorted(server.parameter_names()):
            change = model[name] - server.model[name]
            last = before.get(name, torch.zeros_like(change))
            velocity[name] = self.config.momentum * last + change
            model[name] = server.model[name] + self.config.server_lr * velocity[name]
        server.memory.tensors[GROUP] = velocity
        return Aggregated(model)
