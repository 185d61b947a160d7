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
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.config import FederationConfig
from fl.losses import LossConfig, alignment_weight, prototype_aligned, seesaw
from fl.method import Aggregated, Progress, Server
from fl.network import Outputs
from fl.record import Record, Reply, Tensors
from fl.wrapper import Wrapper, WrapperClient, WrapperConfig
from sdq.errors import RequestError

GROUP = "cpa"


class CPAConfig(WrapperConfig):
    """Hyper-parameters; the defaults are the paper's for classification.

    Args:
        around: name of the method inside.
        inner: its hyper-parameters.
        tau: how little the prototypes weigh; 1 for segmentation.
        beta: exponent of the mitigation between classes.
        warmup: share of the rounds without prototypes: 15 of 50.
        common: a common prototype is the clients' ``mean``, or drawn by a ``gaussian`` with their
            mean and standard deviation.
        min_std: least standard deviation of the draw; 1 in the released code, which is far more
            than the prototypes differ.
        exchange: a client's own prototypes are renewed each ``round``, or each local ``epoch``.
        reset: in each round own and common prototypes begin at ones, as in the released code; only
            with ``exchange="epoch"`` do they come to anything.
    """

    tau: Annotated[float, Field(gt=1)] = 3.0
    beta: Annotated[float, Field(ge=0)] = 0.8
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.3
    common: Literal["gaussian", "mean"] = "gaussian"
    min_std: Annotated[float, Field(ge=0)] = 0.0
    exchange: Literal["round", "epoch"] = "round"
    reset: bool = False


class CPAClient(WrapperClient):
    """The inner client with another loss, whose features are summed as they pass."""

    def start(self) -> None:
        """Put the loss in the context, and start the inner client."""
        context, config = self.context, self.method.config
        self.received: Tensors = context.received.tensors.get(GROUP, {})
        self.own: Tensors = context.memory.tensors.get(GROUP, {})
        self.active = context.round >= config.warmup * context.config.rounds
        self.mitigation = seesaw(context.all_counts, config.beta)
        self._forget()
        self._weigh(first=True)
        super().start()

    def _forget(self) -> None:
        self.sums: Tensor | None = None
        self.seen = torch.zeros(len(self.context.own_counts))

    def _weigh(self, *, first: bool) -> None:
        """Put the loss with the weights of the prototypes as they are in the context."""
        config = self.method.config
        gamma = None
        if self.active and self.received:
            common = self.received["prototypes"]
            present = self.received["present"] > 0
            if config.reset and first:
                # all ones, drawn around as the server would
                std = config.min_std if config.common == "gaussian" else 0.0
                rng = self.context.generator("prototypes")
                noise = std * torch.randn(common.shape, generator=rng)
                ones = torch.ones_like(common)
                gamma = alignment_weight(ones, ones + noise, present, config.tau)
            elif self.own:
                present = present & (self.own["present"] > 0)
                gamma = alignment_weight(self.own["prototypes"], common, present, config.tau)
        mitigation = self.mitigation
        self.context.criterion = lambda z, y: prototype_aligned(z, y, mitigation, gamma)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Sum the features by class; a personal model's, where there is one beside the shared."""
        features = (outputs.own or outputs).known_features.detach().flatten(1).float().cpu()
        if self.sums is None:
            self.sums = torch.zeros(len(self.seen), features.shape[1])
        y = labels.cpu()
        self.sums.index_add_(0, y, features)
        self.seen += torch.bincount(y, minlength=len(self.seen))
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


def common_prototypes(
    sent: Sequence[Tensors], before: Tensors, config: CPAConfig, rng: torch.Generator
) -> Tensors:
    """Return the prototypes of all clients: ``prototypes`` ``(C, D)`` and ``present`` ``(C,)``.

    Args:
        sent: by clients, in the same form.
        before: the last ones, for classes that no client sent; or empty.
        config: how.
        rng: for the gaussian.
    """
    each = torch.stack([s["prototypes"] for s in sent])  # (K, C, D)
    has = torch.stack([s["present"] for s in sent])[:, :, None]  # (K, C, 1)
    count = has.sum(0)
    mean = (each * has).sum(0) / count.clamp_min(1)
    if config.common == "gaussian":
        squares = ((each - mean).square() * has).sum(0)
        # without Bessel's correction one client would have no standard deviation
        std = (squares / (count - 1).clamp_min(1)).sqrt().clamp_min(config.min_std)
        mean = mean + torch.randn(mean.shape, generator=rng) * std
    present = (count > 0)[:, 0].float()
    if before:
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
    tasks = ("classification",)
    needs_head = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.loss = LossConfig(name="cpa", beta=self.config.beta)

    def check(self, config: FederationConfig) -> None:
        """Refuse another loss: this method is one."""
        super().check(config)
        if config.loss is not None and config.loss.name != "cpa":
            raise RequestError(
                f"cpa: the federation's loss must be cpa, got {config.loss.name!r}; leave it out"
            )

    def send(self, server: Server, client: int) -> Record:
        """Send the common prototypes, once there are any."""
        inner = super().send(server, client)
        known = server.memory.tensors.get(GROUP)
        return Record({**inner.tensors, **({GROUP: known} if known else {})}, inner.values)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Let the inner method aggregate, and renew the common prototypes."""
        found = super().aggregate(server, replies)
        server.memory.tensors[GROUP] = common_prototypes(
            [r.record.tensors[GROUP] for r in replies],
            server.memory.tensors.get(GROUP, {}),
            self.config,
            server.generator("prototypes"),
        )
        return found
