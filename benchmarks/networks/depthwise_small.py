"""A small network of depthwise-separable convolutions for images of 28 pixels.

Six of MobileNet's blocks (Howard et al., 2017, https://arxiv.org/abs/1704.04861), of which two
halve the side, after a stem of 16 channels: 54,823 parameters with seven classes.
"""

from torch import Tensor, nn

from sdq.models._conv import conv_bn, init_weights_

BLOCKS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1), (128, 1))
"""Output channels and stride of each block."""


class DepthwiseSmall(nn.Module):
    """Stem, blocks, mean over the image, linear layer."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        channels = 16
        layers: list[nn.Module] = [_conv(in_channels, channels, 3, stride=2)]
        for out_channels, stride in BLOCKS:
            depthwise = _conv(channels, channels, 3, stride=stride, groups=channels)
            layers.append(nn.Sequential(depthwise, _conv(channels, out_channels, 1)))
            channels = out_channels
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` to logits ``(N, num_classes)``."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layer = conv_bn(in_channels, out_channels, kernel_size, stride, groups)
    init_weights_(layer)
    return layer


def build(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Return the network with fresh weights."""
    return DepthwiseSmall(num_classes, in_channels)
