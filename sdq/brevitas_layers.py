"""Brevitas's layers with our quantizers in them.

Brevitas gives the layers, the integer tensors and the exporters; the numbers come from
:mod:`sdq.learned_scale`. This is the only file of the engine that imports Brevitas, and it is
imported when a network is first quantized: Brevitas takes longer to import than the engine.
"""

import warnings
from typing import Any

from torch import nn

from sdq.learned_scale import ActQuantizer, WeightQuantizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its imports warn of things that do not concern our users
    import brevitas.nn as qnn
    from brevitas.inject import ExtendedInjector
    from brevitas.inject.enum import FloatToIntImplType
    from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector


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


def quant_identity(quantizer: ActQuantizer) -> nn.Module:
    """Return a layer that quantizes what passes through it."""
    injector = _SignedActInjector if quantizer.signed else _UnsignedActInjector
    module = qnn.QuantIdentity(act_quant=injector, return_quant_tensor=False)
    module.act_quant.fused_activation_quant_proxy.tensor_quant = quantizer
    module.act_quant.init_tensor_quant = _keep
    return module


def quant_layer(old: Any, quantizer: WeightQuantizer) -> nn.Module:
    """Return Brevitas's form of a convolution or linear layer, with the same parameters."""
    common = {
        "bias": old.bias is not None,
        "weight_quant": _WeightInjector,
        "bias_quant": None,
        "return_quant_tensor": False,
    }
    new: nn.Module
    if isinstance(old, nn.Linear):
        new = qnn.QuantLinear(old.in_features, old.out_features, **common)
    elif isinstance(old, nn.ConvTranspose1d | nn.ConvTranspose2d):
        flat = isinstance(old, nn.ConvTranspose1d)
        kind = qnn.QuantConvTranspose1d if flat else qnn.QuantConvTranspose2d
        new = kind(
            old.in_channels, old.out_channels, old.kernel_size, stride=old.stride,
            padding=old.padding, output_padding=old.output_padding, dilation=old.dilation,
            groups=old.groups, **common,
        )  # fmt: skip
    else:
        assert isinstance(old, nn.Conv1d | nn.Conv2d)
        kind = qnn.QuantConv1d if isinstance(old, nn.Conv1d) else qnn.QuantConv2d
        new = kind(
            old.in_channels, old.out_channels, old.kernel_size, stride=old.stride,
            padding=old.padding, dilation=old.dilation, groups=old.groups,
            padding_mode=old.padding_mode, **common,
        )  # fmt: skip
    new.register_parameter("weight", old.weight)
    new.register_parameter("bias", old.bias)
    proxy: Any = new.weight_quant
    proxy.tensor_quant = quantizer
    proxy.init_tensor_quant = _keep
    return new.train(old.training)
