"""What cannot be negative needs no sign, whatever is done with its shape."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import padded, unpacked
from torch import Tensor, nn

from sdq.quant_model import QuantModel

Compute = Callable[[Any, Tensor], Any]


SIGNS: dict[str, tuple[Compute, bool]] = {
    # name: (what is computed, whether it can be negative)
    "view": (lambda net, x: x.relu().view(x.size(0), -1).view(x.shape), False),
    "unpacked": (unpacked, False),
    "padded": (padded, False),
    "slices": (lambda net, x: F.relu(x)[:, : x.size(1) // 2].repeat(1, 2, 1, 1), False),
    "expanded": (lambda net, x: F.relu(x[:, :1]).expand(-1, x.shape[1], -1, -1), False),
    "interpolated": (lambda net, x: F.interpolate(F.relu(x), size=x.shape[2:]), False),
    "clamped": (lambda net, x: x.clamp(min=0.0, max=x.shape[1]), False),
    "clamped below": (lambda net, x: x.clamp(min=-1.0), True),
    "chunks": (lambda net, x: torch.cat(F.relu(x).chunk(2, 1)[::-1], 1), False),
    "times a size less ten": (lambda net, x: F.relu(x) * (x.size(1) - 10), True),
    "slices of anything": (lambda net, x: x[:, : x.size(1)], True),
}


@pytest.mark.parametrize("name", SIGNS)
def test_sizes_do_not_cost_a_bit(
    name: str, between: Callable[..., nn.Module], quantized: Callable[..., QuantModel]
) -> None:
    compute, signed = SIGNS[name]
    qmodel = quantized(between(compute))
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, signed, True]


def test_a_hook_may_make_anything_negative(
    exact: Callable[..., Any], images: Callable[[], Tensor], between: Callable[..., nn.Module]
) -> None:
    net = between(lambda net, x: net.act(x), act=nn.ReLU())
    net.act.register_forward_hook(lambda module, args, output: output - 1)
    qmodel = exact(net, images())
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, True, True]
