"""From a float network to a Brevitas network with a bitwidth per layer, and back to policies.

The network is traced with torch.fx. Convolutions and linear layers become Brevitas layers; every
tensor that enters one is quantized once, where it is made, and whoever else reads it (a residual
addition, say) reads the quantized tensor. Batch normalisation stays as it is.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from sdq import act_points, batch_norm, graph, integer_bias, signs, tracing
from sdq.channel_bits import SettledQuantizer
from sdq.config import QuantConfig
from sdq.errors import RequestError, named
from sdq.layers import LayerSpec
from sdq.learned_scale import ActQuantizer, WeightQuantizer
from sdq.mid_rise import DorefaQuantizer, EntropyQuantizer
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
        self.training = net.training
        self.layers = layers
        self.config = config
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, C, H, W)`` to the float network's output."""
        result: Tensor = self.net(x)
        return result

    def layer(self, name: str) -> nn.Module:
        """Return the Brevitas layer (a float layer where the policy says 32 bits)."""
        return self.net.get_submodule(self.spec(name).name)

    def spec(self, name: str) -> LayerSpec:
        """Return what is known of a layer; RequestError if there is none of this name."""
        otherwise = f"layer {name!r:.100}: must be one of the network's, but is none"
        return named(name, self.layers, otherwise)

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

    def settled_quantizer(self, name: str) -> SettledQuantizer:
        """Return what quantizes a layer's weight; RequestError while a search does."""
        quantizer = self.weight_quantizer(name)
        if not isinstance(quantizer, SettledQuantizer):
            raise RequestError(
                f"layer {name}: bits must be settled, got a {type(quantizer).__name__}; "
                "finish the search, then sdq.apply_policy_"
            )
        return quantizer

    def new_weight_quantizer(self, name: str, bits: int) -> WeightQuantizer:
        """Return a fresh quantizer of a layer's weight."""
        quantizer = new_weight_quantizer(self.weight(name), bits, self.weight_config(name))
        self.fit_bias_(name, quantizer)
        return quantizer

    def fit_bias_(self, name: str, quantizer: SettledQuantizer) -> None:
        """Let a fresh quantizer's scales suit a layer's bias, where biases are integers."""
        if self.config.integer_bias:
            bias = self.layer(name).bias
            integer_bias.fit_scales_(quantizer, self.weight(name), bias)  # type: ignore[arg-type]

    def weight_config(self, name: str) -> QuantConfig:
        """Return the configuration as it holds for a layer's weight."""
        return weight_config(self.config, self.spec(name), self.policy[name].searched)

    def set_weight_quantizer_(self, name: str, quantizer: nn.Module) -> None:
        """Let another module quantize a layer's weight (the search does this)."""
        self.net.get_submodule(f"{name}.weight_quant").tensor_quant = quantizer

    def act_quantizers(self) -> dict[str, ActQuantizer]:
        """Return the activation quantizers by path, in execution order."""
        return {str(node.target): self._act_proxy(node).tensor_quant for node in self._act_nodes()}

    def act_modules(self) -> dict[str, nn.Module]:
        """Return the modules that hold the activation quantizers, by the same paths.

        Tensors of one scale have a module each and one quantizer in all of them.
        """
        return {str(n.target): self.net.get_submodule(str(n.target)) for n in self._act_nodes()}

    def set_act_quantizer_(self, path: str, quantizer: nn.Module) -> None:
        """Let another module quantize an activation, and all that share its scale."""
        proxies = {str(node.target): self._act_proxy(node) for node in self._act_nodes()}
        current = proxies[path].tensor_quant
        for proxy in proxies.values():
            if proxy.tensor_quant is current:
                proxy.tensor_quant = quantizer

    def _act_nodes(self) -> list[fx.Node]:
        return [
            node
            for node in self.net.graph.nodes
            if node.op == "call_module"
            and hasattr(self.net.get_submodule(node.target), "act_quant")
            and not hasattr(self.net.get_submodule(node.target), "weight_quant")
        ]

    def _act_proxy(self, node: fx.Node) -> Any:
        module: Any = self.net.get_submodule(str(node.target))
        return module.act_quant.fused_activation_quant_proxy

    def _readers(self, node: fx.Node) -> Iterator[str]:
        """Yield the modules that read a tensor, also behind what only passes it on."""
        for user in node.users:
            if user.op == "call_module":
                yield str(user.target)
            if act_points.passes_on(self.net, user):
                yield from self._readers(user)

    def input_quantizer(self, name: str) -> str | None:
        """Return the path of the activation quantizer whose codes a layer reads, if there is one.

        Of a layer that is called several times, the last call counts.
        """
        calls = [n for n in self.net.graph.nodes if n.op == "call_module" and n.target == name]
        source = act_points.origin(self.net, calls[-1].all_input_nodes[0])
        found = source.op == "call_module" and source in self._act_nodes()
        return str(source.target) if found else None

    def choices(self, layer: int) -> tuple[int, ...]:
        """Return the candidate weight bitwidths of a layer, by index."""
        name = self.policy.layers[layer].name
        return _last_match(self.config.layer_choices, name) or self.config.bit_choices

    def searched_acts(self) -> dict[str, tuple[str, ...]]:
        """Return the activation quantizers whose bitwidth is to be learned, with their readers.

        Of a quantizer that several tensors share, the first path stands for all. The network's
        input, what a pinned layer reads, and what a layer reads that is called with several
        inputs (a policy has one bitwidth for the input of a layer) keep their bits.
        """
        if self.config.act_choices is None:
            return {}
        searched = {bits.name for bits in self.policy if bits.searched}
        names = {bits.name for bits in self.policy}
        first: dict[int, str] = {}
        readers: dict[str, list[str]] = {}
        fixed = set[str]()
        for node in self._act_nodes():
            path = first.setdefault(id(self._act_proxy(node).tensor_quant), str(node.target))
            found = readers.setdefault(path, [])
            found += [name for name in self._readers(node) if name in names]
            if act_points.origin(self.net, node.all_input_nodes[0]).op == "placeholder":
                fixed.add(path)
        distinct = {path: tuple(dict.fromkeys(found)) for path, found in readers.items()}
        inputs = Counter(name for found in distinct.values() for name in found)
        alone = {name for name in searched if inputs[name] == 1}
        return {
            path: found
            for path, found in distinct.items()
            if path not in fixed and found and alone.issuperset(found)
        }

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
    if isinstance(model, QuantModel):
        raise RequestError("model: must be a float network, got one that is quantized already")
    _check_weights(model)
    net = tracing.trace(model, sample, config.skip)
    if config.batch_norm != "train":
        batch_norm.settle_(net, sample, fold=config.batch_norm == "fold")
    layers = graph.measure(net, sample)
    policy = _first_policy(layers, config)
    policy = _insert_act_quantizers(net, policy, config, sample)
    for spec, bits in zip(layers, policy, strict=True):
        if bits.weight_bits != FLOAT_BITS:
            old = net.get_submodule(bits.name)
            assert isinstance(old.weight, Tensor)
            own = weight_config(config, spec, bits.searched)
            quantizer = new_weight_quantizer(old.weight, bits.weight_bits, own)
            if config.integer_bias:
                integer_bias.fit_scales_(quantizer, old.weight, old.bias)  # type: ignore[arg-type]
            net.set_submodule(bits.name, brevitas_layers.quant_layer(old, quantizer))
    if config.integer_bias:
        integer_bias.install_(net, {b.name for b in policy if b.weight_bits != FLOAT_BITS})
    net.recompile()
    return QuantModel(net, layers, config, policy)


def _check_weights(model: nn.Module) -> None:
    # a buffer may be infinite for good reason, as the mask of an attention is; statistics may not
    statistics = (
        (f"{path}.{name}".lstrip("."), tensor)
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, tensor in module.named_buffers(recurse=False)
    )
    for name, tensor in [*model.named_parameters(), *statistics]:
        if is_lazy(tensor):  # the module is refused by name
            continue
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise RequestError(
                f"model: tensor {name!r} must be finite, got NaN or infinity; train it again"
            )


def _last_match(rules: Iterable[tuple[str, Any]], name: str) -> Any:
    """Return what the last rule says whose pattern matches, or None."""
    return next((value for pattern, value in reversed(list(rules)) if fnmatchcase(name, pattern)),
                None)  # fmt: skip


def _check_patterns(layers: tuple[LayerSpec, ...], config: QuantConfig) -> None:
    """Raise RequestError for a pattern that no layer matches: a typing error, most likely."""
    names = [spec.name for spec in layers]
    for pattern, _ in (*config.pins, *config.layer_choices):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise RequestError(
                f"model: pattern {pattern!r} must match a layer, but matches none of "
                f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
            )


def _first_policy(layers: tuple[LayerSpec, ...], config: QuantConfig) -> BitwidthPolicy:
    _check_patterns(layers, config)
    fixed = config.first_last_bits
    ends = [spec for spec in layers if spec.kind != "float"]
    bits = []
    for spec in layers:
        first, last = spec is ends[0], spec is ends[-1]
        choices = _last_match(config.layer_choices, spec.name) or config.bit_choices
        weight, act, searched = choices[-1], config.act_bits, True
        if fixed is not None and (first or last):
            weight, act, searched = fixed, max(fixed, 2), False  # one bit cannot hold activations
        if first:
            act = config.input_bits if fixed != FLOAT_BITS else FLOAT_BITS
        pin = _last_match(config.pins, spec.name)
        if spec.kind == "float" or any(fnmatchcase(spec.name, p) for p in config.skip):
            pin = FLOAT_BITS
        if pin is not None:
            # a layer left in float takes its input as it comes; any other needs it quantized
            weight, searched = pin, False
            act = FLOAT_BITS if pin == FLOAT_BITS else act
        bits.append(LayerBits(spec.name, weight, act, searched, spec.num_weights))
    return BitwidthPolicy(tuple(bits))


def _insert_act_quantizers(
    net: fx.GraphModule, policy: BitwidthPolicy, config: QuantConfig, sample: Tensor
) -> BitwidthPolicy:
    """Quantize every tensor that enters a layer; return the policy with the bits it then has.

    Tensors of one scale, and a tensor read by layers of different activation bits, get the most
    bits of all.
    """
    from sdq import brevitas_layers

    wanted = {bits.name: bits.act_bits for bits in policy}
    groups = act_points.act_groups(net, set(wanted), config.integer_datapath, sample)
    # all signs first: what is inserted below is not in the tables of sdq.signs
    signed = [not all(signs.never_negative(net, s) for s in group.sources) for group in groups]
    actual, known = dict(wanted), set[str]()
    for group, sign in zip(groups, signed, strict=True):
        quantized = [wanted[name] for name in group.layers if wanted[name] != FLOAT_BITS]
        bits = max(quantized, default=FLOAT_BITS if group.layers else config.act_bits)
        if bits == FLOAT_BITS:
            continue
        # a layer that is called with several inputs counts with the widest
        actual |= {n: max(bits, actual[n]) if n in known else bits for n in group.layers}
        known.update(group.layers)
        quantizer = ActQuantizer(bits, sign, config.restrict_scale)
        for source, names in group.readers.items():
            name = f"{names[0]}_input" if names else f"{source.name}_output"
            graph.insert_after(net, source, name, brevitas_layers.quant_identity(quantizer))
    return BitwidthPolicy(tuple(replace(bits, act_bits=actual[bits.name]) for bits in policy))


def weight_config(config: QuantConfig, layer: LayerSpec, searched: bool) -> QuantConfig:
    """Return the configuration as it holds for one layer's weight."""
    changes: dict[str, str] = {}
    if not searched:  # at 8 bits a transform gains nothing, and LSQ's codes fit int8
        changes |= {"weight_quantizer": "lsq", "weight_magnitude": "learned"}
    if layer.kind.startswith("conv_transpose"):
        # its output channels are not the first dimension, and with groups no dimension at all;
        # runtimes have integer kernels for one scale alone
        changes["weight_scale"] = "per_tensor"
    return config.replaced(**changes) if changes else config


def new_weight_quantizer(weight: Tensor, bits: int, config: QuantConfig) -> WeightQuantizer:
    """Return a quantizer of the configuration's kind for a searched weight ``(K, ...)``."""
    per_channel, restrict = config.weight_scale == "per_channel", config.restrict_scale
    if config.weight_quantizer == "lsq":
        return WeightQuantizer(weight, bits, per_channel, restrict)
    kind = DorefaQuantizer if config.weight_quantizer == "dorefa" else EntropyQuantizer
    return kind(weight, bits, per_channel, restrict, paper=config.weight_magnitude == "paper")
