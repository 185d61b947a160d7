"""What a quantizable layer is: its shapes, weights and multiply-accumulates."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Between:
    """An operation without weights: pooling, an addition, and what else a device builds for it.

    Args:
        kind: ``max_pool``, ``avg_pool``, ``global_pool``, ``add``, ``multiply``, ``concat``,
            ``upsample``, ``flatten``, or ``fork`` for a tensor that several read.
        in_shape: of one sample, without the batch; of the first operand.
        out_shape: of one sample, without the batch.
        kernel: window of a pooling, an entry a dimension; empty for others.
        stride: of a pooling, likewise.
        padding: of a pooling, both sides together, likewise.
    """

    kind: str
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerSpec:
    """One convolution or linear layer, as seen with one input sample.

    Args:
        name: path in the network, e.g. ``layer1.0.conv1``.
        kind: ``conv1d``, ``conv2d``, ``conv_transpose1d``, ``conv_transpose2d`` or ``linear``; or
            ``float`` for a module that was kept whole.
        weight_shape: ``(K, C / groups, ...)``, of transposed convolutions too; ``(weights, 1)`` of
            kind ``float``.
        in_shape: of one sample, without the batch.
        out_shape: of one sample, without the batch.
        macs: multiply-accumulates for one sample, over all the times the layer is called.
        has_bias: whether a bias is added.
        stride: of a convolution, an entry a dimension; empty for other layers.
        padding: of a convolution, both sides together, likewise.
        dilation: of a convolution, likewise.
        before: operations without weights since the layer before it, in execution order. Devices
            that build hardware for them charge it to this layer, whose ``act_bits`` they carry.
    """

    name: str
    kind: str
    weight_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    macs: int
    has_bias: bool
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    before: tuple[Between, ...] = ()

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
