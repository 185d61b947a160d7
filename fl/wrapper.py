"""A method around another method, such as a regularizer that goes with any of them."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fl.config import FederationConfig
from fl.method import (
    Aggregated,
    Client,
    ClientContext,
    ClientData,
    Method,
    Phase,
    Progress,
    Server,
    Side,
    View,
    method,
)
from fl.network import Network, Outputs
from fl.record import Record, Reply, Tensors
from fl.state import Route
from sdq.batches import Loader
from sdq.config import Config
from sdq.errors import RequestError


class WrapperClient(Client):
    """A client around another method's client: every hook is the inner one's."""

    def __init__(self, method: "Wrapper", context: ClientContext) -> None:
        super().__init__(method, context)
        self.inner = method.inner.client(context)

    def phases(self) -> Sequence[Phase]:
        """Return the inner phases."""
        return self.inner.phases()

    def start(self) -> None:
        """Start the inner client."""
        self.inner.start()

    def start_epoch(self, epoch: int) -> None:
        """Pass on."""
        self.inner.start_epoch(epoch)

    def batches(self, epoch: int) -> Loader:
        """Return the inner batches."""
        return self.inner.batches(epoch)

    def forward(self, images: Tensor) -> Outputs:
        """Return the inner outputs."""
        return self.inner.forward(images)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the inner loss."""
        return self.inner.loss(outputs, labels)

    def correct_gradients_(self) -> None:
        """Pass on."""
        self.inner.correct_gradients_()

    def after_step(self) -> None:
        """Pass on."""
        self.inner.after_step()

    def end_epoch(self, epoch: int) -> None:
        """Pass on."""
        self.inner.end_epoch(epoch)

    def finish(self, progress: Progress) -> Record:
        """Return the inner record; add groups and values of your own to it."""
        return self.inner.finish(progress)


class WrapperConfig(Config):
    """Configuration of a wrapper.

    Args:
        around: name of the method inside.
        inner: its hyper-parameters.
    """

    around: str = "fedavg"
    inner: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies defaults


class Wrapper(Method):
    """A method around another: what it does not change is the inner one's.

    The inner method aggregates with its own weights; who changes those aggregates anew. Hooks that
    put another criterion in the context do so before the inner ``start``.
    """

    config_type: ClassVar[type[Config]] = WrapperConfig
    client_type: ClassVar[type[Client]] = WrapperClient

    def __init__(self, config: Any = None, inner: Method | None = None) -> None:
        super().__init__(config)
        self.inner = inner or method(self.config.around, **self.config.inner)
        self._check_once()
        self.batch_norm = self.inner.batch_norm
        self.loss = self.inner.loss
        self.tasks = tuple(task for task in self.tasks if task in self.inner.tasks)
        self.comparable_updates = self.inner.comparable_updates
        if not self.tasks:
            raise RequestError(
                f"{self.name}.around: must be a method for {' or '.join(type(self).tasks)}, got "
                f"{self.config.around!r}; it is for {' and '.join(self.inner.tasks)} alone"
            )
        self.needs_head = self.needs_head or self.inner.needs_head
        self.has_server_model = self.inner.has_server_model
        self.refuses = {**self.inner.refuses, **type(self).refuses}

    def _check_once(self) -> None:
        """Refuse what is wrapped in itself: both would keep their tensors in one place."""
        for inside in chain(self.inner):
            if isinstance(inside, type(self)) or (
                isinstance(inside, Wrapper) and isinstance(self, type(inside))
            ):
                raise RequestError(
                    f"{self.name}.around: must not have {inside.name} in it, got "
                    f"{self.config.around!r}; once is all it can do"
                )

    def check(self, config: FederationConfig) -> None:
        """Ask the inner method."""
        self.inner.check(config)

    def arrange(self, clients: Sequence[ClientData]) -> Sequence[ClientData]:
        """Return the inner arrangement."""
        return self.inner.arrange(clients)

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add what the inner method needs."""
        self.inner.extend_(network, generator)

    def route(self, name: str, network: Network) -> Route:
        """Return the inner route."""
        return self.inner.route(name, network)

    def follows(self, name: str) -> bool:
        """Ask the inner method."""
        return self.inner.follows(name)

    def views(self, side: Side) -> dict[str, View]:
        """Return the inner views."""
        return self.inner.views(side)

    def personal(self, network: Network) -> Tensors:
        """Return the inner method's."""
        return self.inner.personal(network)

    def introduce(self, network: Network, batches: Loader) -> Record:
        """Return what the inner method's client tells."""
        return self.inner.introduce(network, batches)

    def misfit_told(self, server: Server, told: Record) -> str | None:
        """Ask the inner method."""
        return self.inner.misfit_told(server, told)

    def start_server(self, server: Server) -> None:
        """Prepare what the inner method keeps."""
        self.inner.start_server(server)

    def state_for(self, server: Server, client: int) -> Tensors:
        """Return the inner state."""
        return self.inner.state_for(server, client)

    def send(self, server: Server, client: int) -> Record:
        """Return the inner record; add groups and values of your own to it."""
        return self.inner.send(server, client)

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Ask the inner method."""
        return self.inner.misfit(server, reply)

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return the inner weights."""
        return self.inner.weights(server, replies)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Return what the inner method makes of the replies."""
        return self.inner.aggregate(server, replies)


def chain(method: Method) -> Iterable[Method]:
    """Yield a method and what it is wrapped around."""
    yield method
    while isinstance(method, Wrapper):
        method = method.inner
        yield method
