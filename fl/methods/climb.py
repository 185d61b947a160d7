r"""CLIMB: no client's loss may exceed the mean by much.

The mean loss is minimised under :math:`f_k - \bar f \le \epsilon`; multipliers :math:`\lambda_k`
weigh the clients by :math:`1 + \lambda_k - \bar\lambda`, and after each round

.. math:: \lambda_k \leftarrow \mathrm{clip}(\lambda_k + \eta_d (f_k - \bar f - \epsilon) / K,
          0, \lambda_{max})

with the loss :math:`f_k` of the received model on client k's images.

Source: Shen et al., "An Agnostic Approach to Federated Learning with Class Imbalance", ICLR 2022,
algorithm 1, https://openreview.net/forum?id=Xo0lbDt975.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field

from fl.composition import refusals
from fl.method import Aggregated, Client, Method, Progress, Server
from fl.record import Record, Reply, no_number
from sdq.config import Config

GROUP = "climb"


class CLIMBConfig(Config):
    """Hyper-parameters.

    Args:
        dual_lr: eta, of the multipliers.
        tolerance: epsilon.
        largest: of a multiplier.
        weighting: of the clients, beside the multipliers: ``uniform``, as in the paper, or by
            ``examples``.
    """

    dual_lr: Annotated[float, Field(ge=0)] = 0.1
    tolerance: Annotated[float, Field(ge=0)] = 0.1
    largest: Annotated[float, Field(gt=0)] = 100.0
    weighting: Literal["uniform", "examples"] = "uniform"


class CLIMBClient(Client):
    """Plain training, with a measurement before."""

    @torch.no_grad()
    def start(self) -> None:
        """Measure the received model's loss on the training images."""
        network = self.context.network.eval()
        device = next(network.parameters()).device
        total = 0.0
        for images, labels in self.context.batches(0, augmented=False):
            loss = self.context.criterion(network(images.to(device)), labels.to(device))
            total += float(loss) * len(labels)
        self.received_loss = total / len(self.context.labels)

    def finish(self, progress: Progress) -> Record:
        """Tell it."""
        return Record({}, {GROUP: self.received_loss})


class CLIMB(Method):
    """FedAvg with other weights."""

    config_type = CLIMBConfig
    client_type = CLIMBClient
    refuses = refusals(
        aggregation="its weights are the method, and a median has none",
        noise="the loss on its images leaves the client",
    )

    def start_server(self, server: Server) -> None:
        """Begin with multipliers of zero."""
        zero = torch.zeros(server.num_clients, dtype=torch.float64)
        server.memory.tensors[GROUP] = {"multipliers": zero}

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look for the loss."""
        return no_number(reply.record.values, GROUP)

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return each client's weight by its multiplier."""
        known = server.memory.tensors[GROUP]["multipliers"]
        own = known[[r.client for r in replies]]
        # a client without a multiplier has no weight, rather than a negative one, once others have
        # large ones
        factors = (1 + own - own.mean()).clamp_min(0).tolist()
        if self.config.weighting == "uniform":
            return factors
        return [f * r.num_examples for f, r in zip(factors, replies, strict=True)]

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Return the mean, and renew the multipliers of the clients that replied."""
        found = super().aggregate(server, replies)
        config = self.config
        losses = torch.tensor([r.record.values[GROUP] for r in replies], dtype=torch.float64)
        excess = (losses - losses.mean() - config.tolerance) / len(replies)
        multipliers = server.memory.tensors[GROUP]["multipliers"].clone()
        asked = [r.client for r in replies]
        multipliers[asked] = (multipliers[asked] + config.dual_lr * excess).clamp(0, config.largest)
        server.memory.tensors[GROUP] = {"multipliers": multipliers}
        return found
