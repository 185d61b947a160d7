"""A small VGG-like network in the form FPGA compilers take.

Convolution without bias, batch norm, ReLU, max pooling, one linear layer at the end: the shape of
the networks in Simonyan & Zisserman, ICLR 2015, https://arxiv.org/abs/1409.1556, with batch norm,
and of the CNV network of FINN (Umuroglu et al., FPGA 2017).
"""

from collections.abc import Sequence

from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class VGGLike(nn.Module):
    """Two convolutions and a max pooling for each width, then a linear layer."""

    def __init__(
        self, num_classes: int, in_channels: int, image_size: int, widths: Sequence[int] = WIDTHS
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for width in widths:
            for _ in range(2):
                layers += [
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = image_size // 2 ** len(widths)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(channels * side * side, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` with H = W = ``image_size`` to logits ``(N, num_classes)``."""
        return self.classifier(self.flatten(self.features(x)))


def build(
    num_classes: int,
    in_channels: int = 3,
    image_size: int = 28,
    widths: Sequence[int] = WIDTHS,
) -> nn.Module:
    """Return the network with fresh weights, for square images of at least 8 pixels a side."""
    return VGGLike(num_classes, in_channels, image_size, widths)
