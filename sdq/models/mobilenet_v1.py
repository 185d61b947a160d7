"""MobileNet of width 1.0: depthwise-separable convolutions.

Parameter names: ``features.0`` is the stem, ``features.1`` to ``features.13`` are the blocks, each
with a depthwise part ``0`` and a pointwise part ``1``; in every part ``0`` is the convolution and
``1`` its batch norm (``features.1.0.0.weight``). The linear layer is ``classifier``.

Source: Howard et al., "MobileNets", 2017, table 1, https://arxiv.org/abs/1704.04861.
"""

from torch import Tensor, nn

from sdq.models._conv import conv_bn, init_weights_

BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1), (512, 1), (512, 1),
    (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
"""Output channels and stride of each block."""


class MobileNetV1(nn.Module):
    """4,231,976 parameters with 3 input channels and 1000 classes."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = 32
        layers = [conv_bn(in_channels, channels, stride=2)]
        for out_channels, stride in BLOCKS:
            depthwise = conv_bn(channels, channels, stride=stride, groups=channels)
            layers.append(nn.Sequential(depthwise, conv_bn(channels, out_channels, 1)))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        init_weights_(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        x = self.features(x)  # (N, 1024, H / 32, W / 32)
        return self.classifier(self.avgpool(x).flatten(1))


def build(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return the network with fresh weights; any image side will do."""
    return MobileNetV1(num_classes, in_channels)
