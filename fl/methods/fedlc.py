r"""FedLC: logits calibrated by the client's class counts.

.. math:: L = CE(z - \tau n_c^{-1/4}, y)

The label's own logit stays in the denominator. The paper prints the sum without it; trained as
printed, the loss has no lower bound and collapses. A class without images has an infinite margin,
which leaves it out.

Source: Zhang et al., "Federated Learning with Label Distribution Skew via Logits Calibration",
ICML 2022, equation 8, https://arxiv.org/abs/2209.00189.
"""

import math
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fl.config import FederationConfig
from fl.method import Client, Method
from sdq.config import Config
from sdq.errors import RequestError


class FedLCConfig(Config):
    """Hyper-parameters.

    Args:
        tau: of the margins; 0 is cross-entropy over the classes that occur.
    """

    tau: Annotated[float, Field(ge=0)] = 1.0


def calibrated(logits: Tensor, labels: Tensor, counts: Tensor, tau: float) -> Tensor:
    """Return the mean loss of logits ``(N, C)`` with class counts ``(C,)``."""
    counts = counts.to(logits)
    margin = tau * counts.clamp_min(1) ** -0.25
    return F.cross_entropy((logits - margin).masked_fill(counts == 0, -math.inf), labels)


class FedLCClient(Client):
    """Training with another loss."""

    def start(self) -> None:
        """Put the loss in the context."""
        counts, tau = self.context.own_counts, self.method.config.tau
        self.context.criterion = lambda z, y: calibrated(z, y, counts, tau)


class FedLC(Method):
    """FedAvg with another loss."""

    config_type = FedLCConfig
    client_type = FedLCClient
    tasks = ("classification",)

    def check(self, config: FederationConfig) -> None:
        """Refuse a loss beside its own."""
        if config.loss is not None and config.loss.name != "ce":
            raise RequestError(
                f"fedlc: it is a loss of its own, got {config.loss.name!r} beside it; leave it out"
            )
