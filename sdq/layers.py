"""What a quantizable layer is: its shapes, weights and multiply-accumulates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSpec:
    """One convolution or linear layer, as seen with one input sample.

    Args:
        name: path in the network, e.g. ``layer1.0.conv1``.
        kind: ``conv1d``, ``conv2d`` or ``linear``.
        weight_shape: ``(K, C / groups, ...)``.
        in_shape: of one sample, without the batch.
        out_shape: of one sample, without the batch.
        macs: multiply-accumulates for one sample, over all the times the layer is called.
        has_bias: whether a bias is added.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int
    has_bias: bool

    @property
    def num_weights(self) -> int:
        """Number of weights, without the bias."""
        count = 1
        for size in self.weight_shape:
            count *= size
        return count

    @property
    def num_params(self) -> int:
        """Number of weights and biases."""
        return self.num_weights + (self.weight_shape[0] if self.has_bias else 0)
