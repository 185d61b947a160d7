"""The networks against published parameter counts and names, and against formulas by hand."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import plugins
from sdq.models._resnet import BasicBlock, Bottleneck
from sdq.models.densenet121 import DenseLayer
from sdq.models.efficientnet_b0 import MBConv, StochasticDepth
from sdq.models.mobilenet_v2 import InvertedResidual
from sdq.tracing import trace

COUNTS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
    "efficientnet_b0": 5_288_548,
    "densenet121": 7_978_856,
}
CLASSIFIERS = [*COUNTS, "vgg16_slim"]
WITH_DROPOUT = ("mobilenet_v2", "efficientnet_b0")


def build(name: str, **request: Any) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = plugins.call_with_known(
        plugins.load("sdq.models", name).build, **{"num_classes": 5, "width": 4, **request}
    )
    return module


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


# ------------------------------------------------------------------------------- counts and names


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    assert count(build(name, num_classes=1000)) == COUNTS[name]


def test_parameter_counts_of_segmentation_and_slim_networks() -> None:
    assert count(build("vgg16_slim", num_classes=3)) == 2_371_104
    convs = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 512)]
    convs += [(512, 512)] * 3 + [(1024, 256), (256, 256), (512, 128), (128, 128), (256, 64)]
    convs += [(64, 64), (128, 64), (64, 64)]
    by_hand = sum(9 * c * k + 3 * k for c, k in convs) + 64 + 1  # weights, bias, norm; the head
    assert count(build("unet", num_classes=1, width=64)) == by_hand == 13_395_329


def norm(name: str) -> list[str]:
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"{name}.{part}" for part in parts]


def conv_norm(conv: str, batch_norm: str) -> list[str]:
    return [f"{conv}.weight", *norm(batch_norm)]


def pair(name: str) -> list[str]:
    return conv_norm(f"{name}.0", f"{name}.1")


def affine(name: str) -> list[str]:
    return [f"{name}.weight", f"{name}.bias"]


def resnet_names(depths: tuple[int, ...], convs: int) -> list[str]:
    names = conv_norm("conv1", "bn1")
    for stage, depth in enumerate(depths, start=1):
        for i in range(depth):
            at = f"layer{stage}.{i}"
            for k in range(1, convs + 1):
                names += conv_norm(f"{at}.conv{k}", f"{at}.bn{k}")
            if i == 0 and (stage > 1 or convs == 3):
                names += pair(f"{at}.downsample")
    return names + affine("fc")


def mobilenet_v2_names() -> list[str]:
    names = pair("features.0") + pair("features.1.conv.0")
    names += conv_norm("features.1.conv.1", "features.1.conv.2")
    for i in range(2, 18):
        at = f"features.{i}.conv"
        names += pair(f"{at}.0") + pair(f"{at}.1") + conv_norm(f"{at}.2", f"{at}.3")
    return names + pair("features.18") + affine("classifier.1")


def efficientnet_b0_names() -> list[str]:
    names = pair("features.0")
    for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1), start=1):
        for i in range(depth):
            at, k = f"features.{stage}.{i}.block", int(stage > 1)
            names += pair(f"{at}.0") if k else []
            names += pair(f"{at}.{k}")
            names += affine(f"{at}.{k + 1}.fc1") + affine(f"{at}.{k + 1}.fc2")
            names += pair(f"{at}.{k + 2}")
    return names + pair("features.8") + affine("classifier.1")


def densenet121_names() -> list[str]:
    names = conv_norm("features.conv0", "features.norm0")
    for block, depth in enumerate((6, 12, 24, 16), start=1):
        for i in range(1, depth + 1):
            at = f"features.denseblock{block}.denselayer{i}"
            names += [*norm(f"{at}.norm1"), f"{at}.conv1.weight"]
            names += [*norm(f"{at}.norm2"), f"{at}.conv2.weight"]
        if block < 4:
            at = f"features.transition{block}"
            names += [*norm(f"{at}.norm"), f"{at}.conv.weight"]
    return names + norm("features.norm5") + affine("classifier")


# as torchvision publishes them: number of tensors, names in order, shapes of a few
TORCHVISION = {
    "resnet18": (
        122,
        resnet_names((2, 2, 2, 2), 2),
        {
            "conv1.weight": (64, 3, 7, 7),
            "layer2.0.conv1.weight": (128, 64, 3, 3),
            "layer2.0.downsample.0.weight": (128, 64, 1, 1),
            "fc.weight": (1000, 512),
        },
    ),
    "resnet50": (
        320,
        resnet_names((3, 4, 6, 3), 3),
        {
            "layer1.0.downsample.0.weight": (256, 64, 1, 1),
            "layer3.0.conv1.weight": (256, 512, 1, 1),
            "layer3.0.conv2.weight": (256, 256, 3, 3),
            "layer4.2.conv3.weight": (2048, 512, 1, 1),
            "layer4.2.bn3.running_var": (2048,),
            "fc.weight": (1000, 2048),
        },
    ),
    "mobilenet_v2": (
        314,
        mobilenet_v2_names(),
        {
            "features.1.conv.0.0.weight": (32, 1, 3, 3),
            "features.1.conv.1.weight": (16, 32, 1, 1),
            "features.4.conv.1.0.weight": (144, 1, 3, 3),
            "features.17.conv.2.weight": (320, 960, 1, 1),
            "features.18.0.weight": (1280, 320, 1, 1),
            "classifier.1.weight": (1000, 1280),
        },
    ),
    "efficientnet_b0": (
        360,
        efficientnet_b0_names(),
        {
            "features.1.0.block.1.fc1.weight": (8, 32, 1, 1),
            "features.2.0.block.2.fc1.weight": (4, 96, 1, 1),
            "features.3.0.block.1.0.weight": (144, 1, 5, 5),
            "features.6.3.block.2.fc2.weight": (1152, 48, 1, 1),
            "features.7.0.block.3.0.weight": (320, 1152, 1, 1),
            "features.8.0.weight": (1280, 320, 1, 1),
        },
    ),
    "densenet121": (
        727,
        densenet121_names(),
        {
            "features.conv0.weight": (64, 3, 7, 7),
            "features.denseblock1.denselayer1.conv1.weight": (128, 64, 1, 1),
            "features.denseblock2.denselayer12.conv1.weight": (128, 480, 1, 1),
            "features.denseblock2.denselayer12.conv2.weight": (32, 128, 3, 3),
            "features.transition3.conv.weight": (512, 1024, 1, 1),
            "features.norm5.num_batches_tracked": (),
            "classifier.weight": (1000, 1024),
        },
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_names_and_shapes_are_torchvision_s(name: str) -> None:
    number, names, shapes = TORCHVISION[name]
    state = build(name, num_classes=1000).state_dict()
    assert list(state) == names
    assert len(names) == number
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_names_of_our_own() -> None:
    names = pair("features.0")
    for i in range(1, 14):
        names += pair(f"features.{i}.0") + pair(f"features.{i}.1")
    assert list(build("mobilenet_v1").state_dict()) == names + affine("classifier")
    names = [n for s, d in enumerate((2, 2, 3, 3, 3)) for i in range(d)
             for n in pair(f"features.{s}.{i}")]  # fmt: skip
    names += ["fc1.weight", *norm("bn1"), "fc2.weight"]
    assert list(build("vgg16_slim").state_dict()) == names
    stages = [f"encoder.{i}" for i in range(5)] + [f"decoder.{i}" for i in range(4)]
    names = [n for stage in stages for k in (0, 1, 3, 4) for n in affine(f"{stage}.{k}")]
    assert list(build("unet").state_dict()) == names + affine("head")


# -------------------------------------------------------------------------------- shapes, tracing


@pytest.mark.parametrize(("side", "channels"), [(16, 1), (28, 3), (32, 1), (45, 3)])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_at_several_sides(name: str, side: int, channels: int) -> None:
    network = build(name, in_channels=channels, image_size=side).eval()
    with torch.no_grad():
        logits = network(randn(2, channels, side, side))
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_traced_networks_keep_their_training_flag(name: str) -> None:
    network = build(name, in_channels=1).eval()
    images = randn(2, 1, 64, 64)
    with torch.no_grad():
        logits = network(images)
        assert torch.equal(network(images), logits)
        traced = trace(network.train(), images).eval()
        assert torch.equal(traced(images), logits)
        trained = traced.train()(images)
        assert not torch.equal(trained, logits)
        assert torch.equal(traced(images), trained) == (name not in WITH_DROPOUT)


@pytest.mark.parametrize("shape", [(16, 16), (32, 48), (28, 28), (17, 31)])
@pytest.mark.parametrize("channels", [1, 3])
def test_unet_maps_have_the_image_s_sides(channels: int, shape: tuple[int, int]) -> None:
    network = build("unet", in_channels=channels).eval()
    images = randn(2, channels, *shape)
    logits = network(images)
    assert logits.shape == (2, 5, *shape)
    assert float(logits.detach().min()) < 0 < float(logits.detach().max())
    traced = trace(network, images)
    assert torch.equal(traced(images), logits)
    # the same graph for all sides
    assert torch.equal(traced(images[:, :, :16, :16]), network(images[:, :, :16, :16]))


@pytest.mark.parametrize(("name", "enough"), [("vgg16_slim", 32), ("densenet121", 29)])
def test_left_out_poolings_change_no_parameter_and_nothing_at_larger_sides(
    name: str, enough: int
) -> None:
    usual, small = (build(name, image_size=side) for side in (224, 8))
    just = build(name, image_size=enough).eval()
    just.load_state_dict(usual.state_dict())
    small.load_state_dict(usual.state_dict())
    images = randn(2, 3, enough, enough)
    assert torch.equal(just(images), usual.eval()(images))
    assert small.eval()(randn(2, 3, 8, 8)).shape == (2, 5)
    with pytest.raises(RuntimeError, match="too small"):
        usual(images[:, :, :28, :28])


# --------------------------------------------------------------------------------- blocks by hand


def settled(block: nn.Module) -> nn.Module:
    """Return the block in float64 and evaluation, its norms with values of their own."""
    draws = torch.Generator().manual_seed(2)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.data = 0.5 + torch.rand(tensor.shape, generator=draws)
    return block.double().eval()


class ByHand:
    """A block's layers as formulas on its state dict."""

    def __init__(self, block: nn.Module) -> None:
        self.state = block.state_dict()

    def conv(self, x: Tensor, name: str, **how: Any) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **how)

    def norm(self, x: Tensor, name: str) -> Tensor:
        gain, bias, mean, var = (
            self.state[f"{name}.{part}"].view(-1, 1, 1)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    def groups_of_two(self, x: Tensor, name: str) -> Tensor:
        groups = x.reshape(len(x), -1, 2 * x.shape[2] * x.shape[3])
        mean = groups.mean(2, keepdim=True)
        var = (groups - mean).square().mean(2, keepdim=True)
        x = ((groups - mean) / (var + 1e-5).sqrt()).view(x.shape)
        gain, bias = (self.state[f"{name}.{p}"].view(-1, 1, 1) for p in ("weight", "bias"))
        return x * gain + bias


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # float64


@pytest.mark.parametrize("stride", [1, 2])
def test_basic_block(stride: int) -> None:
    block = settled(BasicBlock(4, 4 * stride, stride))
    hand, x = ByHand(block), randn(2, 4, 7, 7).double()
    out = hand.norm(hand.conv(x, "conv1", stride=stride, padding=1), "bn1").clamp(min=0)
    out = hand.norm(hand.conv(out, "conv2", padding=1), "bn2")
    skip = hand.norm(hand.conv(x, "downsample.0", stride=2), "downsample.1") if stride > 1 else x
    assert_equal(block(x), (out + skip).clamp(min=0))


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (4, 1), (4, 2)])
def test_bottleneck_has_its_stride_in_the_3x3(channels: int, stride: int) -> None:
    block = settled(Bottleneck(channels, 4, stride))
    hand, x = ByHand(block), randn(2, channels, 7, 7).double()
    out = hand.norm(hand.conv(x, "conv1"), "bn1").clamp(min=0)
    out = hand.norm(hand.conv(out, "conv2", stride=stride, padding=1), "bn2").clamp(min=0)
    out = hand.norm(hand.conv(out, "conv3"), "bn3")
    skip = x
    if channels != 16:
        skip = hand.norm(hand.conv(x, "downsample.0", stride=stride), "downsample.1")
    assert_equal(block(x), (out + skip).clamp(min=0))


@pytest.mark.parametrize(("width", "stride"), [(4, 1), (6, 1), (4, 2)])
def test_inverted_residual(width: int, stride: int) -> None:
    block = settled(InvertedResidual(4, width, stride, expansion=6))
    hand, x = ByHand(block), 3 * randn(2, 4, 7, 7).double()
    out = hand.norm(hand.conv(x, "conv.0.0"), "conv.0.1").clamp(0, 6)
    out = hand.conv(out, "conv.1.0", stride=stride, padding=1, groups=24)
    out = hand.norm(out, "conv.1.1").clamp(0, 6)
    out = hand.norm(hand.conv(out, "conv.2"), "conv.3")
    assert_equal(block(x), x + out if (width, stride) == (4, 1) else out)


@pytest.mark.parametrize("stride", [1, 2])
def test_mbconv_with_squeeze_and_excitation(stride: int) -> None:
    block = settled(MBConv(8, 8, 5, stride, expansion=6, drop_rate=0.5))
    hand, x = ByHand(block), randn(2, 8, 7, 7).double()
    out = hand.norm(hand.conv(x, "block.0.0"), "block.0.1")
    out = out * out.sigmoid()
    out = hand.conv(out, "block.1.0", stride=stride, padding=2, groups=48)
    out = hand.norm(out, "block.1.1")
    out = out * out.sigmoid()
    means = hand.conv(out.mean((2, 3), keepdim=True), "block.2.fc1")
    out = out * hand.conv(means * means.sigmoid(), "block.2.fc2").sigmoid()
    out = hand.norm(hand.conv(out, "block.3.0"), "block.3.1")
    assert_equal(block(x), out + x if stride == 1 else out)


def test_dense_layer() -> None:
    layer = settled(DenseLayer(6))
    hand, x = ByHand(layer), randn(2, 6, 5, 5).double()
    out = hand.conv(hand.norm(x, "norm1").clamp(min=0), "conv1")
    out = hand.conv(hand.norm(out, "norm2").clamp(min=0), "conv2", padding=1)
    assert_equal(layer(x), torch.cat((x, out), 1))


def test_unet_by_hand() -> None:
    network = settled(build("unet", num_classes=2, in_channels=1, width=2))
    hand, x = ByHand(network), randn(2, 1, 22, 17).double()

    def stage(x: Tensor, name: str) -> Tensor:
        for k in (0, 3):
            x = hand.conv(x, f"{name}.{k}", padding=1)
            x = hand.groups_of_two(x, f"{name}.{k + 1}").clamp(min=0)
        return x

    def twice(x: Tensor) -> Tensor:  # the corners stay where they are
        return F.interpolate(
            x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="bilinear", align_corners=True
        )

    maps = [stage(x, "encoder.0")]
    for i in range(1, 5):
        maps.append(stage(F.max_pool2d(maps[-1], 2), f"encoder.{i}"))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (2, 22, 17), (4, 11, 8), (8, 5, 4), (16, 2, 2), (16, 1, 1),
    ]  # fmt: skip
    out = maps[4]
    for i, skip in enumerate((maps[3], maps[2], maps[1], maps[0])):
        up = torch.zeros_like(skip[:, :1]).repeat(1, out.shape[1], 1, 1)
        up[:, :, : 2 * out.shape[2], : 2 * out.shape[3]] = twice(out)
        out = stage(torch.cat((skip, up), 1), f"decoder.{i}")
    assert_equal(network(x), hand.conv(out, "head"))


# ------------------------------------------------------------------------------- stochastic depth


def test_stochastic_depth_drops_whole_images_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    depth, x = StochasticDepth(0.2), 1 + randn(10_000, 1, 2, 1).square()
    assert torch.equal(depth.eval()(x), x)
    out = depth.train()(x)
    factors = (out / x).flatten(1)
    assert torch.equal(factors[:, 0] == 0, factors[:, 1] == 0)
    kept = factors[factors[:, 0] != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1.25))
    # four standard errors: 4 sqrt(0.2 / 0.8 / 10000)
    assert float(factors[:, 0].mean()) == pytest.approx(1, abs=0.02)


def test_drop_rates_rise_linearly() -> None:
    blocks = [m for m in build("efficientnet_b0").modules() if isinstance(m, MBConv)]
    rates = [block.stochastic_depth.dropout.p for block in blocks]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)], abs=1e-12)
