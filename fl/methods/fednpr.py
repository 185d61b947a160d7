r"""FedNPR: prototypes of each class regularize the features; around FedAvg, or any other method.

Each client models a class by K prototypes :math:`p_{c,m}` of unit length in the space of features:
means of groups of its own images, found anew every round. They never leave the client.

.. math:: \ell_c(x) = \max_m \cos(v(x), p_{c,m}), \qquad
          L = L_{inner} + \lambda\, CE(\mathrm{LayerNorm}(\ell), y)

with the features v and a layer normalisation over the classes, without factors: its output is at
most :math:`\sqrt{C-1}`.

Source: Wicaksana et al., "FedNPR", 2024, https://arxiv.org/abs/2407.12446; the assignment by
balanced transport as in Zhou et al., "Rethinking Semantic Segmentation: A Prototype View",
CVPR 2022, equations 8 to 10.
"""

import math
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fl.config import FederationConfig
from fl.losses import LossConfig
from fl.method import ClientContext
from fl.network import Outputs
from fl.wrapper import Wrapper, WrapperClient, WrapperConfig

GROUP = "fednpr"

PAPER = FederationConfig(
    rounds=80, batch_size=64, weight_decay=5e-4, lr=1e-3, lr_decay=0.1, lr_decay_rounds=(60, 70)
)
"""The paper's federation."""


class FedNPRConfig(WrapperConfig):
    """Hyper-parameters; the defaults are the paper's.

    Args:
        around: name of the method inside.
        inner: its hyper-parameters.
        weight: lambda.
        prototypes: K, of each class.
        assign: how a class's images are divided among its prototypes: ``sinkhorn``, or as in the
            released ``code``, see :func:`released_assignment`.
        lambda_mode: ``mul``, or as in the released ``code``, which adds lambda to the loss, where
            it was to be a factor: the regularizer has weight 1.
    """

    weight: Annotated[float, Field(ge=0)] = 0.05
    prototypes: Annotated[int, Field(ge=1)] = 4
    assign: Literal["sinkhorn", "code"] = "sinkhorn"
    lambda_mode: Literal["mul", "code"] = "mul"


def similarities(features: Tensor, prototypes: Tensor) -> Tensor:
    """Return the cosine of each image and the nearest prototype of each class, ``(N, C)``.

    Args:
        features: ``(N, D)``.
        prototypes: ``(C, K, D)``, of unit length.
    """
    v = F.normalize(features, dim=1)
    return torch.einsum("nd,ckd->nck", v, prototypes).amax(2)


def regularizer(similarity: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of similarities ``(N, C)``, normalised over the classes."""
    return F.cross_entropy(F.layer_norm(similarity, similarity.shape[1:]), labels)


def sinkhorn_assignment(similarity: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Return the prototype of each image, int64 ``(n,)``, by balanced transport.

    Args:
        similarity: of n images to K prototypes, ``(n, K)``.
        epsilon: of the entropic term.
        iterations: of Sinkhorn and Knopp's scaling.
    """
    return _plan(similarity.double() / epsilon, iterations).argmax(1)


def released_assignment(similarity: Tensor, rng: torch.Generator) -> Tensor:
    """Return what the released code's assignment comes to: nearly a uniform draw.

    It takes the similarity for a cost, which makes the plan prefer the least similar prototype;
    and then draws by a hard Gumbel-softmax whose logits are the masses of the plan, which are all
    close to 0. Its solver is not repeated here: the draw hardly depends on the plan.
    """
    n = len(similarity)
    # the regularization that the code's solver is given
    gamma = 0.05 / (3 * math.log(max(n, 3)))
    mass = _plan(-similarity.double() / gamma, 20).exp() / n
    u = torch.rand(mass.shape, generator=rng, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
    return (mass - (-u.log()).log()).argmax(1)


def _plan(score: Tensor, iterations: int) -> Tensor:
    """Return the logarithm of a transport plan: rows of sum 1, columns nearly of equal sums."""
    # logarithms: exp(1 / epsilon) is no number to sum with
    for _ in range(iterations):
        score = score - score.logsumexp(0, keepdim=True)
        score = score - score.logsumexp(1, keepdim=True)
    return score


def renewed_prototypes(
    prototypes: Tensor, features: Tensor, labels: Tensor, config: FedNPRConfig,
    rng: torch.Generator,
) -> Tensor:  # fmt: skip
    """Return prototypes after one assignment; a group without an image keeps its own.

    Args:
        prototypes: ``(C, K, D)``, of unit length.
        features: ``(N, D)``, of unit length.
        labels: int64 ``(N,)``.
        config: how.
        rng: for the released assignment.
    """
    found = prototypes.clone()
    for c in labels.unique().tolist():
        v = features[labels == c]
        score = v @ prototypes[c].T
        if config.assign == "sinkhorn":
            group = sinkhorn_assignment(score)
        else:
            group = released_assignment(score, rng)
        for m in group.unique().tolist():
            found[c, m] = F.normalize(v[group == m].mean(0), dim=0)
    return found


class FedNPRClient(WrapperClient):
    """The inner client with the regularizer."""

    def __init__(self, method: Wrapper, context: ClientContext) -> None:
        super().__init__(method, context)
        self.active = method.config.weight > 0 or method.config.lambda_mode == "code"

    def start(self) -> None:
        """Find the prototypes with the received network, and start the inner client."""
        if self.active:
            features, labels = self._features()
            kept = self.context.memory.tensors.get(GROUP, {}).get("prototypes")
            before = self._first(features.shape[1]) if kept is None else kept
            rng = self.context.generator("assignment")
            found = renewed_prototypes(before, features, labels, self.method.config, rng)
            self.context.memory.tensors[GROUP] = {"prototypes": found}
            self.prototypes = found.to(next(self.context.network.parameters()))
        super().start()

    @torch.no_grad()
    def _features(self) -> tuple[Tensor, Tensor]:
        """Return all training images' features of unit length, and labels, on the CPU."""
        network = self.context.network.eval()
        device = next(network.parameters()).device
        found, labels = [], []
        for images, y in self.context.batches(0, augmented=False):
            v = network.outputs(images.to(device)).known_features.flatten(1)
            found.append(F.normalize(v, dim=1).float().cpu())
            labels.append(y)
        return torch.cat(found), torch.cat(labels)

    def _first(self, size: int) -> Tensor:
        shape = (len(self.context.own_counts), self.method.config.prototypes, size)
        drawn = nn.init.trunc_normal_(
            torch.empty(shape), std=0.02, generator=self.context.generator("prototypes")
        )
        return F.normalize(drawn, dim=2)

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the inner loss and the regularizer."""
        loss = super().loss(outputs, labels)
        if not self.active:
            return loss
        config = self.method.config
        near = similarities(outputs.known_features.flatten(1), self.prototypes)
        term = regularizer(near, labels)
        return loss + (
            config.weight * term if config.lambda_mode == "mul" else config.weight + term
        )


class FedNPR(Wrapper):
    """A regularizer on each client; the balanced softmax loss where the inner names none."""

    config_type = FedNPRConfig
    client_type = FedNPRClient
    tasks = ("classification",)
    needs_head = True

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        if self.loss is None:
            self.loss = LossConfig(name="balanced_softmax")
