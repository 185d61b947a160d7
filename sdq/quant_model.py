"""From a float network to a Brevitas network with a bitwidth per layer, and back to policies.

The network is traced with torch.fx. Convolutions and linear layers become Brevitas layers; every
tensor that enters one is quantized once, where it is made, and whoever else reads it (a residual
addition, say) reads the quantized tensor. Batch normalisation stays as it is.
"""

import copy
import math
from collections.abc import Iterable, Sized
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from sdq import graph
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.learned_scale import ActQuantizer, WeightQuantizer
from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits


class QuantModel(nn.Module):
    """A network with a bitwidth for each layer. Called like the float network it came from.

    Its float master weights stay trainable; quantization happens in every forward pass. Made by
    :func:`quantize`.

    Attributes:
        net: the traced network with Brevitas layers.
        layers: a :class:`~sdq.layers.LayerSpec` for each quantizable layer, in execution order.
        config: the configuration it was made with.
        policy: the bits in force.
    """

    def __init__(
        self,
        net: fx.GraphModule,
        layers: tuple[LayerSpec, ...],
        config: QuantConfig,
        policy: BitwidthPolicy,
    ) -> None:
        super().__init__()
        self.net = net
        self.layers = layers
        self.config = config
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to the float network's output."""
        result: Tensor = self.net(x)
        return result

    def layer(self, name: str) -> nn.Module:
        """Return the Brevitas layer (a float layer where the policy says 32 bits)."""
        return self.net.get_submodule(name)

    def weight(self, name: str) -> Tensor:
        """Return a layer's float master weight ``(K, ...)``."""
        weight = self.layer(name).weight
        assert isinstance(weight, Tensor)
        return weight

    def weight_quantizer(self, name: str) -> nn.Module:
        """Return the module that quantizes a layer's weight."""
        quantizer = self.net.get_submodule(f"{name}.weight_quant").tensor_quant
        assert isinstance(quantizer, nn.Module)
        return quantizer

    def set_weight_quantizer_(self, name: str, quantizer: nn.Module) -> None:
        """Let another module quantize a layer's weight (the search does this)."""
        self.net.get_submodule(f"{name}.weight_quant").tensor_quant = quantizer

    def act_quantizers(self) -> dict[str, ActQuantizer]:
        """Return the activation quantizers by path, in execution order."""
        found: dict[str, ActQuantizer] = {}
        for node in self.net.graph.nodes:
            if node.op == "call_module":
                module = self.net.get_submodule(node.target)
                found |= {
                    str(node.target): quantizer
                    for quantizer in module.modules()
                    if isinstance(quantizer, ActQuantizer)
                }
        return found

    @property
    def calibrated(self) -> bool:
        """Whether every activation quantizer has its scale."""
        return all(bool(q.calibrated) for q in self.act_quantizers().values())


def quantize(model: nn.Module, config: QuantConfig | None = None, *, sample: Tensor) -> QuantModel:
    """Return a quantized copy of a float network; the network itself is left as it is.

    All searched layers start at the highest candidate bitwidth. Activation scales are not set yet:
    ``sdq.search`` and ``sdq.finetune_`` calibrate, or call :func:`calibrate_`.

    Args:
        model: any network of convolutions and linear layers that torch.fx can trace.
        config: bit choices, activation bits, scales.
        sample: an input ``(N, C, H, W)``, for shapes only (zeros will do).

    Raises:
        RequestError: nothing to quantize, a layer that cannot be, control flow that depends on
            data, weights that are not finite, or a sample that does not fit the network.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    >>> qmodel = quantize(net, QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
    >>> [(bits.name, bits.weight_bits) for bits in qmodel.policy]
    [('0', 8), ('3', 8)]
    """
    from sdq import brevitas_layers  # here: only who quantizes waits for Brevitas

    config = config or QuantConfig()
    _check_weights(model)
    net = graph.trace(copy.deepcopy(model))
    layers = graph.measure(net, sample)
    policy = _first_policy(layers, config)
    policy = _insert_act_quantizers(net, policy, config)
    for bits in policy:
        if bits.weight_bits != FLOAT_BITS:
            old = net.get_submodule(bits.name)
            assert isinstance(old.weight, Tensor)
            quantizer = new_weight_quantizer(old.weight, bits.weight_bits, config)
            net.set_submodule(bits.name, brevitas_layers.quant_layer(old, quantizer))
    net.recompile()
    return QuantModel(net, layers, config, policy)


def apply_policy_(qmodel: QuantModel, policy: BitwidthPolicy) -> None:
    """Give the layers a policy's weight bits, with fresh scales where the bits change.

    Raises:
        RequestError: the policy is of another network, or has bits outside the choices.
    """
    names = [bits.name for bits in qmodel.policy]
    if [bits.name for bits in policy] != names:
        other = next((b.name for b in policy if b.name not in names), "another order of layers")
        raise RequestError(
            f"policy: must name the network's {len(names)} layers in order, got {len(policy)} "
            f"with {other!r}; use the network it was learned for"
        )
    for new, old in zip(policy, qmodel.policy, strict=True):
        if (new.act_bits, new.searched, new.num_weights) != (
            old.act_bits, old.searched, old.num_weights,
        ):  # fmt: skip
            raise RequestError(
                f"policy: layer {new.name}: act_bits, searched and num_weights must be "
                f"{(old.act_bits, old.searched, old.num_weights)}, "
                f"got {(new.act_bits, new.searched, new.num_weights)}; quantize with the "
                "configuration the policy was learned with"
            )
        if new.searched and new.weight_bits not in qmodel.config.bit_choices:
            raise RequestError(
                f"policy: layer {new.name}: weight_bits must be one of "
                f"{qmodel.config.bit_choices}, got {new.weight_bits}"
            )
        if not new.searched and new.weight_bits != old.weight_bits:
            raise RequestError(
                f"policy: layer {new.name}: is pinned at {old.weight_bits} bits, "
                f"got {new.weight_bits}"
            )
    for new in policy:
        if not new.searched:
            continue
        current = qmodel.weight_quantizer(new.name)
        if not (isinstance(current, WeightQuantizer) and current.bits == new.weight_bits):
            qmodel.set_weight_quantizer_(
                new.name,
                new_weight_quantizer(qmodel.weight(new.name), new.weight_bits, qmodel.config),
            )
    qmodel.policy = policy


CALIBRATION_IMAGES = 256
"""Their millions of activations fix a scale as well as those of a thousand images do."""


@torch.no_grad()
def calibrate_(
    qmodel: QuantModel, batches: Iterable[tuple[Tensor, Tensor]], steps: int = 8
) -> None:
    """Set every activation scale from a few batches passed through the network in float.

    Args:
        qmodel: changed in place; its training mode is kept.
        batches: of ``(images, labels)``, shuffled; the labels are not used.
        steps: number of batches to look at. Of large ones only the first images are used, 256 in
            all.
    """
    count = min(steps, len(batches)) if isinstance(batches, Sized) else steps
    share = math.ceil(CALIBRATION_IMAGES / max(count, 1))
    quantizers = qmodel.act_quantizers().values()
    device = next(qmodel.parameters()).device
    training = qmodel.training
    qmodel.eval()
    for quantizer in quantizers:
        quantizer.observing = True
    try:
        for step, (images, _) in enumerate(batches):
            if step == steps:
                break
            qmodel(images[:share].to(device))
    finally:
        for quantizer in quantizers:
            quantizer.settle_()
        qmodel.train(training)


def _check_weights(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RequestError(
                f"model: tensor {name!r} must be finite, got NaN or infinity; train it again"
            )


def _first_policy(layers: tuple[LayerSpec, ...], config: QuantConfig) -> BitwidthPolicy:
    fixed, highest = config.first_last_bits, config.bit_choices[-1]
    bits = []
    for spec in layers:
        first, last = spec is layers[0], spec is layers[-1]
        weight, act, searched = highest, config.act_bits, True
        if fixed is not None and (first or last):
            weight, act, searched = fixed, max(fixed, 2), False  # one bit cannot hold activations
        if first:
            act = config.input_bits if fixed != FLOAT_BITS else FLOAT_BITS
        bits.append(LayerBits(spec.name, weight, act, searched, spec.num_weights))
    return BitwidthPolicy(tuple(bits))


def _insert_act_quantizers(
    net: fx.GraphModule, policy: BitwidthPolicy, config: QuantConfig
) -> BitwidthPolicy:
    """Quantize every tensor that enters a layer; return the policy with the bits it then has.

    A tensor read by layers of different activation bits is quantized once, at the most of them.
    """
    from sdq import brevitas_layers

    wanted = {bits.name: bits.act_bits for bits in policy}
    readers: dict[fx.Node, list[str]] = {}
    for node in net.graph.nodes:
        if node.op == "call_module" and node.target in wanted:
            source = node.args[0] if node.args else node.kwargs["input"]
            readers.setdefault(source, []).append(str(node.target))
    actual = dict(wanted)
    # all signs first: what is inserted below is not in the tables of graph.never_negative
    signed = {source: not graph.never_negative(net, source) for source in readers}
    for source, names in readers.items():
        quantized = [wanted[name] for name in names if wanted[name] != FLOAT_BITS]
        if not quantized:
            continue
        actual |= dict.fromkeys(names, max(quantized))
        quantizer = ActQuantizer(max(quantized), signed[source], config.restrict_scale)
        module = brevitas_layers.quant_identity(quantizer)
        graph.insert_after(net, source, f"{names[0]}_input", module)
    return BitwidthPolicy(tuple(replace(bits, act_bits=actual[bits.name]) for bits in policy))


def new_weight_quantizer(weight: Tensor, bits: int, config: QuantConfig) -> WeightQuantizer:
    """Return a quantizer for a weight ``(K, ...)`` with the configuration's kind of scale."""
    per_channel = config.weight_scale == "per_channel"
    return WeightQuantizer(weight, bits, per_channel, config.restrict_scale)
