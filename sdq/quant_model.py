"""From a float network to a Brevitas network with a bitwidth per layer, and back to policies.

The network is traced with torch.fx. Convolutions and linear layers become Brevitas layers; every
tensor that enters one is quantized once, where it is made, and whoever else reads it (a residual
addition, say) reads the quantized tensor. Batch normalisation stays as it is. The quantizers
themselves are ours (:mod:`sdq.learned_scale`); Brevitas gives the layers, the integer tensors and
the exporters.

This is the only file of the engine that imports Brevitas.
"""

import copy
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.layers import LayerSpec
from sdq.learned_scale import ActQuantizer, WeightQuantizer
from sdq.policy import FLOAT_BITS, BitwidthPolicy, LayerBits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of things that do not concern our users
    import brevitas.nn as qnn
    from brevitas.inject import ExtendedInjector
    from brevitas.inject.enum import FloatToIntImplType
    from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector

_KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Linear: "linear",
}

_REFUSED = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LazyLinear,
)

_REFUSED_CALLS: dict[Any, str] = {
    getattr(nn.functional, name): f"functional.{name}"
    for name in (
        "linear", "bilinear", "conv1d", "conv2d", "conv3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    )
}  # fmt: skip

_NEVER_NEGATIVE: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Softmax)
_KEEPS_SIGN: tuple[type[nn.Module], ...] = (
    nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d,
    nn.Upsample,
)  # fmt: skip
_NEVER_NEGATIVE_CALLS = {"relu", "relu_", "relu6", "sigmoid", "softmax"}
_KEEPS_SIGN_CALLS = {
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "max_pool1d", "boolean_dispatch", "flatten",
    "mean", "view", "reshape", "contiguous", "getitem", "cat", "add", "iadd", "mul", "dropout",
    "squeeze", "unsqueeze", "permute", "transpose", "pad", "amax",
}  # fmt: skip
_KEEPS_SIGN_UNLESS_NEGATIVE_NUMBER = {"add", "iadd", "mul", "pad"}

_DROPOUTS: dict[Any, type[nn.Module]] = {
    nn.functional.dropout: nn.Dropout,
    nn.functional.dropout1d: nn.Dropout1d,
    nn.functional.dropout2d: nn.Dropout2d,
    nn.functional.dropout3d: nn.Dropout3d,
    nn.functional.alpha_dropout: nn.AlphaDropout,
    nn.functional.feature_alpha_dropout: nn.FeatureAlphaDropout,
}


class _Placeholder(nn.Module):
    """Stands in an injector until our quantizer takes its place (injectors refuse *args)."""

    def __init__(self) -> None:
        super().__init__()


class _WeightInjector(ExtendedInjector):
    """What Brevitas's proxies and exporters ask of a weight quantizer besides the numbers."""

    proxy_class = WeightQuantProxyFromInjector
    tensor_quant = _Placeholder
    signed = True
    narrow_range = False
    float_to_int_impl_type = FloatToIntImplType.ROUND


class _SignedActInjector(ExtendedInjector):
    proxy_class = ActQuantProxyFromInjector
    tensor_quant = _Placeholder
    signed = True
    narrow_range = False
    float_to_int_impl_type = FloatToIntImplType.ROUND


class _UnsignedActInjector(_SignedActInjector):
    signed = False


def _keep() -> None:
    """Stand in for a proxy's ``init_tensor_quant``, which would put Brevitas's quantizer back."""


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
        found = {}
        for node in self.net.graph.nodes:
            if node.op == "call_module":
                module = self.net.get_submodule(node.target)
                if isinstance(module, qnn.QuantIdentity):
                    proxy = module.act_quant.fused_activation_quant_proxy
                    found[str(node.target)] = proxy.tensor_quant
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
    config = config or QuantConfig()
    _check_weights(model)
    net = _trace(copy.deepcopy(model))
    layers = _measure(net, sample)
    policy = _first_policy(layers, config)
    policy = _insert_act_quantizers(net, policy, config)
    for bits in policy:
        if bits.weight_bits != FLOAT_BITS:
            _replace_layer(net, bits, config)
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


@torch.no_grad()
def calibrate_(
    qmodel: QuantModel, batches: Iterable[tuple[Tensor, Tensor]], steps: int = 8
) -> None:
    """Set every activation scale from a few batches passed through the network in float.

    Args:
        qmodel: changed in place; its training mode is kept.
        batches: of ``(images, labels)``; the labels are not used.
        steps: number of batches to look at.
    """
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
            qmodel(images.to(device))
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


def _trace(model: nn.Module) -> fx.GraphModule:
    for name, module in model.named_modules():
        if isinstance(module, _REFUSED):
            raise RequestError(
                f"model: layer {name!r} is a {type(module).__name__}, which cannot be quantized "
                f"yet; quantizable are {', '.join(k.__name__ for k in _KINDS)}"
            )
        if isinstance(module, tuple(_KINDS)) and type(module) not in _KINDS:
            raise RequestError(
                f"model: layer {name!r} is a {type(module).__name__}, whose forward may differ "
                f"from torch's; use one of {', '.join(k.__name__ for k in _KINDS)} itself"
            )
    try:
        net = fx.symbolic_trace(model)
    except (fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise RequestError(
            f"model: {type(model).__name__} must be traceable by torch.fx, but its forward "
            f"depends on the data: {error}; move that out of forward"
        ) from error
    for node in net.graph.nodes:
        if node.op == "call_function" and node.target in _REFUSED_CALLS:
            raise RequestError(
                f"model: {_REFUSED_CALLS[node.target]} is called in forward ({node.name}) and "
                "would stay in float; use the module that does the same"
            )
    _module_dropout(net)
    return net


def _module_dropout(net: fx.GraphModule) -> None:
    """Turn ``F.dropout`` and its kin into modules: tracing would freeze their ``training``."""
    for node in list(net.graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            name = f"{node.name}_module"
            net.add_submodule(name, _DROPOUTS[node.target](p))
            with net.graph.inserting_after(node):
                new = net.graph.call_module(name, tuple(node.all_input_nodes))
            node.replace_all_uses_with(new)
            net.graph.erase_node(node)
    net.recompile()


def _measure(net: fx.GraphModule, sample: Tensor) -> tuple[LayerSpec, ...]:
    """Run the sample through and note shapes and multiply-accumulates, in execution order."""
    specs: dict[str, LayerSpec] = {}
    order = [str(n.target) for n in net.graph.nodes if n.op == "call_module"]
    handles = []

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        # every output element takes one multiply for each weight of its channel
        macs = output[0].numel() * weight[0].numel()
        if name in specs:
            macs += specs[name].macs
        specs[name] = LayerSpec(
            name, _KINDS[type(module)], tuple(weight.shape), tuple(inputs[0].shape[1:]),
            tuple(output.shape[1:]), macs, module.bias is not None,
        )  # fmt: skip

    for name in dict.fromkeys(order):
        module = net.get_submodule(name)
        if type(module) in _KINDS:
            handles.append(
                module.register_forward_hook(
                    lambda m, inputs, output, name=name: note(name, m, inputs, output)
                )
            )
    training = net.training
    net.eval()
    try:
        with torch.no_grad():
            net(sample)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"model: must accept a sample of shape {tuple(sample.shape)} (N, C, H, W), "
            f"but: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
        net.train(training)
    if not specs:
        raise RequestError(
            "model: must have a convolution or linear layer to quantize, got "
            + (", ".join(sorted({type(m).__name__ for m in net.children()})) or "no layers")
        )
    return tuple(specs.values())


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
    wanted = {bits.name: bits.act_bits for bits in policy}
    readers: dict[fx.Node, list[str]] = {}
    for node in net.graph.nodes:
        if node.op == "call_module" and node.target in wanted:
            source = node.args[0] if node.args else node.kwargs["input"]
            readers.setdefault(source, []).append(str(node.target))
    actual = dict(wanted)
    for source, names in readers.items():
        quantized = [wanted[name] for name in names if wanted[name] != FLOAT_BITS]
        if not quantized:
            continue
        actual |= dict.fromkeys(names, max(quantized))
        signed = not _never_negative(net, source)
        quantizer = ActQuantizer(max(quantized), signed, config.restrict_scale)
        _insert_after(net, source, f"{names[0]}_input", _quant_identity(quantizer))
    return BitwidthPolicy(tuple(replace(bits, act_bits=actual[bits.name]) for bits in policy))


def _insert_after(net: fx.GraphModule, source: fx.Node, name: str, module: nn.Module) -> None:
    """Let everything that reads ``source`` read ``module(source)`` instead."""
    while _has_submodule(net, name):  # a layer called twice has two inputs
        name += "_again"
    net.add_submodule(name, module)
    with net.graph.inserting_after(source):
        new = net.graph.call_module(name, (source,))
    for user in list(source.users):
        if user is not new:
            user.replace_input_with(source, new)


def _has_submodule(net: fx.GraphModule, name: str) -> bool:
    try:
        net.get_submodule(name)
    except AttributeError:
        return False
    return True


def _never_negative(net: fx.GraphModule, node: fx.Node) -> bool:
    """Tell from the graph alone whether a tensor can have no negative value."""
    if node.op == "call_module":
        module = net.get_submodule(str(node.target))
        kind = type(module)
        known, keeps = kind in _NEVER_NEGATIVE, kind in _KEEPS_SIGN
        if isinstance(module, nn.Upsample) and module.mode == "bicubic":
            keeps = False  # a cubic overshoots
        if kind is qnn.QuantIdentity:
            keeps = True
    elif node.op in ("call_function", "call_method"):
        name = node.target if isinstance(node.target, str) else node.target.__name__
        known, keeps = name in _NEVER_NEGATIVE_CALLS, name in _KEEPS_SIGN_CALLS
        if name in _KEEPS_SIGN_UNLESS_NEGATIVE_NUMBER:  # as in relu(x) - 1, written x + (-1)
            numbers = (*node.args, *node.kwargs.values())
            keeps = not any(isinstance(n, int | float) and n < 0 for n in numbers)
    else:
        return False
    if known:
        return True
    return keeps and all(_never_negative(net, source) for source in node.all_input_nodes)


def _quant_identity(quantizer: ActQuantizer) -> nn.Module:
    injector = _SignedActInjector if quantizer.signed else _UnsignedActInjector
    module = qnn.QuantIdentity(act_quant=injector, return_quant_tensor=False)
    module.act_quant.fused_activation_quant_proxy.tensor_quant = quantizer
    module.act_quant.init_tensor_quant = _keep
    return module


def new_weight_quantizer(weight: Tensor, bits: int, config: QuantConfig) -> WeightQuantizer:
    """Return a quantizer for a weight ``(K, ...)`` with the configuration's kind of scale."""
    per_channel = config.weight_scale == "per_channel"
    return WeightQuantizer(weight, bits, per_channel, config.restrict_scale)


def _replace_layer(net: fx.GraphModule, bits: LayerBits, config: QuantConfig) -> None:
    old: Any = net.get_submodule(bits.name)
    common = {
        "bias": old.bias is not None,
        "weight_quant": _WeightInjector,
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = qnn.QuantLinear(old.in_features, old.out_features, **common)
    else:
        assert isinstance(old, nn.Conv1d | nn.Conv2d)
        kind = qnn.QuantConv1d if isinstance(old, nn.Conv1d) else qnn.QuantConv2d
        new = kind(
            old.in_channels, old.out_channels, old.kernel_size, stride=old.stride,
            padding=old.padding, dilation=old.dilation, groups=old.groups,
            padding_mode=old.padding_mode, **common,
        )  # fmt: skip
    weight = old.weight
    assert isinstance(weight, nn.Parameter)
    new.register_parameter("weight", weight)
    new.register_parameter("bias", old.bias)
    proxy: Any = new.weight_quant
    proxy.tensor_quant = new_weight_quantizer(weight, bits.weight_bits, config)
    proxy.init_tensor_quant = _keep
    new.train(old.training)
    net.set_submodule(bits.name, new)
