"""What every network plugin owes: shapes, quantization under any policy, training, its state."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_, in_float
from sdq.config import QuantConfig
from sdq.outcome import reestimate_statistics_
from sdq.quant_model import QuantModel, quantize
from sdq.refusals import KINDS

MODELS = plugins.names("sdq.models")
DEEP = {"resnet50", "efficientnet_b0", "densenet121"}
TRAINED = [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in MODELS]
"""All of them; those with a hundred layers are slow."""
SIDE, CLASSES = 16, 5


def build(name: str, channels: int = 3, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: nn.Module = plugins.call_with_known(
            plugins.load("sdq.models", name).build,
            num_classes=CLASSES, in_channels=channels, image_size=SIDE, width=8,
        )  # fmt: skip
    return module


def images(channels: int = 3, count: int = 12) -> Tensor:
    return torch.randn(count, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


LABELS = torch.arange(12) % CLASSES


def logits_of(output: Tensor) -> Tensor:
    """Return logits ``(N, CLASSES)``, also of a network that gives a map for each class."""
    assert output.shape in ((12, CLASSES), (12, CLASSES, SIDE, SIDE))
    return output if output.dim() == 2 else output.mean((2, 3))


def settle(qmodel: QuantModel) -> None:
    """Calibrate a network of fresh weights: its normalisation has seen no data yet."""
    with in_float(qmodel):
        reestimate_statistics_(qmodel, [(images(), LABELS)], 1)
    calibrate_(qmodel, [(images(), LABELS)])


def quantized(name: str, seed: int = 0) -> QuantModel:
    """Return the network under a random policy of all bitwidths."""
    qmodel = quantize(build(name, seed=seed), QuantConfig(), sample=images()[:1])
    draw = random.Random(0)
    apply_policy_(
        qmodel,
        qmodel.policy.with_weight_bits(
            {b.name: draw.choice((1, 2, 3, 4, 6, 8)) for b in qmodel.policy if b.searched}
        ),
    )
    return qmodel


def test_there_are_models() -> None:
    assert {"mlp", "resnet20", "vgg_like"} <= set(MODELS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_it_maps_images_to_logits(name: str, channels: int) -> None:
    net = build(name, channels).eval()
    logits = net(images(channels))
    assert logits_of(logits).shape == (12, CLASSES)
    assert logits.dtype == torch.float32
    assert torch.isfinite(logits).all()
    # an image's logits do not depend on its neighbours (float32, in another order)
    torch.testing.assert_close(net(images(channels)[:1]), logits[:1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_its_weights_follow_from_the_generator(name: str) -> None:
    first, again, other = build(name), build(name), build(name, seed=1)
    a, b, c = (net.state_dict() for net in (first, again, other))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_quantized_under_a_mixed_policy(name: str) -> None:
    qmodel = quantized(name)
    calibrate_(qmodel, [(images(), LABELS)])
    assert qmodel.calibrated
    assert len(qmodel.policy) == len(qmodel.layers) > 2
    assert sum(b.searched for b in qmodel.policy) == len(qmodel.policy) - 2
    module_weights = {
        n: m.weight.numel() for n, m in build(name).named_modules() if isinstance(m, tuple(KINDS))
    }
    assert {s.name: s.num_weights for s in qmodel.layers} == module_weights
    logits = logits_of(qmodel.eval()(images()))
    assert torch.isfinite(logits).all()
    for b in qmodel.policy:
        quantizer = qmodel.weight_quantizer(b.name)
        codes = quantizer.codes(qmodel.weight(b.name))
        assert len(codes.unique()) <= 2**b.weight_bits


@pytest.mark.parametrize("name", TRAINED)
def test_eight_bits_answer_like_float(name: str) -> None:
    net = build(name).eval()
    qmodel = quantize(net, QuantConfig(act_bits=8), sample=images()[:1]).eval()
    calibrate_(qmodel, [(images(), LABELS)])
    logits, ours = net(images()), qmodel(images())
    # every layer adds noise of about 1/256 of its range; fresh weights do not average it out
    assert (ours - logits).square().mean() < max(0.02, 0.001 * len(qmodel.layers)) * logits.var()


@pytest.mark.parametrize("name", TRAINED)
def test_training_steps_lower_the_loss(name: str) -> None:
    torch.manual_seed(0)  # of dropout
    qmodel = quantized(name)
    settle(qmodel)
    qmodel.train()
    optimizer = torch.optim.AdamW(qmodel.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(logits_of(qmodel(images())), LABELS)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in qmodel.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] != losses[0]
    assert min(losses[-2:]) < losses[0]


@pytest.mark.parametrize("name", TRAINED)
def test_its_state_round_trips(name: str) -> None:
    net, other = build(name), build(name, seed=1)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(images()), net.eval()(images()))
    qmodel, fresh = quantized(name), quantized(name, seed=1)
    calibrate_(qmodel, [(images(), LABELS)])
    fresh.load_state_dict(qmodel.state_dict(), strict=True)
    assert torch.equal(fresh.eval()(images()), qmodel.eval()(images()))
