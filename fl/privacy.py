r"""Differential privacy of clients: changes are clipped, and normal noise covers each.

Two data sets of one client are neighbours, whatever their images are. A change is scaled to a norm
of C at most, so that another data set moves it by 2C at most. Noise of standard deviation
:math:`z\,C` is added

- by the *client*, to its own change: the guarantee holds against the server too;
- by the *server*, to the sum of the changes, which is :math:`z\,C/K` on the mean of K clients: the
  guarantee holds against whoever sees its models, and the server is trusted. It needs
  :math:`\sqrt K` times less noise.

In the m rounds that asked one client this is, exactly, one normal mechanism with
:math:`\mu = 2\sqrt m / z`, and so :math:`(\epsilon, \delta)`-private for

.. math:: \delta = \Phi(-\epsilon/\mu + \mu/2) - e^\epsilon\, \Phi(-\epsilon/\mu - \mu/2).

That clients are drawn at random is not counted in their favour. Where others take the data sets
with and without a client for neighbours, they get the :math:`\epsilon` of twice our z.

Not guarded against: the low bits of floating-point noise (Mironov, CCS 2012), and an adversary who
predicts torch's generators, which are not cryptographic.

Source: Balle and Wang, "Improving the Gaussian Mechanism for Differential Privacy", ICML 2018,
theorem 5, https://arxiv.org/abs/1805.06530, and Dong et al., "Gaussian Differential Privacy", 2022,
corollary 2, https://arxiv.org/abs/1905.02383, for the rounds. McMahan et al., "Learning
Differentially Private Recurrent Language Models", ICLR 2018, for clipping and the server's noise.
"""

import math
import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr
from torch import Tensor

from fl.record import Tensors
from sdq.config import Config


class PrivacyConfig(Config):
    """Clipping and noise.

    Args:
        noise_from: who adds it: each ``client``, or the ``server``.
        clip: C, the largest norm of a change.
        noise_multiplier: z.
        delta: for which epsilon is reported.
        noise: ``seeded`` follows from the federation's seed, which every client knows: for
            simulations, and refused between real nodes. ``secret`` is drawn anew by the operating
            system each time.
    """

    noise_from: Literal["client", "server"] = "server"
    clip: Annotated[float, Field(gt=0)] = 1.0
    noise_multiplier: Annotated[float, Field(gt=0)] = 1.0
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    noise: Literal["seeded", "secret"] = "seeded"

    def generator(self, seeded: torch.Generator) -> torch.Generator:
        """Return the generator of the noise."""
        if self.noise == "seeded":
            return seeded
        return torch.Generator().manual_seed(secrets.randbits(63))

    def spent(self, rounds: int) -> dict[str, Any]:
        """Return the guarantee for a client that was asked in so many rounds, as JSON has it."""
        mu = 2 * math.sqrt(rounds) / self.noise_multiplier
        return {
            "epsilon": epsilon(mu, self.delta),
            "delta": self.delta,
            "neighbours": "any two data sets of one client",
            "against": "the server too" if self.noise_from == "client" else "who sees its models",
            "rounds": rounds,
            **self.model_dump(mode="json", include={"clip", "noise_multiplier", "noise"}),
        }


def epsilon(mu: float, delta: float) -> float:
    """Return the least epsilon of a normal mechanism: sensitivity over standard deviation is mu."""

    def excess(e: float) -> float:
        first = float(ndtr(-e / mu + mu / 2))
        return first - math.exp(e + float(log_ndtr(-e / mu - mu / 2))) - delta

    if mu == 0 or excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(brentq(excess, 0.0, high, xtol=1e-9))


def privatised(
    after: Mapping[str, Tensor], before: Mapping[str, Tensor], clip: float, std: float,
    rng: torch.Generator | None,
) -> Tensors:  # fmt: skip
    """Return tensors after a change that is clipped, and noised if there is a generator.

    Args:
        after: with the change.
        before: without it, of at least the names of ``after``.
        clip: the largest norm, of all tensors together.
        std: of the noise.
        rng: for it, or None.
    """
    change = {n: (t - before[n]).double() for n, t in after.items()}
    norm = math.sqrt(sum(float(d.square().sum()) for d in change.values()))
    factor = min(1.0, clip / norm) if norm else 1.0
    found = {}
    for name, d in change.items():
        moved = before[name].double() + factor * d
        if rng is not None:
            moved = moved + noise(d, std, rng)
        found[name] = moved.to(after[name].dtype)
    return found


def noise(like: Tensor, std: float, rng: torch.Generator) -> Tensor:
    """Return normal noise, float64, of a tensor's shape; drawn on the CPU."""
    return std * torch.randn(like.shape, generator=rng, dtype=torch.float64)
