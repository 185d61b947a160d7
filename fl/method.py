"""The contract of a federated method: both halves, client and server, in one file.

``fl/methods/NAME.py`` defines one subclass of :class:`Method`, and the file's name is the method's.
Every hook has a default, and the defaults together are federated averaging, so that a method is
only its difference. This module says nothing of how messages travel.

A *client* (:class:`Client`) is made for one round on one client, with the network loaded, and is
asked, in this order::

    start, then for each phase and epoch: start_epoch, for each batch: loss, correct_gradients_,
    after_step; end_epoch; at last: finish

The *server half* is the method itself::

    start_server once; each round: state_for and send for each client asked; then aggregate

What lasts is in records: ``context.memory`` stays with the client, ``server.memory`` with the
server, and nothing else of a method's objects survives a round.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from fl.composition import Refusals, refusals
from fl.config import FederationConfig
from fl.losses import Criterion, LossConfig
from fl.network import Network, Outputs
from fl.privacy import noise
from fl.record import Record, Reply, Tensors
from fl.robust import Aggregation, robust_mean
from fl.state import BatchNormPolicy, Route, moving_names, weighted_mean
from fl.store import Store
from sdq import plugins
from sdq.batches import Loader
from sdq.config import Config
from sdq.data import ArrayImages, ImageSet, TaskName
from sdq.errors import RequestError, RunError

Supervision = Literal["pixel", "box", "image", "none"]
"""What a client knows of its training images in segmentation: where each class is, in which boxes,
in which images, or nothing."""
LEVELS: tuple[Supervision, ...] = get_args(Supervision)
Side = Literal["server", "client"]
View = Callable[[Network, Tensor], Tensor]
"""Maps the network and images to logits: one way to predict with it."""


@dataclass(frozen=True)
class ClientData:
    """One client's images.

    Args:
        name: of the hospital or centre, for reports.
        train: its training images.
        val: what rounds are compared on, or None.
        test: what it is measured on, or None.
        pooled: the clients that it has the images of, where a method pools them: specialization is
            then measured on each one's images.
        supervision: ``pixel``, or less in segmentation; the training images then have no masks.
        where: bool, where each foreground class may be in each training image: the inside of its
            boxes ``(N, classes, H, W)``, or whether it is there at all ``(N, classes, 1, 1)``; None
            for ``pixel`` and ``none``.

    Raises:
        RequestError: there are masks where there must be none, or ``where`` does not fit.
    """

    name: str
    train: ImageSet
    val: ImageSet | None = None
    test: ImageSet | None = None
    pooled: tuple["ClientData", ...] = ()
    supervision: Supervision = "pixel"
    where: Tensor | None = None

    def __post_init__(self) -> None:
        weak = self.supervision != "pixel"
        if weak and self.train.masks is not None:
            raise RequestError(
                f"client {self.name!r}: training images must come without masks at supervision "
                f"{self.supervision!r}, got masks; see fl.supervision.weakened"
            )
        n, _, h, w = self.train.images.shape
        side = {"box": (h, w), "image": (1, 1)}.get(self.supervision)
        got = None if self.where is None else tuple(self.where.shape)
        if (side is None) != (got is None) or (got and (got[0], *got[2:]) != (n, *(side or ()))):
            wanted = "nothing" if side is None else f"(N, classes, H, W) of {(n, '...', *side)}"
            raise RequestError(
                f"client {self.name!r}: where must be {wanted} at supervision "
                f"{self.supervision!r}, got {got}; give boxes or image labels of every image"
            )


@dataclass
class ClientContext:
    """What a client has in one round.

    Args:
        client: its number.
        round: counted from 0.
        config: of the federation.
        network: loaded with what came and what was kept; trained in place.
        routes: of every tensor in the network's state.
        labels: ``(N,)``, of its training images, in their own order.
        own_counts: ``(classes,)``, images of each class in its training set; of segmentation
            ``(1,)``, its images.
        all_counts: likewise, of all clients together, as they told (perhaps with noise).
        received: what came with the request beside the network.
        memory: what it kept from its last round; what is in it after :meth:`Client.finish` is kept.
        loss: which loss it is.
        criterion: the loss itself; a wrapper may put another in its place.
        batches: makes the loader of an epoch; ``batches(epoch, augmented=False)`` the same images
            unchanged and in their own order; ``sampling=...`` instead of the federation's;
            ``batches(epoch, indices=...)`` (int64 ``(M,)``) of some images, as often as they are
            named; with ``masks=...`` (uint8 ``(M, L, H, W)``) these are their masks, and batches
            have ``(B, L, H, W)`` of them.
        generator: makes a generator for a purpose, of this client and round.
        supervision: what it knows of its training images.
        where: see :class:`ClientData`.
    """

    client: int
    round: int
    config: FederationConfig
    network: Network
    routes: Mapping[str, Route]
    labels: Tensor
    own_counts: Tensor
    all_counts: Tensor
    received: Record
    memory: Record
    loss: LossConfig
    criterion: Criterion
    batches: Callable[..., Loader]
    generator: Callable[[str], torch.Generator]
    supervision: Supervision = "pixel"
    where: Tensor | None = None

    @property
    def lr(self) -> float:
        """Return this round's learning rate."""
        return self.config.lr_in(self.round)

    def shared_parameters(self) -> dict[str, Tensor]:
        """Return the trained parameters that come from the server, by name."""
        return {
            name: p
            for name, p in self.network.named_parameters()
            if p.requires_grad and self.routes[name].comes_down
        }


@dataclass(frozen=True)
class Phase:
    """A part of local training: so many epochs of some of the parameters, by name."""

    epochs: int
    trains: Callable[[str], bool] = lambda name: True


class SitsOut(RunError):
    """Raised by :meth:`Client.start`: the client has nothing to learn from in this round.

    It sends no model and keeps what it had; where the round is evaluated, so is what it received.
    """


@dataclass(frozen=True)
class Progress:
    """What local training was: for :meth:`Client.finish`."""

    steps: int
    mean_loss: float


class Client:
    """One round on one client. The default is plain training with the criterion."""

    def __init__(self, method: "Method", context: ClientContext) -> None:
        self.method = method
        self.context = context

    def phases(self) -> Sequence[Phase]:
        """Return what is trained, and how long; a phase has an optimizer of its own."""
        return (Phase(self.context.config.local_epochs),)

    def start(self) -> None:
        """Prepare the round: the network is as received.

        Raises:
            SitsOut: the client is to train in a later round; the network is still as received.
        """

    def start_epoch(self, epoch: int) -> None:
        """Prepare an epoch, counted from 0 over all phases."""

    def batches(self, epoch: int) -> Loader:
        """Return the batches of an epoch."""
        return self.context.batches(epoch)

    def forward(self, images: Tensor) -> Outputs:
        """Return the outputs that :meth:`loss` needs, of one pass."""
        return self.context.network.outputs(images)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return what this batch minimises, with every additional term."""
        return self.context.criterion(outputs.logits, labels)

    def correct_gradients_(self) -> None:
        """Change gradients between the backward pass and the step."""

    def after_step(self) -> None:
        """React to an optimizer step."""

    def end_epoch(self, epoch: int) -> None:
        """React to the end of an epoch."""

    def finish(self, progress: Progress) -> Record:
        """Return what goes up beside the network; keep in ``context.memory`` what is to stay."""
        return Record()


@dataclass
class Server:
    """What the server has.

    Args:
        config: of the federation.
        network: of the right structure; its values are anyone's, the state is ``model``.
        routes: of every tensor.
        num_clients: of the federation, asked or not.
        counts: by client that told them, ``(classes,)``.
        round: the current one, counted from 0.
        model: the tensors that go up, as last aggregated.
        memory: what the method keeps.
        own: the last state made for each client alone, for methods that make such.
        generator: makes a generator for a purpose, of this round.
        told: what each client told with its class counts (:meth:`Method.introduce`); it is here in
            :meth:`Method.start_server` and not kept after that.
    """

    config: FederationConfig
    network: Network
    routes: Mapping[str, Route]
    num_clients: int
    counts: dict[int, Tensor]
    round: int
    model: Tensors
    memory: Record
    own: Store
    generator: Callable[[str], torch.Generator]
    told: dict[int, Record] = field(default_factory=dict)

    def mean(self, states: Sequence[Tensors], weights: Sequence[float]) -> Tensors:
        """Return the clients' tensors as one: what the federation's ``aggregation`` makes of them.

        With noise from the server it is in the result.
        """
        config = self.config
        rule = Aggregation.parsed(config.aggregation)
        if rule.kind != "mean":
            return robust_mean(states, rule, config.geometric)
        found = weighted_mean(states, weights, config.geometric)
        privacy = config.privacy
        if privacy is not None and privacy.noise_from == "server":
            rng = privacy.generator(self.generator("privacy"))
            std = privacy.noise_multiplier * privacy.clip / len(states)
            found = {
                n: (t.double() + noise(t, std, rng)).to(t.dtype) for n, t in sorted(found.items())
            }
        return found

    @property
    def all_counts(self) -> Tensor:
        """Return the images of each class, over all clients."""
        return torch.stack([self.counts[k] for k in sorted(self.counts)]).sum(0)

    def parameter_names(self) -> set[str]:
        """Return the names in ``model`` that a server's own step may move."""
        return moving_names(self.network, self.config.geometric) & set(self.model)


@dataclass(frozen=True)
class Aggregated:
    """A round's result: the server's model, and a state of its own for some clients.

    A client without a state of its own gets the model.
    """

    model: Tensors
    clients: Mapping[int, Tensors] = field(default_factory=dict)


class Method:
    """Both halves of a method. The defaults are federated averaging."""

    config_type: ClassVar[type[Config]] = Config
    client_type: ClassVar[type[Client]] = Client

    batch_norm: BatchNormPolicy = "share_all"
    """The policy where the federation names none."""
    loss: LossConfig | None = None
    """The loss where the federation names none; None: the task's own."""
    tasks: tuple[TaskName, ...] = ("classification", "segmentation")
    """What it can train."""
    supervision: tuple[Supervision, ...] = ("pixel",)
    """What its clients may know of their training images, beside masks or labels."""
    comparable_updates: bool = True
    """Whether clients change the model by like amounts, so that a far larger change is suspect
    (``max_update_ratio``); not so where some train on the few images whose labels they believe."""
    needs_head: bool = False
    """Whether the network must have a head that is known."""
    refuses: Refusals = refusals()
    """What the method does not go with, and why."""
    has_server_model: bool = True
    """Whether the server's model is something to evaluate."""

    def __init__(self, config: Any = None) -> None:
        self.config: Any = self.config_type() if config is None else config

    @property
    def name(self) -> str:
        """Return the name: that of the file."""
        return plugins.name_of(type(self).__module__)

    # --- both halves

    def check(self, config: FederationConfig) -> None:
        """Raise RequestError where the federation's configuration does not go with the method."""

    def arrange(self, clients: Sequence[ClientData]) -> Sequence[ClientData]:
        """Return the clients as the method has them, such as pooled in one."""
        return clients

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add to ``network.extras`` what the method needs beside the model."""

    def route(self, name: str, network: Network) -> Route:
        """Return the route of a tensor; extras stay with the client unless said otherwise."""
        return Route.SHARE if name.startswith("model.") else Route.LOCAL

    def follows(self, name: str) -> bool:
        """Tell whether a tensor's first value follows from others by sums.

        Two machines may then differ in its last bits, and are not compared by it.
        """
        return False

    def views(self, side: Side) -> dict[str, View]:
        """Return the ways to predict, the one that counts first."""
        return {"model": lambda network, images: network.model(images)}

    def personal(self, network: Network) -> Tensors:
        """Return a client's own model by the user's names: it predicts as its first view does."""
        return dict(network.model.state_dict())

    def message_bits(self, network: Network, client: int) -> dict[str, int]:
        """Return the learned bits of tensors that a client shares, by name.

        Raises:
            RequestError: no bits are learned.
        """
        raise RequestError(
            "compress.policy_bits: must be off where no bits are learned; give the bits "
            "(--compress 4), or learn some (--bits)"
        )

    # --- client

    def introduce(self, network: Network, batches: Loader) -> Record:
        """Return what a client tells once, with its class counts, before the first round.

        Args:
            network: in its initial state.
            batches: of the client's training images, shuffled, not augmented.
        """
        return Record()

    def client(self, context: ClientContext) -> Client:
        """Return one round's work on one client."""
        return self.client_type(self, context)

    # --- server

    def misfit_told(self, server: Server, told: Record) -> str | None:
        """Return why what a client tells before the first round cannot be used, or None.

        Numbers are finite, and the class counts are what they must be.
        """
        return None

    def start_server(self, server: Server) -> None:
        """Prepare ``server.memory`` before the first round; class counts are known."""

    def state_for(self, server: Server, client: int) -> Tensors:
        """Return the tensors a client starts this round from.

        By default its own, if the last rounds made one, however long it was absent; else the
        server's model.
        """
        return server.own[client].model if client in server.own else server.model

    def send(self, server: Server, client: int) -> Record:
        """Return what goes down beside the network."""
        return Record()

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Return why what its client adds to the network cannot be used, or None.

        Numbers are finite, and the network's own tensors are what they must be.
        """
        return None

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return each reply's weight in the mean; the sum does not matter."""
        return [float(reply.num_examples) for reply in replies]

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Return the new model, or one state a client. Replies are in the order of clients."""
        states = [reply.model for reply in replies]
        weights = self.weights(server, replies)
        return Aggregated(server.mean(states, weights))


def method(name: str, **hyper: Any) -> Method:
    """Return a method by name, with hyper-parameters as its ``Config`` names them.

    Raises:
        RequestError: no such method, or a hyper-parameter is wrong.

    >>> method("fedprox", mu=0.1).config.mu
    0.1
    """
    module = plugins.load("fl.methods", name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Method)
        # what the file imports, to build on, is another file's
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise RequestError(
            f"{module.__name__}: must define one subclass of Method, got {len(found)}; "
            "one file is one method"
        )
    return found[0](found[0].config_type(**hyper))


def pools_images(method: Method) -> bool:
    """Tell whether a method needs the clients' images in one place."""
    nobody = ImageSet(
        ArrayImages(torch.zeros(0, 1, 1, 1, dtype=torch.uint8)), torch.zeros(0).long()
    )
    two = (ClientData("a", nobody), ClientData("b", nobody))
    return tuple(method.arrange(two)) != two


def require_head(method: Method, network: Network) -> None:
    """Raise RequestError if the method needs a head and the network has none that is known."""
    if method.needs_head and not network.has_head:
        try:
            _ = network.head_name
        except RequestError as error:
            raise RequestError(f"{method.name}: needs the network's head; {error}") from None
