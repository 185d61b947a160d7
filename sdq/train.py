"""The one training loop, on Lightning Fabric; phases differ only in their objective.

After every epoch the whole state goes to one safetensors file, so that a run killed at any moment
resumes at its last epoch. Everything random in an epoch follows from ``(seed, epoch)``; on a CPU
the resumed run ends bit for bit where the undisturbed one does.
"""

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq.batches import generator
from sdq.checkpoint import Checkpoint
from sdq.config import TrainConfig
from sdq.errors import RequestError, RunError

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric

Loader = Iterable[tuple[Tensor, Tensor]]
Forward = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """What one kind of training optimises. All hooks are called by :func:`fit`."""

    module: nn.Module
    """What is trained, and (with its buffers) what a checkpoint holds."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return optimizer groups; a group with ``"constant": True`` keeps its learning rate."""
        ...

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch; ``forward`` is the module as Fabric set it up."""
        ...

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Prepare an epoch, counted from 0."""
        ...

    def after_step(self, progress: float) -> None:
        """React to an optimizer step; ``progress`` is the share of all steps done, in (0, 1]."""
        ...

    def describe(self) -> dict[str, Any]:
        """Return what to log of an epoch besides the loss."""
        ...


@dataclass(frozen=True)
class StepReport:
    """What the loop tells whoever watches it."""

    phase: str
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    end_of_epoch: dict[str, Any] | None = None


Watcher = Callable[[StepReport], None]


def fit(
    objective: Objective,
    loader: Loader,
    config: TrainConfig,
    *,
    phase: str,
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> None:
    """Train ``objective.module`` in place.

    Args:
        objective: loss and hooks.
        loader: of ``(images, labels)``; if it has ``set_epoch``, that is called.
        config: epochs, optimizer, schedule, seed.
        phase: a name for reports and messages.
        fabric: device and precision; None takes the module's device as it is.
        checkpoint: where to save after each epoch, and to resume from if something is there.
        watch: called after every step.

    Raises:
        RunError: the loss became NaN or infinite; the last good checkpoint stays.
    """
    if fabric is None:
        from lightning_fabric import Fabric

        device = next(objective.module.parameters()).device
        fabric = Fabric(accelerator=device.type, devices=1)
    groups = [g for g in objective.parameter_groups() if g["params"]]
    # convolutions run a fifth faster on a CPU in this order; what is computed is the same
    objective.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    raw = _optimizer(groups, config)
    forward, optimizer = fabric.setup(objective.module, raw)
    # after setup, so that what is loaded goes to the device where the module now is
    first = checkpoint.load_(objective.module, raw) if checkpoint else 0
    steps = number_of_steps(loader)
    bases = [group["lr"] for group in groups]
    for epoch in range(first, config.epochs):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        objective.start_epoch(epoch, config.epochs)
        objective.module.train()
        total, count = 0.0, 0
        with torch.random.fork_rng():  # dropout draws from torch's global generator
            torch.manual_seed(generator(config.seed, phase, epoch).initial_seed())
            for step, (images, labels) in enumerate(loader):
                done = epoch * steps + step
                for group, base in zip(raw.param_groups, bases, strict=True):
                    if not group.get("constant"):
                        group["lr"] = base * _schedule(done / (config.epochs * steps), config)
                images, labels = images.to(fabric.device), labels.to(fabric.device)
                if images.dim() == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                loss = objective.loss(forward, images, labels)
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise RunError(_diverged(phase, epoch, step, value, checkpoint))
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(loss)
                optimizer.step()
                objective.after_step((done + 1) / (config.epochs * steps))
                total, count = total + value * len(labels), count + len(labels)
                if watch:
                    watch(StepReport(phase, epoch, config.epochs, step + 1, steps, value))
        if not count:
            raise RequestError(f"{phase}: the training set must have images, got none")
        _check_finite(objective.module, phase, epoch, checkpoint)
        if watch:  # before the checkpoint: what it says of this epoch would be lost otherwise
            record = {"train_loss": total / count, **objective.describe()}
            watch(StepReport(phase, epoch, config.epochs, steps, steps, total / count, record))
        if checkpoint:
            checkpoint.save(objective.module, raw, epoch + 1)


def number_of_steps(loader: Loader) -> int:
    """Return the batches of an epoch; RequestError if the loader does not know."""
    if not isinstance(loader, Sized):
        raise RequestError(
            f"loader: must have a length (the schedule needs it), got {type(loader).__name__}; "
            "pass a DataLoader or a list of batches"
        )
    return max(len(loader), 1)


def _schedule(done: float, config: TrainConfig) -> float:
    if done < config.warmup:
        return max(done / config.warmup, 1e-3)
    share = (done - config.warmup) / (1 - config.warmup)
    return 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def _diverged(
    phase: str, epoch: int, step: int, value: float, checkpoint: Checkpoint | None
) -> str:
    kept = f"; the state after epoch {epoch} is kept" if checkpoint and epoch else ""
    return (
        f"{phase}: loss must be finite, got {value} in epoch {epoch + 1}, step {step + 1}{kept}; "
        "lower the learning rate"
    )


def _check_finite(module: nn.Module, phase: str, epoch: int, checkpoint: Checkpoint | None) -> None:
    for name, parameter in module.named_parameters():
        if not torch.isfinite(parameter).all():
            raise RunError(
                f"{phase}: weights must be finite, got NaN or infinity in {name!r} "
                f"after epoch {epoch + 1}; lower the learning rate"
            )


def weight_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return two optimizer groups: weights, which decay, and everything else, which does not.

    Decay on a normalisation's gain, a bias or a quantizer's scale pulls it towards zero for no
    good reason.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decay if parameter.dim() > 1 and _is_weight(parameter) else rest).append(parameter)
    return [
        {"params": decay, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": rest, "lr": config.lr, "weight_decay": 0.0},
    ]


def _is_weight(parameter: Tensor) -> bool:
    # per-channel scales are (K, 1, ...): as many elements as their first dimension
    return parameter.numel() > parameter.shape[0]


@dataclass
class FloatTraining:
    """Plain supervised training with cross-entropy."""

    module: nn.Module
    config: TrainConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return weights with and without decay."""
        return weight_groups(self.module, self.config)

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return F.cross_entropy(forward(images), labels)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Nothing to prepare."""

    def after_step(self, progress: float) -> None:
        """Nothing to follow up."""

    def describe(self) -> dict[str, Any]:
        """Nothing to add."""
        return {}


def train_(
    model: nn.Module,
    loader: Loader,
    config: TrainConfig | None = None,
    *,
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> None:
    """Train a float network in place with cross-entropy.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> batch = (torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    >>> train_(net, [batch], TrainConfig(epochs=1))
    """
    config = config or TrainConfig()
    fit(
        FloatTraining(model, config), loader, config, phase="train", fabric=fabric,
        checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
