"""FedPer: the head is each client's own, everything below it is averaged.

Source: Arivazhagan et al., "Federated Learning with Personalization Layers", 2019, algorithm 1,
https://arxiv.org/abs/1912.00818.
"""

from fl.method import Method
from fl.network import Network
from fl.state import Route


class FedPer(Method):
    """FedAvg without the head."""

    needs_head = True

    def route(self, name: str, network: Network) -> Route:
        """Keep the head."""
        return Route.LOCAL if network.is_head(name) else super().route(name, network)
