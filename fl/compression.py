r"""Tensors as codes of a few bits: what a message holds of a change that both sides can add up.

A tensor :math:`x` goes as integers :math:`c \in \{0, \dots, 2^b-1\}` and one step :math:`s`, and
means

.. math:: \hat x = (c + \tfrac12 - 2^{b-1})\, s .

The levels are symmetric and have no zero, so that one bit is the sign. Codes are rounded to
nearest. The step is the best of a few clipping points, and then the one of least squares,
:math:`s = \langle q, x\rangle / \langle q, q\rangle` with the levels :math:`q`: whatever :math:`x`
is, :math:`\lVert x-\hat x\rVert^2 = \lVert x\rVert^2 - \langle q,x\rangle^2/\langle q,q\rangle` is
less than :math:`\lVert x\rVert^2`, which is what error feedback needs to lose nothing in the end.

Source: Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014, and Karimireddy et al.,
"Error Feedback Fixes SignSGD", ICML 2019, https://arxiv.org/abs/1901.09847.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Size, Tensor

from fl.record import Tensors, misfit
from sdq.config import Bits, Config
from sdq.errors import RequestError, RunError

CODES, STEPS = "model.codes", "model.steps"
"""Groups of a record: packed codes by name, and all steps in one tensor."""

SMALL = 1024
"""Elements below which a tensor has at least 8 bits: together they weigh little."""

RATIOS = tuple(0.85**k for k in range(14))
"""Clipping points that are tried, as parts of the largest magnitude: down to an eighth."""

POLICY = "policy"
"""The word for ``policy_bits``."""

TINY = 1e-30
"""Largest magnitude of a tensor that counts as zero: a step must be a normal number."""


class CompressionConfig(Config):
    """Bits of what travels.

    Args:
        up: bits of a weight's change from client to server; None: floating-point numbers.
        down: likewise from server to client.
        tensor_bits: bits of some tensors, both ways, by patterns of their names (``model.…``);
            the first that matches holds.
        policy_bits: where bits are learned, weights that have learned bits travel in those while
            they are tuned, each client's in its own; ``tensor_bits`` goes before.
    """

    up: Bits | None = 4
    down: Bits | None = 4
    tensor_bits: dict[str, Bits] = {}  # noqa: RUF012 - pydantic copies defaults
    policy_bits: bool = False

    @classmethod
    def parsed(cls, text: str) -> "CompressionConfig":
        """Read ``4`` (both ways) or ``up=2,down=4`` (a way that is not named stays in float).

        ``policy``, alone or with either, is ``policy_bits``.

        Raises:
            RequestError: it is neither.

        >>> CompressionConfig.parsed("up=2,down=4").up
        2
        """
        ways: dict[str, int] = {}
        parts = text.split(",")
        if policy := POLICY in parts:
            parts.remove(POLICY)
            if not parts:
                return cls(policy_bits=True)
        for part in parts:
            way, equals, bits = part.rpartition("=")
            if not bits.isdecimal() or way not in (("up", "down") if equals else ("",)):
                break
            ways |= {w: int(bits) for w in ([way] if way else ["up", "down"])}
        else:
            if all(1 <= bits <= 8 for bits in ways.values()):
                return cls(up=ways.get("up"), down=ways.get("down"), policy_bits=policy)
        raise RequestError(
            "--compress: must be BITS, or up=BITS,down=BITS, from 1 to 8, with policy beside or "
            f"alone where bits are learned, got {text!r}; try --compress 4"
        )


def quantize(values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return codes, uint8 of the same shape, and the step, float32 of no dimension."""
    x = values.float()
    half, largest = 2 ** (bits - 1), float(x.abs().max())
    levels, best, step = torch.zeros_like(x), -1.0, largest
    if math.isfinite(largest):  # otherwise so is the step, and the receiver refuses it
        x = x / largest  # no square overflows
        for ratio in RATIOS if bits > 1 else RATIOS[:1]:
            tried = (x * (half / ratio)).floor().clamp_(-half, half - 1)
            centres = tried + 0.5
            along = float(torch.dot(centres.flatten(), x.flatten()))
            square = float(centres.square().sum())
            if along**2 / square > best:
                levels, best, step = tried, along**2 / square, largest * along / square
    return (levels + half).to(torch.uint8), torch.tensor(step)


def dequantize(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return what codes mean, float32."""
    return (codes.float() + (0.5 - 2 ** (bits - 1))) * step


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes one after the other in bytes, uint8 ``(ceil(n * bits / 8),)``.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 2)
    tensor([57], dtype=torch.uint8)
    """
    flat = codes.flatten().numpy()
    single = (flat[:, None] >> np.arange(bits, dtype=np.uint8)) & 1  # (n, bits), lowest first
    return torch.from_numpy(np.packbits(single.ravel(), bitorder="little"))


def unpack(packed: Tensor, bits: int, shape: Size) -> Tensor:
    """Return the codes that :func:`pack` was given."""
    count = shape.numel()
    single = np.unpackbits(packed.numpy(), bitorder="little", count=count * bits)
    codes = (single.reshape(count, bits) << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return torch.from_numpy(codes).reshape(shape)


@dataclass(frozen=True)
class Codec:
    """Bits and shapes by name: what both sides must know to read codes.

    Args:
        shapes: of the tensors.
        bits: of each.
    """

    shapes: Mapping[str, Size]
    bits: Mapping[str, int]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], bits: int, named: Mapping[str, int]) -> "Codec":
        """Return a codec.

        Args:
            tensors: examples, by name.
            bits: of those that nothing names; 8 or more for small ones.
            named: of some, by patterns of names.
        """

        def of(name: str, tensor: Tensor) -> int:
            given = (b for pattern, b in named.items() if fnmatchcase(name, pattern))
            return next(given, bits if tensor.numel() >= SMALL else 8)

        return cls(
            {n: t.shape for n, t in tensors.items()}, {n: of(n, t) for n, t in tensors.items()}
        )

    def encode(self, values: Mapping[str, Tensor]) -> dict[str, Tensors]:
        """Return the groups of a record; what is zero throughout is left out."""
        codes, steps = {}, []
        for name in self.shapes:
            # a comparison that NaN fails: what is NaN is sent, and refused
            if values[name].numel() and not float(values[name].abs().max()) <= TINY:
                found, step = quantize(values[name], self.bits[name])
                codes[name] = pack(found, self.bits[name])
                steps.append(step)
        return {CODES: codes, STEPS: {"steps": torch.stack(steps) if steps else torch.zeros(0)}}

    def decode(self, groups: Mapping[str, Tensors]) -> Tensors:
        """Return the values of all tensors, float32; zero for those left out.

        Raises:
            RunError: the groups are not what :meth:`encode` gives.
        """
        codes, steps = groups.get(CODES, {}), groups.get(STEPS, {})
        self._check(codes, steps)
        step = dict(zip([n for n in self.shapes if n in codes], steps["steps"], strict=True))
        return {
            name: dequantize(
                unpack(codes[name], self.bits[name], shape), step[name], self.bits[name]
            )
            if name in codes
            else torch.zeros(shape)
            for name, shape in self.shapes.items()
        }

    def _check(self, codes: Tensors, steps: Tensors) -> None:
        expected = {
            name: torch.empty(
                math.ceil(shape.numel() * self.bits[name] / 8), dtype=torch.uint8, device="meta"
            )
            for name, shape in self.shapes.items()
            if name in codes
        }
        of_steps = {"steps": torch.empty(len(codes), device="meta")}
        if (why := misfit(codes, expected) or misfit(steps, of_steps)) is not None:
            raise RunError(f"the codes of its model are not the federation's: {why}")
        if not bool(steps["steps"].isfinite().all()):
            raise RunError("the steps of its codes are NaN or infinite")
