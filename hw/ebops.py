"""Effective bit operations: what constant weights cost in logic that is made for them.

A product of ``b``-bit weight and ``a``-bit activation counts ``b a``. A weight that is known counts
the span of its bits between the first and the last that is not zero: ``0b0110100`` as 4, a power of
two as 1, zero as 0. Where only bitwidths are known, all their bits count, which is an upper bound.
For designs in which every product has logic of its own, the authors find it near ``LUT + 55 DSP``.

Source: Sun et al., "Gradient-based Automatic Mixed Precision Quantization for Neural Networks
On-Chip" (HGQ), 2024, https://arxiv.org/abs/2405.00645, section III-D.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy


def spans(codes: Tensor) -> Tensor:
    """Return for each integer the bits from its first to its last that is not zero.

    >>> spans(torch.tensor([0, 1, 8, 5, -6, 7])).tolist()
    [0, 1, 1, 3, 2, 3]
    """
    rest = codes.abs().long()
    even = (rest > 0) & (rest % 2 == 0)
    while even.any():  # the zeros at the end
        rest = torch.where(even, rest // 2, rest)
        even = (rest > 0) & (rest % 2 == 0)
    found = torch.zeros_like(rest)
    while rest.any():
        found += rest > 0
        rest = rest // 2
    return found


def layer_ebops(
    layers: Sequence[LayerSpec],
    policy: BitwidthPolicy,
    codes: Mapping[str, Tensor] | None = None,
) -> list[int]:
    """Return the effective bit operations of each layer for one sample.

    Args:
        layers: of the network, in the policy's order.
        policy: one entry a layer.
        codes: integer weights by layer name, of any shape; layers without count all bits.
    """
    found = []
    for spec, bits in zip(layers, policy, strict=True):
        known = (codes or {}).get(spec.name)
        total = bits.total_weight_bits if known is None else int(spans(known).sum())
        # a weight is used as often as any other of its layer
        found.append(spec.macs * total * bits.act_bits // spec.num_weights)
    return found
