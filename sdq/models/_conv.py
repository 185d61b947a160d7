"""What the convolutional networks share: convolution with batch norm, and fresh weights."""

from torch import nn


def conv_bn(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = nn.ReLU,
) -> nn.Sequential:
    """Return a convolution without bias, batch norm and an activation: names ``0`` and ``1``.

    ``(N, C, H, W)`` becomes ``(N, K, H / stride, W / stride)``, rounded up.
    """
    padding = kernel_size // 2
    layers: list[nn.Module] = [
        nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        ),
        nn.BatchNorm2d(out_channels),
    ]
    if activation is not None:
        layers.append(activation())
    return nn.Sequential(*layers)


def init_weights_(network: nn.Module) -> None:
    """Draw the convolutions' weights with variance 2 / fan-in and set their biases to zero.

    Linear layers keep torch's own initialisation.

    Source: He et al., "Delving Deep into Rectifiers", ICCV 2015, equation 10,
    https://arxiv.org/abs/1502.01852.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
