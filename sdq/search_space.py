"""What a search decides: units that get one bitwidth each, and the policy that follows.

A unit is the weight of a layer, of a block of layers or of the whole network, one output channel
of a layer, or a quantized activation.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sdq.config import Granularity
from sdq.layers import LayerSpec
from sdq.policy import BitwidthPolicy

if TYPE_CHECKING:  # it needs brevitas, and this file does not
    from sdq.quant_model import QuantModel


@dataclass(frozen=True)
class Unit:
    """What gets one bitwidth.

    Args:
        name: of the layer, block or activation quantizer; ``layer[k]`` for a channel.
        choices: its candidate bitwidths, ascending.
        layers: indices of the layers whose weight (or input) has this bitwidth.
        channel: the output channel it stands for; None for whole layers.
        is_act: whether it sets the layers' inputs rather than their weights.
    """

    name: str
    choices: tuple[int, ...]
    layers: tuple[int, ...]
    channel: int | None = None
    is_act: bool = False


@dataclass(frozen=True)
class SearchSpace:
    """All units of a network, and what is fixed.

    Args:
        layers: of the network, in execution order.
        policy: gives the bits of whatever no unit decides.
        units: weights first, then activations.
    """

    layers: tuple[LayerSpec, ...]
    policy: BitwidthPolicy
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, qmodel: "QuantModel", granularity: Granularity = "layer") -> "SearchSpace":
        """Return the space of a quantized model's searched layers and activations."""
        bits = list(qmodel.policy)
        searched = [i for i, b in enumerate(bits) if b.searched]
        index = {b.name: i for i, b in enumerate(bits)}
        groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for i in searched:
            # layers that may not have the same bitwidths cannot share one
            groups.setdefault((_group(bits[i].name, granularity), qmodel.choices(i)), []).append(i)
        units = [
            Unit(name, choices, tuple(members), channel)
            for (name, choices), members in groups.items()
            for channel in _parts(qmodel, qmodel.layers[members[0]], granularity)
        ]
        twice = Counter(name for name, _ in groups)
        units = [replace(unit, name=_unit_name(unit, twice[unit.name] > 1)) for unit in units]
        for path, readers in qmodel.searched_acts().items():
            assert qmodel.config.act_choices is not None
            members = [index[name] for name in readers]
            units.append(Unit(path, qmodel.config.act_choices, tuple(members), is_act=True))
        return cls(qmodel.layers, qmodel.policy, tuple(units))

    @property
    def act_units(self) -> tuple[Unit, ...]:
        """The units that decide activation bitwidths."""
        return tuple(unit for unit in self.units if unit.is_act)

    def policy_of(self, picks: Sequence[int]) -> BitwidthPolicy:
        """Return the policy in which unit ``u`` has its candidate number ``picks[u]``."""
        chosen = list(self.policy)
        channels: dict[int, list[int]] = {}
        for unit, pick in zip(self.units, picks, strict=True):
            bits = unit.choices[pick]
            for i in unit.layers:
                if unit.is_act:
                    chosen[i] = replace(chosen[i], act_bits=bits)
                elif unit.channel is None:
                    chosen[i] = replace(chosen[i], weight_bits=bits, channel_bits=None)
                else:
                    channels.setdefault(i, []).append(bits)
        for i, each in channels.items():
            chosen[i] = replace(chosen[i], weight_bits=max(each), channel_bits=tuple(each))
        return BitwidthPolicy(tuple(chosen))


def _unit_name(unit: Unit, shared: bool) -> str:
    """Return a unit's own name, where a block has units of different choices or channels."""
    choices = f" ({','.join(map(str, unit.choices))})" if shared else ""
    return unit.name + choices + (f"[{unit.channel}]" if unit.channel is not None else "")


def _group(name: str, granularity: Granularity) -> str:
    """Return the name of the unit that a layer belongs to."""
    if granularity == "network":
        return "network"
    if granularity == "block":
        return block_of(name)
    return name


def block_of(name: str) -> str:
    """Return the block a layer belongs to: its path through the first number, or its parent.

    A layer that is itself numbered, as in a plain Sequential, is a block of its own.

    >>> block_of("layer1.0.conv2"), block_of("features.3.conv.0.0"), block_of("features.7")
    ('layer1.0', 'features.3', 'features.7')
    >>> block_of("encoder.down.conv"), block_of("fc")
    ('encoder.down', 'fc')
    """
    parts = name.split(".")
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    if parts[-1].isdigit() or len(parts) == 1:
        return name
    return ".".join(parts[:-1])


def _parts(
    qmodel: "QuantModel", layer: LayerSpec, granularity: Granularity
) -> Sequence[int] | tuple[None]:
    """Return the channels of a layer that get bits of their own, or None for all together."""
    if granularity != "channel" or qmodel.weight_config(layer.name).weight_scale != "per_channel":
        return (None,)
    return range(layer.weight_shape[0])
