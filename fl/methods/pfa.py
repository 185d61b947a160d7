r"""PFA, progressive Fourier aggregation: clients share low frequencies of their weights.

A weight becomes a matrix with the 2-D spectrum :math:`F_k = A_k e^{i\Phi_k}`; M is the centre of
the spectrum, and grows over the rounds. What client k gets back is, by mode,

- ``amp_phase`` (the journal paper): amplitude and phase are each the clients' mean inside M, and
  client k's own outside;
- ``amp`` (the conference paper): the amplitude alone;
- ``complex`` (ours): :math:`\hat F_k = M \circ \frac1K\sum_j F_j + (1-M)\circ F_k`, which is
  linear, and FedAvg where M is everything. Angles that wrap around have no such mean: measured on
  clients that differ by noise, ``amp_phase`` moves all of them away from their mean.

The result is real: what is left of an imaginary part is dropped. Batch normalisation stays local.

Source: Chen et al., "Personalized Retrogress-Resilient Framework for Real-World Medical Federated
Learning", MICCAI 2021, section 2.2, https://arxiv.org/abs/2110.00394; and IEEE TMI 41(12), 2022.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fl.composition import refusals
from fl.method import Aggregated, Method, Server
from fl.network import Network
from fl.record import Reply, Tensors
from fl.state import Route, weighted_mean
from sdq.config import Config

Mode = Literal["amp_phase", "amp", "complex"]


class PFAConfig(Config):
    """Hyper-parameters; the defaults are the journal paper's.

    Args:
        mode: what is averaged, see above.
        first_share: L0, of the spectrum's side, in round 0.
        last_share: what it grows to, linearly.
        head_rows: the head is transformed row by row, one class each, as in the journal paper.
        weighting: of the clients: ``uniform``, as in the papers, or by ``examples``.
    """

    mode: Mode = "amp_phase"
    first_share: Annotated[float, Field(ge=0, le=1)] = 0.7
    last_share: Annotated[float, Field(ge=0, le=1)] = 0.95
    head_rows: bool = True
    weighting: Literal["uniform", "examples"] = "uniform"

    def share(self, round: int, rounds: int) -> float:
        """Return L of a round, counted from 0."""
        return self.first_share + round / rounds * (self.last_share - self.first_share)


def as_matrix(weight: Tensor) -> Tensor:
    """Return a weight ``(N, C, D1, ...)`` as ``(C * D1, ... * N)``; two dimensions as they are."""
    if weight.dim() == 2:
        return weight
    moved = weight.movedim(0, -1)  # (C, D1, ..., N)
    return moved.reshape(moved.shape[0] * moved.shape[1], -1)


def from_matrix(matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return what :func:`as_matrix` came from."""
    if len(shape) == 2:
        return matrix
    return matrix.reshape(*shape[1:], shape[0]).movedim(-1, 0)


def low_frequencies(height: int, width: int, share: float, rows: bool = False) -> Tensor:
    """Return the mask M of a spectrum with the zero frequency in its centre, bool ``(h, w)``.

    Args:
        height: of the matrix.
        width: likewise.
        share: L: of the side; 1 is everything.
        rows: each row has a spectrum of its own, so that the mask is of columns alone.
    """
    row, column = torch.ones(height, dtype=torch.bool), torch.ones(width, dtype=torch.bool)
    if share < 1:
        row, column = _centre(height, share), _centre(width, share)
    return column.expand(height, width) if rows else row[:, None] & column[None, :]


def _centre(size: int, share: float) -> Tensor:
    centre, half = size // 2, int(size * share / 2)
    if share > 0:  # the zero frequency in any case: a head of one map would never be shared
        half = max(half, 1)
    index = torch.arange(size)
    return (index >= centre - half) & (index < centre + half)


def fuse(
    weights: Sequence[Tensor], shares: Sequence[float], mode: Mode, share: float,
    rows: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Return each client's weight with the low frequencies of all.

    Args:
        weights: one a client, of two or more dimensions.
        shares: what each counts in the mean; their sum does not matter.
        mode: what is averaged.
        share: L.
        rows: transform each row by itself.
    """
    axes = (1,) if rows else (0, 1)
    spectra = [
        torch.fft.fftshift(torch.fft.fft2(as_matrix(w.double()), dim=axes), dim=axes)
        for w in weights
    ]
    height, width = spectra[0].shape
    mask = low_frequencies(height, width, share, rows)
    total = float(sum(shares))
    parts = [s / total for s in shares]

    def mean(of: list[Tensor]) -> Tensor:
        return torch.stack([t * p for t, p in zip(of, parts, strict=True)]).sum(0)

    if mode == "complex":
        common = mean(spectra)
        fused = [torch.where(mask, common, s) for s in spectra]
    else:
        amplitude = mean([s.abs() for s in spectra])
        phase = mean([s.angle() for s in spectra])
        fused = [
            torch.polar(
                torch.where(mask, amplitude, s.abs()),
                torch.where(mask, phase, s.angle()) if mode == "amp_phase" else s.angle(),
            )
            for s in spectra
        ]
    back = [torch.fft.ifft2(torch.fft.ifftshift(s, dim=axes), dim=axes).real for s in fused]
    return [
        from_matrix(b, w.shape).to(w.dtype).contiguous() for b, w in zip(back, weights, strict=True)
    ]


class PFA(Method):
    """Aggregation in the Fourier domain: one state a client."""

    config_type = PFAConfig
    batch_norm = "local_all"
    refuses = refusals(
        aggregation="it averages spectra",
        server_noise="clients get states of their own, which the server's noise does not cover",
    )

    def route(self, name: str, network: Network) -> Route:
        """Keep the high frequencies of weights; share the rest, such as biases."""
        route = super().route(name, network)
        if route is Route.SHARE:
            tensor = network.state_dict()[name]
            if tensor.dim() > 1 and tensor.is_floating_point():
                return Route.HIGH_FREQUENCY_LOCAL
        return route

    def weights(self, server: Server, replies: Sequence[Reply]) -> list[float]:
        """Return equal weights, or the images."""
        if self.config.weighting == "uniform":
            return [1.0] * len(replies)
        return super().weights(server, replies)

    def aggregate(self, server: Server, replies: Sequence[Reply]) -> Aggregated:
        """Return each client's own state; the server's model is their mean."""
        weights = self.weights(server, replies)
        mean = super().aggregate(server, replies).model
        fused = self._fused(server, [r.model for r in replies], weights)
        states = [{**mean, **own} for own in fused]
        clients = {r.client: s for r, s in zip(replies, states, strict=True)}
        return Aggregated(weighted_mean(states, weights, server.config.geometric), clients)

    def state_for(self, server: Server, client: int) -> Tensors:
        """Return the client's state; one that was away gets the model's low frequencies.

        Its own high frequencies are those of the last round it took part in.
        """
        if client not in server.own:
            return server.model
        own = server.own[client].model
        if server.own.index[client] == server.round - 1:
            return own
        # all the weight on the model: the mean inside the mask is the model's spectrum
        return {**server.model, **self._fused(server, [server.model, own], [1.0, 0.0])[1]}

    def _fused(
        self, server: Server, states: Sequence[Tensors], weights: Sequence[float]
    ) -> list[Tensors]:
        """Return, for each state, its tensors that keep their high frequencies."""
        share = self.config.share(server.round, server.config.rounds)
        found: list[Tensors] = [{} for _ in states]
        for name, route in server.routes.items():
            if route is Route.HIGH_FREQUENCY_LOCAL:
                rows = self._by_rows(server.network, name)
                one = [s[name] for s in states]
                for state, weight in zip(
                    found, fuse(one, weights, self.config.mode, share, rows), strict=True
                ):
                    state[name] = weight
        return found

    def _by_rows(self, network: Network, name: str) -> bool:
        two = network.state_dict()[name].dim() == 2
        return self.config.head_rows and network.has_head and network.is_head(name) and two
