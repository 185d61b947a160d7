"""Options that verbs take together: a frozen dataclass is a group, and its fields are its options.

A verb has a group for a parameter, with an instance for its defaults;
:func:`sdq.cli.command.flat` gives typer the same verb with the options themselves.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sdq.cli import inputs as inp
from sdq.cli import options
from sdq.cli.device import DeviceRequest
from sdq.config import TrainConfig
from sdq.parallel import open_fabric

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class SourceOptions:
    """Which float network."""

    model: options.Model = None
    weights: options.Weights = None
    from_: options.From = None

    def asked(self) -> dict[str, Any]:
        """Return what was asked, for ``run.json``."""
        return {
            "model": self.model,
            "weights": str(self.weights) if self.weights else None,
            "from": str(self.from_) if self.from_ else None,
        }


@dataclass(frozen=True)
class BudgetOptions:
    """What the policy may cost."""

    bits: options.Bits = None
    weight_kb: options.WeightKb = None
    bops_g: options.BopsG = None
    target: options.Target = None
    latency_ms: options.LatencyMs = None
    fps: options.Fps = None
    budget: options.ResourceBudget = None

    def device(self) -> DeviceRequest:
        """Return what is asked of the device; RequestError if that is wrong."""
        return DeviceRequest.of(self.target, self.latency_ms, self.fps, self.budget)


@dataclass(frozen=True)
class QuantOptions:
    """How a network is quantized, and what gets a bitwidth of its own."""

    choices: options.Choices = "1,2,3,4,6,8"
    granularity: options.Granularity = "layer"
    act_bits: options.ActBits = 4
    learn_act_bits: options.LearnActBits = False
    act_choices: options.ActChoices = "2,3,4,6,8"
    first_last_bits: options.FirstLastBits = 8
    pin: options.Pin = None
    skip: options.Skip = None
    layer_choices: options.LayerChoices = None
    integer_datapath: options.IntegerDatapath = False
    integer_bias: options.IntegerBias = False
    weight_scale: options.WeightScale = "per_channel"
    scale: options.Scale = "float"
    weight_quantizer: options.WeightQuantizer = "lsq"
    for_: options.For = None


@dataclass(frozen=True)
class TrainingOptions:
    """How a network is trained, whatever for."""

    weight_decay: options.WeightDecay = options.TRAINING.weight_decay
    optimizer: options.Optimizer = options.TRAINING.optimizer
    schedule: options.Schedule = options.TRAINING.schedule
    ema_decay: options.EmaDecay = options.TRAINING.ema_decay
    bn_batches: options.BnBatches = options.TRAINING.bn_batches
    select: options.Select = options.TRAINING.select

    def config(self, **others: Any) -> TrainConfig:
        """Return the configuration with its other fields."""
        return TrainConfig(**vars(self), **others)


@dataclass(frozen=True)
class ImageOptions:
    """Which images, how they are prepared and divided, and the seed."""

    data_root: options.DataRoot = None
    batch_size: options.BatchSize = 128
    image_size: options.ImageSize = None
    mean: options.Mean = None
    std: options.Std = None
    split: options.Split = "0.7,0.1,0.2"
    augment: options.Augment = True
    seed: options.Seed = 0

    def request(self, data: str, split_file: str | None = None) -> inp.DataRequest:
        """Return what was said about the data.

        Args:
            data: their reference.
            split_file: whose parts stand in the place of the data's own.
        """
        return inp.DataRequest(
            data, str(self.data_root) if self.data_root else None, self.image_size, self.mean,
            self.std, self.split, self.batch_size, self.seed, self.augment, split_file=split_file,
        )  # fmt: skip


@dataclass(frozen=True)
class PlaceOptions:
    """Where a run computes."""

    device: options.Device = "auto"
    devices: options.Devices = 1
    precision: options.Precision = "32"

    def fabric(self) -> "Fabric":
        """Return these processes; RequestError if there are no such devices."""
        return open_fabric(self.device, self.devices, self.precision)

    def asked(self) -> dict[str, Any]:
        """Return what was asked, for ``run.json``."""
        return {"devices": self.devices, "precision": self.precision}


@dataclass(frozen=True)
class RunOptions:
    """How a run begins and what it tells at its end."""

    report: options.Report = True
    resume: options.Resume = False
    json_: options.Json = False
    quiet: options.Quiet = False

    def of_process(self, fabric: "Fabric") -> "RunOptions":
        """Return what one of several processes does: the first one speaks."""
        if fabric.is_global_zero:
            return self
        return replace(self, report=False, json_=False, quiet=True)
