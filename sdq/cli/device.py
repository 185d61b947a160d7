"""What is asked of a device, and what it asks of a search."""

import math
from dataclasses import dataclass

import hw
from sdq.cli import options
from sdq.config import QuantConfig
from sdq.cost import CostFn
from sdq.errors import RequestError
from sdq.policy import FLOAT_BITS
from sdq.quant_model import QuantModel
from sdq.search_space import SearchSpace


@dataclass(frozen=True)
class DeviceRequest:
    """A device, and what a network may take of it.

    Args:
        target: its name.
        latency_ms: of one sample, at most.
        fps: samples a second, at least.
        resources: other costs that the target names, with their limits.
    """

    target: str | None = None
    latency_ms: float | None = None
    fps: float | None = None
    resources: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(
        cls,
        target: str | None,
        latency_ms: float | None,
        fps: float | None = None,
        resources: list[str] | None = None,
    ) -> "DeviceRequest":
        """Return what the options ask.

        Raises:
            RequestError: a number that is none, a demand without a device, or a cost that the
                device does not name.
        """
        named = tuple(
            (name, options.numbers(value, "--budget")[0])
            for name, value in options.rules(resources, "--budget")
        )
        asked = {"--latency-ms": latency_ms, "--fps": fps, **{f"--budget {n}": v for n, v in named}}
        for option, value in asked.items():
            if value is None:
                continue
            if target is None:
                raise RequestError(f"{option}: must stand with --target; see `sdq list targets`")
            if not 0 < value < math.inf:
                raise RequestError(f"{option}: must be a positive number, got {value!r}")
        found = cls(target, latency_ms, fps, named)
        for name, _ in named:
            hw.cost_fn(found.device, name)
        return found

    @property
    def given(self) -> bool:
        """Whether anything is asked that limits a search."""
        return self.latency_ms is not None or self.fps is not None or bool(self.resources)

    @property
    def device(self) -> hw.Target:
        """The target."""
        assert self.target is not None
        return hw.target(self.target)

    @property
    def demand(self) -> hw.Demand:
        """What is asked of the device's speed."""
        latency_s = self.latency_ms / 1e3 if self.latency_ms is not None else None
        return hw.Demand(self.fps, latency_s)

    def asked(self) -> dict[str, float]:
        """Return the limits that were asked for, as ``run.json`` keeps them."""
        speed = {"latency_s": self.demand.latency_s, "fps": self.fps}
        found = {**{k: v for k, v in speed.items() if v is not None}, **dict(self.resources)}
        return {f"{self.target}:{name}": limit for name, limit in found.items()}

    def costs(self, space: SearchSpace) -> tuple[tuple[CostFn, float], ...]:
        """Return what a search has to hold: what was asked, and what the device has.

        Of two limits of one cost the stricter one.

        Raises:
            RequestError: the demand cannot be met, or the device has none of something.
        """
        if not self.given:
            return ()
        laid_out = self.device.under(space.layers, self.demand, candidates(space))
        limits = dict(laid_out.limits)
        for name, limit in self.resources:  # asking for more does not make the device larger
            limits[name] = min(limit, limits.get(name, math.inf))
        for name, limit in limits.items():
            if limit <= 0:
                raise RequestError(
                    f"--target: {self.target} must have some {name} for a search, got none; "
                    "choose another target"
                )
        return tuple((hw.cost_fn(laid_out, name), limit) for name, limit in limits.items())


def candidates(space: SearchSpace) -> hw.Choices:
    """Return the bits each layer may get, from the space's units and what is fixed."""
    found = []
    for i, bits in enumerate(space.policy):
        units = [unit for unit in space.units if i in unit.layers]
        weights = {b for unit in units if not unit.is_act for b in unit.choices}
        acts = {b for unit in units if unit.is_act for b in unit.choices}
        found.append(
            (tuple(sorted(weights)) or (bits.weight_bits,), tuple(sorted(acts)) or (bits.act_bits,))
        )
    return found


def on_target(quant: QuantConfig, target: str) -> QuantConfig:
    """Return the configuration with the bitwidths that a target computes with.

    Raises:
        RequestError: of those asked for somewhere it has none.
    """
    device = hw.target(target)

    def legal(asked: tuple[int, ...], known: tuple[int, ...], option: str) -> tuple[int, ...]:
        return _legal(asked, known, option, target)

    acts = quant.act_choices
    if acts is None:
        legal((quant.act_bits,), (*device.act_bits, FLOAT_BITS), "--act-bits")
    else:
        acts = legal(acts, device.act_bits, "--act-choices")
    return quant.replaced(
        bit_choices=legal(quant.bit_choices, device.weight_bits, "--choices"),
        act_choices=acts,
        layer_choices=tuple(
            (pattern, legal(bits, device.weight_bits, "--layer-choices"))
            for pattern, bits in quant.layer_choices
        ),
    )


def layers_on_target(qmodel: QuantModel, target: str) -> QuantConfig:
    """Return the configuration in which every layer's candidates are legal for its kind.

    Raises:
        RequestError: a layer has none, or is pinned to bits that the target has not.
    """
    device, special = hw.target(target), []
    for i, (spec, bits) in enumerate(zip(qmodel.layers, qmodel.policy, strict=True)):
        known = device.legal_weight_bits(spec)
        if not bits.searched:
            _legal((bits.weight_bits,), (*known, FLOAT_BITS), f"--pin {spec.name}", target)
            continue
        found = _legal(qmodel.choices(i), known, f"--layer-choices {spec.name}", target)
        if found != qmodel.choices(i):
            special.append((spec.name, found))
    return qmodel.config.replaced(layer_choices=(*qmodel.config.layer_choices, *special))


def _legal(
    asked: tuple[int, ...], known: tuple[int, ...], option: str, target: str
) -> tuple[int, ...]:
    found = tuple(bits for bits in asked if bits in known)
    if not found:
        raise RequestError(
            f"{option}: must have bits that {target} computes with "
            f"({', '.join(map(str, known))}), got {', '.join(map(str, asked))}"
        )
    return found
