r"""CReFF: the server retrains the head, on features that have the gradients of the clients' own.

Each round a client sends, for each class c it has, the gradient :math:`g_c^k` that the retrained
head has on its images of the class. The server moves M federated features :math:`v` of each class
so that their gradient has the same direction,

.. math:: \min_v \sum_c \sum_j 1 - \cos(\nabla_{\theta_j} L(v_c), \bar g_{c,j})

over the rows :math:`\theta_j` of the head, weight and bias, with the clients' mean
:math:`\bar g_c`; and trains the head on these features, as many of each class. The network itself
is FedAvg's. The server predicts with the retrained head.

Source: Shang et al., "Federated Learning on Heterogeneous and Long-Tailed Data via Classifier
Re-Training with Federated Features", IJCAI 2022, algorithm 1, https://arxiv.org/abs/2204.13399.
"""

from collections.abc import Sequence
from typing import Annotated, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.method import Aggregated, Client, Method, Progress, Server, Side, View
from fl.network import HeadLayer, Network, Outputs
from fl.record import Record, Reply, misfit
from fl.state import Route
from sdq.config import Config

GROUP = "creff"
HEAD = "retrained_head"


class CReFFConfig(Config):
    """Hyper-parameters; the paper's, but for its 200 rounds: fewer must do here.

    Args:
        features: M, of each class.
        match_steps: of the features in a round.
        match_lr: of them, for each feature. (The paper: 0.1 on the mean over M features, which is
            0.1 / M for each, and takes a hundred rounds to come near the gradients.)
        retrain_steps: of the head in a round, each on all features, from where it was. (The paper:
            300 epochs in batches, at 0.01, from new weights.)
        retrain_lr: of them.
    """

    features: Annotated[int, Field(ge=1)] = 100
    match_steps: Annotated[int, Field(ge=0)] = 100
    match_lr: Annotated[float, Field(gt=0)] = 0.1
    retrain_steps: Annotated[int, Field(ge=0)] = 300
    retrain_lr: Annotated[float, Field(gt=0)] = 0.1


def head_gradients(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    r"""Return the gradient of the mean cross-entropy of each class's features, ``(C', C, D + 1)``.

    It is the mean of :math:`(p - e_c)\,(v, 1)^T`.

    Args:
        features: ``(C', M, D)``, of the classes 0 to C' - 1.
        weight: ``(C, D)``, of the head.
        bias: ``(C,)``.
    """
    wrong = (features @ weight.T + bias).softmax(2)
    target = torch.eye(len(weight), dtype=wrong.dtype, device=wrong.device)[: len(features)]
    wrong = wrong - target[:, None]  # (C', M, C)
    return torch.einsum("cmk,cmd->ckd", wrong, F.pad(features, (0, 1), value=1.0)) / wrong.shape[1]


def matched(
    features: Tensor, gradients: Tensor, present: Tensor, weight: Tensor, bias: Tensor,
    config: CReFFConfig,
) -> Tensor:  # fmt: skip
    """Return features ``(C, M, D)`` after some steps towards the clients' gradients.

    Args:
        features: as they were.
        gradients: ``(C, C, D + 1)``.
        present: bool ``(C,)``: of which classes there are any.
        weight: of the head.
        bias: of it.
        config: how.
    """
    moved = features.clone().requires_grad_()
    # the gradient that is matched is a mean over a class's features
    optimizer = torch.optim.SGD([moved], lr=config.match_lr * features.shape[1])
    for _ in range(config.match_steps):
        alike = F.cosine_similarity(head_gradients(moved, weight, bias), gradients, dim=2)
        optimizer.zero_grad()
        (1 - alike)[present].sum().backward()
        optimizer.step()
    return moved.detach()


def retrained(
    features: Tensor, present: Tensor, weight: Tensor, bias: Tensor, config: CReFFConfig
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the head after training on the features of present classes."""
    x = features[present].flatten(0, 1)
    y = present.nonzero()[:, 0].repeat_interleave(features.shape[1])
    w, b = (t.clone().requires_grad_() for t in (weight, bias))
    optimizer = torch.optim.SGD([w, b], lr=config.retrain_lr)
    for _ in range(config.retrain_steps):
        optimizer.zero_grad()
        F.cross_entropy(x @ w.T + b, y).backward()
        optimizer.step()
    return w.detach(), b.detach()


class CReFFClient(Client):
    """Plain training, with the retrained head's gradients measured before."""

    @torch.no_grad()
    def start(self) -> None:
        """Sum the gradients by class."""
        network = self.context.network.eval()
        weight, bias = _parts(network)
        device, classes = weight.device, len(weight)
        # nothing but what the server sends moves it
        network.extras[HEAD].requires_grad_(False)
        total = torch.zeros(classes, classes, weight.shape[1] + 1, device=device)
        for images, labels in self.context.batches(0, augmented=False):
            v = network.outputs(images.to(device)).known_features.flatten(1)
            y = F.one_hot(labels.to(device), classes).to(v)
            wrong = (v @ weight.T + bias).softmax(1) - y
            total += torch.einsum("nc,nk,nd->ckd", y, wrong, F.pad(v, (0, 1), value=1.0))
        counts = self.context.own_counts.to(device)
        self.gradients = (total / counts.clamp_min(1)[:, None, None]).cpu()

    def finish(self, progress: Progress) -> Record:
        """Send them."""
        present = (self.context.own_counts > 0).float()
        return Record({GROUP: {"gradients": self.gradients, "present": present}})


class CReFF(Method):
    """FedAvg with a second head, which the server trains."""

    config_type = CReFFConfig
    client_type = CReFFClient
    refuses = refusals(
        aggregation="the head is trained on plain means of gradients",
        noise="gradients of its images leave the client by class",
    )
    tasks = ("classification",)
    needs_head = True

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add the head."""
        network.extras[HEAD] = network.new_head(generator)

    def route(self, name: str, network: Network) -> Route:
        """Share everything; the clients leave the retrained head as it is."""
        return Route.SHARE

    def views(self, side: Side) -> dict[str, View]:
        """Return both heads; a client trains the network's own, the server the other."""
        views: dict[str, View] = {"model": _model, "retrained": _retrained}
        first = "retrained" if side == "server" else "model"
        return {first: views[first], **views}

    def start_server(self, server: Server) -> None:
        """Draw the features."""
        classes, size = _parts(server.network)[0].shape
        drawn = torch.randn(
            classes, self.config.features, size, generator=server.generator("features")
        )
        server.memory.tensors[GROUP] = {"features": drawn}

    def misfit(self, server: Server, reply: Reply) -> str | None:
        """Look for a gradient of each class."""
        classes, _, size = server.memory.tensors[GROUP]["features"].shape
        like = {
            "gradients": torch.empty(classes, classes, size + 1),
            "present": torch.empty(classes),
        }
        return misfit(reply.record.tensors.get(GROUP, {}), like)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Average the network; move the features and train the head."""
        model = dict(super().aggregate(server, replies).model)
        sent = [r.record.tensors[GROUP] for r in replies]
        has = torch.stack([s["present"] for s in sent])  # (K, C)
        total = torch.stack([s["gradients"] for s in sent])
        gradients = total.sum(0) / has.sum(0).clamp_min(1)[:, None, None]
        name = f"extras.{HEAD}"
        old = server.model[f"{name}.weight"]
        weight = old.flatten(1)
        bias = server.model.get(f"{name}.bias", torch.zeros(len(weight)))
        features = server.memory.tensors[GROUP]["features"]
        features = matched(features, gradients, has.sum(0) > 0, weight, bias, self.config)
        server.memory.tensors[GROUP] = {"features": features}
        known = server.all_counts > 0
        weight, bias = retrained(features, known, weight, bias, self.config)
        model[f"{name}.weight"] = weight.reshape(old.shape)
        if f"{name}.bias" in model:
            model[f"{name}.bias"] = bias
        return Aggregated(model)


def _parts(network: Network) -> tuple[Tensor, Tensor]:
    """Return the retrained head's weight ``(C, D)`` and bias ``(C,)``."""
    head = cast(HeadLayer, network.extras[HEAD])
    weight = head.weight.detach().flatten(1)
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()
    return weight, bias


def _model(network: Network, images: Tensor) -> Tensor:
    return network.outputs(images).logits


def _retrained(network: Network, images: Tensor) -> Tensor:
    outputs: Outputs = network.outputs(images)
    logits: Tensor = network.extras[HEAD](outputs.known_features)
    return logits
