r"""What the rounds of a quantized network have in common, around any method.

While bits are learned and while weights are tuned under them, a client minimises

.. math:: (1 - d) L_{method} + d\, L_{KD}

and what its phase adds: :math:`L_{KD}` is the cross-entropy with the soft labels of the float
federation's model (SDQ, equation 9), and :math:`d` is ``distill``. The teacher is made of the
phase's first weights, which every client has anyway; where clients keep tensors of the model, such
as their normalisation, it has theirs.

Scales of activations: each client measures them on its own images and tells one number for each
quantizer; the server merges these. Scales of weights follow from the weights, which are common.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fl.composition import refusals
from fl.config import FederationConfig
from fl.method import Method, Progress, Server
from fl.network import Network, Outputs
from fl.quant_network import (
    QUANTIZER,
    clamp_gains_,
    fit_own_scales_,
    measured_scales,
    quant_models,
    set_act_scales_,
)
from fl.record import Record, Tensors, picked
from fl.state import Route, load_
from fl.wrapper import Wrapper, WrapperClient, WrapperConfig, chain
from sdq.batches import Loader
from sdq.config import Config, QuantConfig
from sdq.errors import RequestError, RunError
from sdq.quant_model import QuantModel
from sdq.task import Teacher

ACTS, TEACHER, FITTED, TOLD_BYTES = "act_scales", "teacher", "scales_fitted", "told_bytes"
Merge = Literal["geometric", "max"]


class QuantRoundsConfig(WrapperConfig):
    """What server and clients agree on, whatever the phase.

    Args:
        quant: how the network is quantized.
        distill: d, of the soft labels; 1: those alone, as in the paper; 0: the method's loss.
        merge: of the clients' activation scales: their geometric mean, weighted by images, or the
            largest, which clips nobody's values and is coarser for all.
    """

    quant: QuantConfig = QuantConfig()
    distill: Annotated[float, Field(ge=0, le=1)] = 0.5
    merge: Merge = "geometric"


def merged_scales(
    told: Mapping[int, Mapping[str, Tensor]], weights: Mapping[int, float], how: Merge
) -> Tensors:
    """Return one scale for each name, of the clients that told one which can be used.

    Args:
        told: positive scalars, by client and name.
        weights: of the clients.
        how: geometric mean or maximum.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for client in sorted(told):
        for name, tensor in told[client].items():
            if tensor.numel() == 1 and bool(tensor.isfinite()) and float(tensor) > 0:
                found.setdefault(name, []).append((float(tensor), weights[client]))
    merged = {}
    for name, pairs in found.items():
        values, parts = (torch.tensor(v, dtype=torch.float64) for v in zip(*pairs, strict=True))
        mean = (values.log() * parts).sum() / parts.sum()
        merged[name] = (mean.exp() if how == "geometric" else values.max()).float()
    return merged


class QuantClient(WrapperClient):
    """The inner client on a quantized network."""

    method: "QuantRounds"

    def start(self) -> None:
        """Fit the scales of what is the client's own, once; take up the teacher; start."""
        context = self.context
        if not context.memory.values.get(FITTED):
            order = torch.randperm(len(context.labels), generator=context.generator("calibration"))
            batches = context.batches(0, augmented=False, indices=order)
            fit_own_scales_(context.network, context.routes, batches)
            context.memory.values[FITTED] = True
        self.teacher = self.method.teacher_with(context.memory.tensors.get(TEACHER, {}))
        super().start()

    def loss(self, outputs: Outputs, labels: Tensor) -> Tensor:
        """Return the inner loss, mixed with the teacher's."""
        task, share = super().loss(outputs, labels), self.method.config.distill
        if self.teacher is None:
            return task
        return (1 - share) * task + share * self.teacher.loss(outputs.logits, outputs.images)

    def finish(self, progress: Progress) -> Record:
        """Return the inner record; the scales are such that they have logarithms."""
        clamp_gains_(self.context.network)
        return super().finish(progress)


class QuantRounds(Wrapper, ABC):
    """Rounds of a quantized network with any method inside; a phase says which bits there are.

    Args:
        config: of the phase.
        inner: the method.
        model: the float network, whose soft labels are learned.
    """

    config_type: ClassVar[type[Config]] = QuantRoundsConfig
    client_type = QuantClient
    refuses = refusals(
        aggregation="scales of activations are merged by a plain mean where bits are learned",
        noise="scales measured on its images leave the client where bits are learned",
    )

    def __init__(self, config: Any, inner: Method, model: nn.Module) -> None:
        super().__init__(config, inner)
        self.teacher = Teacher(model) if config.distill else None
        self._first = picked(model.state_dict(), model.state_dict())
        self.template: QuantModel | None = None
        self.begins: Mapping[str, Tensors] = {}
        """The models that a client needs before the first round, by name."""

    @property
    def name(self) -> str:
        """Return the name of the method inside."""
        return self.inner.name

    def check(self, config: FederationConfig) -> None:
        """Refuse methods that a quantized network cannot go with."""
        super().check(config)
        for method in chain(self.inner):
            if not method.has_server_model:
                raise RequestError(
                    f"{method.name}: bits must be learned with a server's model, and this method "
                    "has none; use `sdq quantize` on each client's own, or another method"
                )
            if method.name == "creff":
                raise RequestError(
                    "creff: bits must be learned with heads that clients train, but this method's "
                    "is retrained by the server in float; use fedavg or fedrod"
                )

    def extend_(self, network: Network, generator: torch.Generator) -> None:
        """Add what the inner method needs: copies are of the network without a search in it."""
        super().extend_(network, generator)
        assert isinstance(network.model, QuantModel)
        self.template = copy.deepcopy(network.model)

    def route(self, name: str, network: Network) -> Route:
        """Return the inner route; a scale has no frequencies to keep."""
        route = super().route(name, network)
        if QUANTIZER in name and route is Route.HIGH_FREQUENCY_LOCAL:
            return Route.SHARE
        return route

    def follows(self, name: str) -> bool:
        """Name the scales: they are of least squares on the weights."""
        return QUANTIZER in name

    def message_bits(self, network: Network, client: int) -> dict[str, int]:
        """Return nothing: bits are not learned yet."""
        return {}

    @abstractmethod
    def widths(self) -> dict[str, tuple[int, ...]]:
        """Return the bits that each activation may have in this phase, by path."""

    def introduce(self, network: Network, batches: Loader) -> Record:
        """Tell the scales of activations on the client's images, beside what the inner tells."""
        told = super().introduce(network, batches)
        assert self.template is not None
        scales = measured_scales(self.template, batches, self.widths())
        return Record({**told.tensors, ACTS: scales}, told.values)

    def start_server(self, server: Server) -> None:
        """Merge the clients' scales, and prepare what the inner method keeps."""
        told = [record.tensors.get(ACTS, {}) for record in server.told.values()]
        server.memory.values[TOLD_BYTES] = sum(t.nbytes for ts in told for t in ts.values())
        self.take_scales_(server, self._merged(server))
        super().start_server(server)

    def _merged(self, server: Server) -> Tensors:
        told = {k: record.tensors.get(ACTS, {}) for k, record in server.told.items()}
        weights = {k: float(server.counts[k].sum()) or 1.0 for k in told}
        merged = merged_scales(told, weights, self.config.merge)
        if not merged and self.widths():
            raise RunError(
                "federation: some client must tell the scales of its activations, got none; look "
                "at the images that the clients train on"
            )
        return merged

    def take_scales_(self, server: Server, scales: Tensors) -> None:
        """Put activation scales into the server's model."""
        load_(server.network, server.model)
        for path, qmodel in quant_models(server.network).items():
            if path == "model":
                set_act_scales_(qmodel, scales)
        server.model = picked(server.network.state_dict(), server.model)

    def teacher_with(self, own: Tensors) -> Teacher | None:
        """Return the teacher with a client's own tensors, by their names in the network."""
        if self.teacher is not None:
            named = {n.removeprefix("model."): t for n, t in own.items()}
            load_(self.teacher.network, self._first | named)
        return self.teacher
