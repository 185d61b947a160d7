"""Give a quantized network the bits of a policy."""

from functools import partial

from sdq.calibration import like
from sdq.channel_bits import ChannelWeightQuantizer
from sdq.errors import RequestError
from sdq.learned_scale import WeightQuantizer
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.quant_model import QuantModel, new_weight_quantizer


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
    for layer, (new, old) in enumerate(zip(policy, qmodel.policy, strict=True)):
        _check_layer(qmodel, layer, new, old)
    _set_acts_(qmodel, policy)
    for new in policy:
        if not new.searched:
            continue
        current, weight = qmodel.weight_quantizer(new.name), qmodel.weight(new.name)
        if new.channel_bits is not None:
            if getattr(current, "channel_bits", None) != new.channel_bits:
                quantizer = ChannelWeightQuantizer(
                    weight, new.channel_bits,
                    partial(new_weight_quantizer, config=qmodel.weight_config(new.name)),
                )  # fmt: skip
                qmodel.fit_bias_(new.name, quantizer)
                qmodel.set_weight_quantizer_(new.name, quantizer)
        elif not (isinstance(current, WeightQuantizer) and current.bits == new.weight_bits):
            qmodel.set_weight_quantizer_(
                new.name, qmodel.new_weight_quantizer(new.name, new.weight_bits)
            )
    qmodel.policy = policy


def _check_layer(qmodel: QuantModel, layer: int, new: LayerBits, old: LayerBits) -> None:
    """Raise RequestError if a layer cannot have these bits."""
    if (new.searched, new.num_weights) != (old.searched, old.num_weights):
        raise RequestError(
            f"policy: layer {new.name}: searched and num_weights must be "
            f"{(old.searched, old.num_weights)}, got {(new.searched, new.num_weights)}; "
            "quantize with the configuration the policy was learned with"
        )
    choices = qmodel.choices(layer)
    if not new.searched:
        if new.weight_bits != old.weight_bits:
            raise RequestError(
                f"policy: layer {new.name}: is pinned at {old.weight_bits} bits, "
                f"got {new.weight_bits}"
            )
        if new.channel_bits is not None:
            raise RequestError(
                f"policy: layer {new.name}: is pinned at {old.weight_bits} bits and must have no "
                "channel_bits; remove them"
            )
    elif wrong := set(new.channel_bits or (new.weight_bits,)) - set(choices):
        raise RequestError(
            f"policy: layer {new.name}: weight_bits must be one of {choices}, got {min(wrong)}"
        )
    if new.channel_bits is not None:
        channels = qmodel.layers[layer].weight_shape[0]
        scale = qmodel.weight_config(new.name).weight_scale
        if len(new.channel_bits) != channels or scale != "per_channel":
            raise RequestError(
                f"policy: layer {new.name}: channel_bits must be one for each of {channels} "
                f"channels, with per_channel scales, got {len(new.channel_bits)} with "
                f"{scale} scales"
            )


def _set_acts_(qmodel: QuantModel, policy: BitwidthPolicy) -> None:
    """Give activations a policy's bits; one whose bits change needs calibration again."""
    free, before = qmodel.searched_acts(), qmodel.policy
    learned = {name for readers in free.values() for name in readers}
    for new in policy:
        old = before[new.name].act_bits
        if new.act_bits != old and (
            new.name not in learned or new.act_bits not in (qmodel.config.act_choices or ())
        ):
            raise RequestError(
                f"policy: layer {new.name}: act_bits must be {old}, got {new.act_bits}; quantize "
                "with the configuration the policy was learned with"
            )
    quantizers = qmodel.act_quantizers()
    for path, readers in free.items():
        bits = {policy[name].act_bits for name in readers}
        if len(bits) > 1:
            raise RequestError(
                f"policy: layers {', '.join(readers)}: act_bits must be the same, for they read "
                f"the same tensor, got {sorted(bits)}"
            )
        old_quantizer = quantizers[path]
        (wanted,) = bits
        if old_quantizer.bits != wanted:
            qmodel.set_act_quantizer_(path, like(old_quantizer, wanted, qmodel.config))
