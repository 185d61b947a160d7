"""Local training: every client alone; nothing travels. A bound for specialization."""

from fl.composition import refusals
from fl.method import Method
from fl.network import Network
from fl.state import Route


class Local(Method):
    """Every tensor stays with its client, so that there is no server model."""

    has_server_model = False
    refuses = refusals(
        aggregation="nothing is averaged", noise="nothing of a model leaves a client"
    )

    def route(self, name: str, network: Network) -> Route:
        """Keep everything."""
        return Route.LOCAL
