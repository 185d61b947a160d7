"""What is skipped stays in float as it is, and is counted with 32 bits."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq.config import QuantConfig
from sdq.quant_model import QuantModel, quantize

SAMPLE = torch.zeros(1, 3, 12, 12)


def kinds(qmodel: QuantModel) -> dict[str, str]:
    return {layer.name: layer.kind for layer in qmodel.layers}


class Sequence(nn.Module):
    """Tokens of an image: sixteen of them, eight wide."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.patches, self.middle, self.head = nn.Conv2d(3, 8, 3, 3), middle, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.patches(x)).flatten(2).transpose(1, 2)
        if isinstance(self.middle, nn.MultiheadAttention):
            x = x + self.middle(x, x, x, need_weights=False)[0]
        elif isinstance(self.middle, nn.Embedding):
            x = x + self.middle(torch.arange(x.shape[1]))
        elif isinstance(self.middle, nn.Sequential):
            x = self.middle(x)
        elif isinstance(self.middle, nn.Conv3d):
            x = self.middle(x.transpose(1, 2).unflatten(2, (1, 4, 4))).flatten(2).transpose(1, 2)
        else:
            x = self.middle(x)[0]
        return self.head(x.mean(1))


TOKENS, WIDTH = 16, 8
FLOATS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    # name: (module, parameters, multiply-accumulates)
    "attention": (
        lambda: nn.MultiheadAttention(WIDTH, 2, batch_first=True),
        4 * WIDTH * WIDTH + 4 * WIDTH,
        # three projections in, scores of all heads together, their product with v, one out
        TOKENS * WIDTH * 3 * WIDTH + 2 * TOKENS * TOKENS * WIDTH + TOKENS * WIDTH * WIDTH,
    ),
    "lstm": (
        lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True, bidirectional=False),
        4 * WIDTH * (WIDTH + WIDTH + 2),
        TOKENS * 4 * WIDTH * (WIDTH + WIDTH),
    ),
    "gru": (
        lambda: nn.GRU(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True),
        2 * 3 * (WIDTH // 2) * (WIDTH + WIDTH // 2 + 2),
        2 * TOKENS * 3 * (WIDTH // 2) * (WIDTH + WIDTH // 2),
    ),
    "rnn": (
        lambda: nn.RNN(WIDTH, WIDTH, nonlinearity="relu", bias=False, batch_first=True),
        2 * WIDTH * WIDTH,
        TOKENS * 2 * WIDTH * WIDTH,
    ),
    "embedding": (lambda: nn.Embedding(TOKENS, WIDTH), TOKENS * WIDTH, 0),
    "conv3d": (lambda: nn.Conv3d(WIDTH, WIDTH, 1), WIDTH * (WIDTH + 1), TOKENS * WIDTH * WIDTH),
}  # fmt: skip


@pytest.mark.parametrize("name", FLOATS)
def test_a_layer_that_cannot_be_quantized_stays_in_float(
    name: str, refuses: Callable[..., Any], exact: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module],
) -> None:  # fmt: skip
    make, parameters, macs = FLOATS[name]
    net = seeded(lambda: Sequence(make()))
    kind = type(net.middle).__name__
    with refuses(f"model: layer 'middle' ({kind}) cannot be quantized", "--skip 'middle'"):
        quantize(net, sample=SAMPLE)
    qmodel = exact(net, images(), skip=("middle",))
    _, middle, _ = qmodel.layers
    assert (middle.name, middle.kind) == ("middle", "float")
    assert middle.num_params == parameters == sum(p.numel() for p in net.middle.parameters())
    assert middle.macs == macs
    bits = qmodel.policy["middle"]
    assert (bits.weight_bits, bits.act_bits, bits.searched) == (32, 32, False)


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.walked = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers, *self.walked]:
            x = layer(x)
        return x


@pytest.fixture
def nested(seeded: Callable[..., nn.Module], head: Callable[[], nn.Module]) -> Callable[[], Any]:
    return lambda: seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), Inner(), head()))


def test_a_single_layer_is_skipped_as_a_layer_of_32_bits(
    exact: Callable[..., Any], images: Callable[[], Tensor], nested: Callable[[], nn.Module]
) -> None:
    qmodel = exact(nested(), images(), skip=("2.layers.1",))
    assert kinds(qmodel)["2.layers.1"] == "conv2d"
    bits = qmodel.policy["2.layers.1"]
    assert (bits.weight_bits, bits.act_bits, bits.searched) == (32, 32, False)
    assert type(qmodel.layer("2.layers.1")) is nn.Conv2d
    assert "2.layers.1_input" not in qmodel.act_quantizers()


def test_a_container_is_skipped_whole(
    exact: Callable[..., Any], images: Callable[[], Tensor], nested: Callable[[], nn.Module]
) -> None:
    qmodel = exact(nested(), images(), skip=("2",))
    assert kinds(qmodel) == {"0": "conv2d", "2": "float", "3.linear": "linear"}
    conv, small, area = 8 * 8 * 9, 8 * 8, 10 * 10
    inner = qmodel.layers[1]
    assert inner.num_params == 2 * (conv + 8) + small + 8
    assert inner.macs == (2 * conv + small) * area
    assert type(qmodel.net.get_submodule("2")) is Inner  # as it was, down to its class
    before = copy.deepcopy(qmodel.net.get_submodule("2").state_dict())
    with torch.no_grad():
        for p in qmodel.net.get_submodule("2").parameters():
            p.add_(1)
    assert not torch.equal(qmodel.net.state_dict()["2.walked.0.bias"], before["walked.0.bias"])


@pytest.mark.parametrize("container", ["2.layers", "2.walked"])
def test_a_container_that_is_never_called_is_skipped_by_what_is_in_it(
    container: str, refuses: Callable[..., Any], exact: Callable[..., Any],
    images: Callable[[], Tensor], nested: Callable[[], nn.Module],
) -> None:  # fmt: skip
    with refuses(f"skip: '{container}' must be called as a module", f"--skip '{container}.*'"):
        quantize(nested(), QuantConfig(skip=(container,)), sample=SAMPLE)
    qmodel = exact(nested(), images(), skip=(f"{container}.*",))
    inside = [bits for bits in qmodel.policy if bits.name.startswith(container)]
    assert inside
    assert all(bits.weight_bits == 32 for bits in inside)


def test_a_pattern_for_a_list_and_its_members_is_no_mistake(
    quantized: Callable[..., QuantModel], nested: Callable[[], nn.Module]
) -> None:
    qmodel = quantized(nested(), skip=("2.layers*",))
    assert [b.weight_bits for b in qmodel.policy] == [8, 32, 32, 8, 8]


def test_patterns_that_match_nothing_get_the_nearest_offered(
    refuses: Callable[..., Any], nested: Callable[[], nn.Module]
) -> None:
    with refuses("model: skip: '2.layer' must match a module; did you mean '2.layers'?"):
        quantize(nested(), QuantConfig(skip=("2.layer",)), sample=SAMPLE)


def test_a_network_skipped_whole_is_refused(
    refuses: Callable[..., Any], seeded: Callable[..., nn.Module], nested: Callable[[], nn.Module]
) -> None:
    net = seeded(lambda: nn.Sequential(nested(), nn.Identity()))
    with refuses("model: must have a convolution or linear layer to quantize"):
        quantize(net, QuantConfig(skip=("0",)), sample=SAMPLE)


def test_a_transformer_layer_of_torch_is_skipped_in_two_steps(
    refuses: Callable[..., Any], exact: Callable[..., Any], images: Callable[[], Tensor],
    seeded: Callable[..., nn.Module],
) -> None:  # fmt: skip
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = seeded(lambda: Sequence(nn.Sequential(layer)))
    with refuses("model: layer 'middle.0.self_attn' (MultiheadAttention) cannot be quantized"):
        quantize(net, sample=SAMPLE)
    # its linear layers would be quantized, but its own code cannot be followed
    with refuses("model: layer 'middle.0' (TransformerEncoderLayer)", "--skip 'middle.0'"):
        quantize(net, QuantConfig(skip=("middle.0.self_attn",)), sample=SAMPLE)
    qmodel = exact(net, images(), skip=("middle.0",), formats=False)
    assert kinds(qmodel)["middle.0"] == "float"
