"""FedRep: a head of each client's own, trained before the shared body in every round.

Source: Collins et al., "Exploiting Shared Representations for Personalized Federated Learning",
ICML 2021, algorithm 1, https://arxiv.org/abs/2102.07078.
"""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fl.method import Client, Method, Phase
from fl.network import Network
from fl.state import Route
from sdq.config import Config


class FedRepConfig(Config):
    """Hyper-parameters.

    Args:
        head_epochs: of the head, before the federation's local epochs of the body; None: as many.
    """

    head_epochs: Annotated[int, Field(ge=1)] | None = None


class FedRepClient(Client):
    """Training in two phases."""

    def phases(self) -> Sequence[Phase]:
        """Return the head's, then the body's."""
        is_head = self.context.network.is_head
        epochs = self.context.config.local_epochs
        return (
            Phase(self.method.config.head_epochs or epochs, is_head),
            Phase(epochs, lambda name: not is_head(name)),
        )


class FedRep(Method):
    """FedPer's routes with another client."""

    config_type = FedRepConfig
    client_type = FedRepClient
    needs_head = True

    def route(self, name: str, network: Network) -> Route:
        """Keep the head."""
        return Route.LOCAL if network.is_head(name) else super().route(name, network)
