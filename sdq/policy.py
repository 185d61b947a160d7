"""A bitwidth policy: how many bits each layer's weights and input activations get.

Immutable, and written as JSON with a schema version, so that a policy outlives the run that
learned it.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from sdq.errors import RequestError, named, nearest

SCHEMA = "sdq.policy/1"
FLOAT_BITS = 32
"""The bitwidth that stands for "not quantized"."""


@dataclass(frozen=True)
class LayerBits:
    """The bits of one layer.

    Args:
        name: the layer's path in the network.
        weight_bits: 1 to 8, or 32 for float; the most of any channel where channels differ.
        act_bits: of the layer's input; 2 to 8, 16, or 32 for float.
        searched: whether a search may change ``weight_bits`` (the first and last are pinned).
        num_weights: number of weights, biases not counted.
        channel_bits: weight bits of each output channel, where channels differ; else None.
    """

    name: str
    weight_bits: int
    act_bits: int
    searched: bool
    num_weights: int
    channel_bits: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_bits(self.name, "weight_bits", self.weight_bits, (*range(1, 9), FLOAT_BITS))
        _check_bits(self.name, "act_bits", self.act_bits, (*range(2, 9), 16, FLOAT_BITS))
        if type(self.num_weights) is not int or self.num_weights < 1:
            raise RequestError(
                f"policy: layer {self.name}: num_weights must be a positive integer, "
                f"got {self.num_weights!r:.100}"
            )
        if self.channel_bits is not None:
            for bits in self.channel_bits:
                _check_bits(self.name, "channel_bits", bits, range(1, 9))
            if not self.channel_bits or max(self.channel_bits) != self.weight_bits:
                raise RequestError(
                    f"policy: layer {self.name}: weight_bits must be the most of channel_bits, "
                    f"got {self.weight_bits}"
                )
            if self.num_weights % len(self.channel_bits):
                raise RequestError(
                    f"policy: layer {self.name}: channel_bits must divide num_weights evenly, "
                    f"got {len(self.channel_bits)} channels for {self.num_weights} weights"
                )

    @property
    def total_weight_bits(self) -> int:
        """Bits of all the layer's weights together."""
        if self.channel_bits is None:
            return self.num_weights * self.weight_bits
        return self.num_weights // len(self.channel_bits) * sum(self.channel_bits)


def _check_bits(name: str, what: str, bits: object, allowed: Collection[int]) -> None:
    if type(bits) is not int or bits not in allowed:
        wide = " or 16," if 16 in allowed else ","
        raise RequestError(
            f"policy: layer {name}: {what} must be {min(allowed)} to 8{wide} or 32 for float, "
            f"got {bits!r:.100}"
        )


@dataclass(frozen=True)
class BitwidthPolicy:
    """One :class:`LayerBits` a layer, in the order of the network.

    >>> policy = BitwidthPolicy((LayerBits("conv1", 8, 8, False, 432),
    ...                          LayerBits("conv2", 3, 4, True, 2304),
    ...                          LayerBits("conv3", 1, 4, True, 2304)))
    >>> policy.avg_weight_bits
    2.0
    """

    layers: tuple[LayerBits, ...]

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise RequestError(f"policy: layer {twice!r:.100} must stand once, got it twice")

    def __iter__(self) -> Iterator[LayerBits]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, name: str) -> LayerBits:
        otherwise = f"policy: must have layer {name!r:.100}, got none"
        return named(name, self.layers, otherwise)

    @property
    def avg_weight_bits(self) -> float:
        """Mean bits of a weight over the searched layers (all layers if none is searched).

        Source: the parameter-weighted mean in which the SDQ paper states "1.93 bits".
        """
        searched = [layer for layer in self.layers if layer.searched]
        return _mean_bits(searched or self.layers)

    @property
    def avg_weight_bits_all(self) -> float:
        """Mean bits of a weight over all quantizable layers, first and last included."""
        return _mean_bits(self.layers)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all weights at their own bits (information, without padding or scales)."""
        return sum(layer.total_weight_bits for layer in self.layers) / 8

    def figures(self) -> dict[str, Any]:
        """Return what ``metrics.json`` says of it."""
        return {
            "avg_weight_bits": self.avg_weight_bits,
            "avg_weight_bits_all": self.avg_weight_bits_all,
            "weight_bytes": self.weight_bytes,
            "float_layers": [bits.name for bits in self if bits.weight_bits == FLOAT_BITS],
        }

    def with_weight_bits(self, bits: Mapping[str, int]) -> "BitwidthPolicy":
        """Return a policy in which the named layers have these weight bits.

        Raises:
            RequestError: there is no layer of such a name.
        """
        names = [layer.name for layer in self.layers]
        unknown = sorted(set(bits) - set(names))
        if unknown:
            raise RequestError(
                f"policy: no layer named {unknown[0]!r}; {nearest(unknown[0], names)}"
            )
        return BitwidthPolicy(
            tuple(
                replace(x, weight_bits=bits[x.name], channel_bits=None) if x.name in bits else x
                for x in self.layers
            )
        )

    def to_json(self) -> str:
        """Return the policy as JSON text, one layer a line."""
        layers = ",\n".join("    " + json.dumps(_document(layer)) for layer in self.layers)
        averages = (
            f'  "avg_weight_bits": {self.avg_weight_bits!r},\n'
            f'  "avg_weight_bits_all": {self.avg_weight_bits_all!r},\n'
        )
        return f'{{\n  "schema": "{SCHEMA}",\n{averages}  "layers": [\n{layers}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str, where: str = "policy") -> "BitwidthPolicy":
        """Read :meth:`to_json`'s text.

        Raises:
            RequestError: not JSON, of another schema, or a field missing, unknown or of the
                wrong type; the message names it.
        """
        try:
            document = json.loads(text)
        except ValueError as error:  # JSONDecodeError, and RecursionError's cousin for huge ints
            raise RequestError(f"{where}: must be JSON, {error}; write it anew") from None
        except RecursionError:
            raise RequestError(f"{where}: must be JSON of this schema, got deep nesting") from None
        if not isinstance(document, dict) or not isinstance(document.get("layers"), list):
            raise RequestError(f'{where}: must be an object with "schema" and a list "layers"')
        schema = document.get("schema")
        if schema != SCHEMA:
            raise RequestError(
                f"{where}: schema must be {SCHEMA!r}, got {schema!r:.100}; "
                "it was written by another version of sdq: use that one, or search again"
            )
        return cls(
            tuple(_layer(x, f"{where}: layer {i}") for i, x in enumerate(document["layers"]))
        )

    @classmethod
    def load(cls, path: Path) -> "BitwidthPolicy":
        """Read a policy file; RequestError if it is absent or not a policy."""
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RequestError(f"policy: no file {str(path)!r}") from None
        except UnicodeDecodeError:
            raise RequestError(f"{path}: must be JSON in UTF-8; write it anew") from None
        except OSError as error:
            raise RequestError(f"{path}: must be a policy file, but: {error.strerror}") from None
        return cls.from_json(text, where=str(path))


_FIELDS = {"name": str, "weight_bits": int, "act_bits": int, "searched": bool, "num_weights": int}
_OPTIONAL = {"channel_bits": list}


def _document(layer: LayerBits) -> dict[str, Any]:
    found = asdict(layer)
    if layer.channel_bits is None:  # most policies: readers of the plain form need not know it
        del found["channel_bits"]
    return found


def _layer(document: Any, where: str) -> LayerBits:
    if not isinstance(document, dict) or set(document) - set(_OPTIONAL) != set(_FIELDS):
        got = sorted(document) if isinstance(document, dict) else document
        raise RequestError(f"{where}: must have the fields {', '.join(_FIELDS)}, got {got!r:.200}")
    for field, kind in {**_FIELDS, **_OPTIONAL}.items():
        if field in document and type(document[field]) is not kind:
            raise RequestError(
                f"{where}: {field} must be {kind.__name__}, got {document[field]!r:.100}"
            )
    if any("\ud800" <= character <= "\udfff" for character in document["name"]):
        raise RequestError(  # JSON can have halves of characters, which nothing can show
            f"{where}: name must be text, got {document['name']!r:.100}; write the policy anew"
        )
    channels = document.get("channel_bits")
    return LayerBits(
        **{**document, "channel_bits": tuple(channels) if channels is not None else None}
    )


def _mean_bits(layers: "tuple[LayerBits, ...] | list[LayerBits]") -> float:
    total = sum(layer.num_weights for layer in layers)
    return sum(layer.total_weight_bits for layer in layers) / total if total else 0.0
