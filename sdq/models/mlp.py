"""A multi-layer perceptron on the flattened image: the smallest network every exporter takes."""

from torch import Tensor, nn

WIDTHS = (128, 64, 64)


class MLP(nn.Module):
    """Linear layers with batch norm and ReLU between them."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        features = in_channels * image_size * image_size
        layers: list[nn.Module] = [nn.Flatten()]
        for width in WIDTHS:
            layers += [nn.Linear(features, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            features = width
        layers.append(nn.Linear(features, num_classes))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, C, H, W)`` with H = W = ``image_size`` to logits ``(N, num_classes)``."""
        return self.layers(x)


def build(num_classes: int, in_channels: int = 3, image_size: int = 28) -> nn.Module:
    """Return the network with fresh weights, for square images of any size."""
    return MLP(num_classes, in_channels, image_size)
