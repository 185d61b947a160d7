r"""CPA, conjoint prototype-aligned loss: prototypes of classes weigh a loss against imbalance.

.. math:: L = -\sum_c \gamma_c y_c \log \hat p_c, \qquad
          \gamma_c = \frac{1+\tau}{\cos(m_c, g_c) + \tau}

with the client's prototype :math:`m_c`, the mean of its features of class c, and the common one
:math:`g_c`; see :func:`fl.losses.prototype_aligned`. In the first rounds :math:`\gamma` is 1, and
so it is where a class has no prototype.

Clients tell their prototypes once a round, and their weights hold for the next round: nothing
passes between clients in mid-round. The released code exchanges them every local epoch, which is
possible where all clients are one process; ``exchange="epoch"`` renews the client's own as often,
and compares them with the common ones of the last round.

Source: Chen et al., "Personalized Retrogress-Resilient Federated Learning Toward Imbalanced
Medical Data", IEEE TMI 41(12), 2022.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.config import FederationConfig
from fl.losses import (
    Criterion,
    LossConfig,
    alignment_weight,
    prototype_aligned,
    prototype_aligned_maps,
    seesaw,
)
from fl.method import Aggregated, Progress, Server
from fl.methods.fedlc import FedLC
from fl.methods.fedrod import FedROD
from fl.network import Network, Outputs
from fl.record import Record, Reply, Tensors, misfit
from fl.wrapper import Wrapper, WrapperClient, WrapperConfig, chain
from sdq.batches import Loader
from sdq.errors import RequestError
from sdq.segmentation import class_maps

GROUP = "cpa"
Common = Literal["gaussian", "mean"]


@dataclass(frozen=True)
class Chosen:
    """What the paper has for each task, where nothing else is asked for."""

    tau: float
    warmup: float
    common: Common


CLASSES = Chosen(tau=3.0, warmup=15 / 50, common="gaussian")
MASKS = Chosen(tau=1.0, warmup=1 / 20, common="mean")


class CPAConfig(WrapperConfig):
    """Hyper-parameters; None is the paper's value, for classification and for segmentation.

    Args:
        around: name of the method inside.
        inner: its hyper-parameters.
        tau: how little the prototypes weigh; None: 3, of masks 1.
        beta: exponent of the mitigation between classes.
        warmup: share of the rounds without prototypes; None: 15 of 50, of masks 1 of 20.
        common: a common prototype is the clients' ``mean``, or drawn by a ``gaussian`` with their
            mean and standard deviation; None: the gaussian, of masks the mean.
        min_std: least standard deviation of the draw; 1 in the released code, which is far more
            than the prototypes differ.
        exchange: a client's own prototypes are renewed each ``round``, or each local ``epoch``.
        reset: in each round own and common prototypes begin at ones, as in the released code; only
            with ``exchange="epoch"`` do they come to anything.
    """

    tau: Annotated[float, Field(ge=1)] | None = None
    beta: Annotated[float, Field(ge=0)] = 0.8
    warmup: Annotated[float, Field(ge=0, le=1)] | None = None
    common: Common | None = None
    min_std: Annotated[float, Field(ge=0)] = 0.0
    exchange: Literal["round", "epoch"] = "round"
    reset: bool = False

    def chosen(self, *, masks: bool) -> Chosen:
        """Return what was asked for, or else the paper's, for masks or for classes of images."""
        paper = MASKS if masks else CLASSES
        return Chosen(
            tau=paper.tau if self.tau is None else self.tau,
            warmup=paper.warmup if self.warmup is None else self.warmup,
            common=self.common or paper.common,
        )


class CPAClient(WrapperClient):
    """The inner client with another loss, whose features are summed as they pass."""

    def start(self) -> None:
        """Put the loss in the context, and start the inner client."""
        context, config = self.context, self.method.config
        self.received: Tensors = context.received.tensors.get(GROUP, {})
        self.own: Tensors = context.memory.tensors.get(GROUP, {})
        self.pixels = self.received.get("pixels")  # (L, 2): there are masks
        self.chosen = config.chosen(masks=self.pixels is not None)
        self.active = context.round >= self.chosen.warmup * context.config.rounds
        self.counts = context.all_counts if self.pixels is None else self.pixels
        self._forget()
        self._weigh(first=True)
        super().start()

    def _forget(self) -> None:
        self.sums: Tensor | None = None
        self.seen = torch.zeros(self.counts.numel())

    def _weigh(self, *, first: bool) -> None:
        """Put the loss with the weights of the prototypes as they are in the context."""
        config, tau = self.method.config, self.chosen.tau
        gamma = None
        if self.active and "prototypes" in self.received:
            common = self.received["prototypes"]
            present = self.received["present"] > 0
            if config.reset and first:
                # all ones, drawn around as the server would
                std = config.min_std if self.chosen.common == "gaussian" else 0.0
                rng = self.context.generator("prototypes")
                noise = std * torch.randn(common.shape, generator=rng)
                ones = torch.ones_like(common)
                gamma = alignment_weight(ones, ones + noise, present, tau)
            elif self.own:
                present = present & (self.own["present"] > 0)
                gamma = alignment_weight(self.own["prototypes"], common, present, tau)
        self.context.criterion = self._criterion(gamma)

    def _criterion(self, gamma: Tensor | None) -> Criterion:
        beta, pixels = self.method.config.beta, self.pixels
        if pixels is None:
            mitigation = seesaw(self.counts, beta)
            return lambda z, y: prototype_aligned(z, y, mitigation, gamma)
        each = torch.stack([seesaw(pair, beta) for pair in pixels])  # (L, 2, 2)
        weight = None if gamma is None else gamma.view_as(pixels)
        return lambda z, y: prototype_aligned_maps(z, y, each, weight)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Sum the features by class; a personal model's, where there is one beside the shared."""
        features = (outputs.own or outputs).known_features.detach()
        if self.pixels is None:
            share = F.one_hot(labels, len(self.seen)).to(features)  # (N, C)
            features = features.flatten(1)
        else:
            share, features = _of_pixels(labels, features, len(self.pixels))
        sums = (share.T @ features).float().cpu()
        self.sums = sums if self.sums is None else self.sums + sums
        self.seen += share.sum(0).cpu()
        return super().loss(outputs, labels)

    def end_epoch(self, epoch: int) -> None:
        """Take the epoch's means for prototypes."""
        super().end_epoch(epoch)
        if self.sums is None:
            return
        means = self.sums / self.seen.clamp_min(1)[:, None]
        self.own = {"prototypes": means, "present": (self.seen > 0).float()}
        self._forget()
        if self.method.config.exchange == "epoch":
            self._weigh(first=False)

    def finish(self, progress: Progress) -> Record:
        """Keep and send the last epoch's prototypes."""
        inner = super().finish(progress)
        self.context.memory.tensors[GROUP] = self.own
        return Record({**inner.tensors, GROUP: self.own}, inner.values)


def _of_pixels(targets: Tensor, features: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return which pixels are of which class, and their features.

    Args:
        targets: see :func:`sdq.segmentation.class_maps`.
        features: ``(N, D, h, w)``, of any size.
        classes: L maps.

    Returns:
        ``(N h w, 2 L)`` of 0 and 1, the outside and the inside of each map; ``(N h w, D)``.
    """
    maps = F.interpolate(class_maps(targets, classes).to(features), features.shape[2:])
    share = torch.stack([1 - maps, maps], dim=2).flatten(1, 2)  # (N, 2 L, h, w)
    return share.movedim(1, -1).flatten(0, 2), features.movedim(1, -1).flatten(0, 2)


def common_prototypes(
    sent: Sequence[Tensors], before: Tensors, min_std: float | None, rng: torch.Generator
) -> Tensors:
    """Return the prototypes of all clients: ``prototypes`` ``(C, D)`` and ``present`` ``(C,)``.

    Args:
        sent: by clients, in the same form.
        before: with the last ones, for classes that no client sent; or without.
        min_std: draw with the clients' standard deviation, and at least this; None: the mean.
        rng: to draw with.
    """
    each = torch.stack([s["prototypes"] for s in sent])  # (K, C, D)
    has = torch.stack([s["present"] for s in sent])[:, :, None]  # (K, C, 1)
    count = has.sum(0)
    mean = (each * has).sum(0) / count.clamp_min(1)
    if min_std is not None:
        squares = ((each - mean).square() * has).sum(0)
        # without Bessel's correction one client would have no standard deviation
        std = (squares / (count - 1).clamp_min(1)).sqrt().clamp_min(min_std)
        mean = mean + torch.randn(mean.shape, generator=rng) * std
    present = (count > 0)[:, 0].float()
    if "prototypes" in before:
        missing = present == 0
        mean = torch.where(missing[:, None], before["prototypes"], mean)
        present = torch.maximum(present, before["present"])
    return {"prototypes": mean, "present": present}


class CPA(Wrapper):
    """A loss, and prototypes that travel beside the network."""

    config_type = CPAConfig
    client_type = CPAClient
    refuses = refusals(
        aggregation="common prototypes are plain means",
        noise="mean features of its images leave the client by class",
    )
    needs_head = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        for inside in chain(self.inner):
            if isinstance(inside, FedLC | FedROD):
                raise RequestError(
                    "cpa.around: must be a method whose shared network has no loss of its own, got "
                    f"{inside.name}; take another"
                )
        self.loss = LossConfig(name="cpa", beta=self.config.beta)

    def check(self, config: FederationConfig) -> None:
        """Refuse another loss: this method is one."""
        super().check(config)
        if config.loss is not None and config.loss.name != "cpa":
            raise RequestError(
                f"cpa: the federation's loss must be cpa, got {config.loss.name!r}; leave it out"
            )
        given = config.loss is not None and "beta" in config.loss.model_fields_set
        if given and config.loss is not None and config.loss.beta != self.config.beta:
            raise RequestError(
                f"cpa: loss.beta must be the method's, {self.config.beta:g}, got "
                f"{config.loss.beta:g}; set beta of the method (--hyper beta={config.loss.beta:g})"
            )

    def introduce(self, network: Network, batches: Loader) -> Record:
        """Tell the pixels outside and inside of each map, where the training images have masks."""
        told = super().introduce(network, batches)
        total: Tensor | None = None
        for _, targets in batches:
            if targets.dim() == 1:
                return told
            inside = class_maps(targets, len(network.head.weight)).double()  # (N, L, H, W)
            pairs = torch.stack([1 - inside, inside], dim=2).sum(dim=(0, 3, 4))
            total = pairs if total is None else total + pairs
        if total is None:
            return told
        return Record({**told.tensors, GROUP: {"pixels": total}}, told.values)

    def misfit_told(self, server: Server, told: Record) -> str | None:
        """Look for the pixels outside and inside of each map."""
        sent = told.tensors.get(GROUP)
        if sent is not None:
            pixels = torch.empty(len(server.network.head.weight), 2, dtype=torch.float64)
            if (why := misfit(sent, {"pixels": pixels})) is not None:
                return why
            if bool((sent["pixels"] < 0).any()):
                return "'pixels' has numbers below 0"
        return super().misfit_told(server, told)

    def start_server(self, server: Server) -> None:
        """Add up the pixels."""
        super().start_server(server)
        told = [r.tensors[GROUP]["pixels"] for r in server.told.values() if GROUP in r.tensors]
        if told:
            server.memory.tensors[GROUP] = {"pixels": torch.stack(told).sum(0)}

    def send(self, server: Server, client: int) -> Record:
        """Send the pixels, and the common prototypes once there are any."""
        inner = super().send(server, client)
        known = server.memory.tensors.get(GROUP)
        return Record({**inner.tensors, **({GROUP: known} if known else {})}, inner.values)

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look for a prototype of each class, or of what is inside and outside of each mask."""
        pixels = server.memory.tensors.get(GROUP, {}).get("pixels")
        rows = (server.all_counts if pixels is None else pixels).numel()
        size = server.network.head.weight[0].numel()
        like = {"prototypes": torch.empty(rows, size), "present": torch.empty(rows)}
        sent = reply.record.tensors.get(GROUP, {})
        return misfit(sent, like) or super().misfit(server, reply)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Let the inner method aggregate, and renew the common prototypes."""
        found = super().aggregate(server, replies)
        before = server.memory.tensors.get(GROUP, {})
        gaussian = self.config.chosen(masks="pixels" in before).common == "gaussian"
        renewed = common_prototypes(
            [r.record.tensors[GROUP] for r in replies],
            before,
            self.config.min_std if gaussian else None,
            server.generator("prototypes"),
        )
        server.memory.tensors[GROUP] = {**before, **renewed}
        return found
