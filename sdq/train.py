"""The one training loop, on Lightning Fabric; phases differ only in their objective.

After every epoch the whole state goes to one safetensors file, so that a run killed at any moment
resumes at its last epoch. Everything random in an epoch follows from ``(seed, epoch)``; on a CPU
the resumed run ends bit for bit where the undisturbed one does.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sdq import parallel
from sdq.batches import Loader as Loader
from sdq.batches import generator, length, pairs
from sdq.checkpoint import Checkpoint
from sdq.config import TrainConfig
from sdq.diagnosis import LOWER, origin, weight_not_finite
from sdq.errors import RequestError, RunError
from sdq.outcome import Outcome, Trained
from sdq.schedules import learning_rate
from sdq.task import task_of

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric

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
    validation: Loader | None = None,
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> Trained:
    """Train ``objective.module`` in place.

    Args:
        objective: loss and hooks.
        loader: of ``(images, labels)``; if it has ``set_epoch``, that is called. Where several
            processes train, each is given the same batches and takes its share.
        config: epochs, optimizer, schedule, seed, and what of the training is kept.
        phase: a name for reports and messages.
        validation: of ``(images, labels)``; what epochs are compared on.
        fabric: device, precision and processes, launched; None takes the module's device as it is.
        checkpoint: where to save after each epoch, and to resume from if something is there.
        watch: called after every step, in the first process.

    Returns:
        The epoch whose network is left in ``objective.module``, and why.

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
    outcome = Outcome(objective.module, loader, config, fabric, validation)
    first = checkpoint.load_(objective.module, raw, outcome) if checkpoint else 0
    if not fabric.is_global_zero:  # the first process speaks and writes for all
        checkpoint = watch = None
    steps = number_of_steps(loader)
    bases = [group["lr"] for group in groups]
    for epoch in range(first, config.epochs):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        objective.start_epoch(epoch, config.epochs)
        objective.module.train()
        total, count, rate = 0.0, 0, 0.0
        # dropout draws from torch's global generator, and so does a shuffling DataLoader, whose
        # batches must be the same in every process
        with torch.random.fork_rng():
            torch.manual_seed(generator(config.seed, phase, epoch).initial_seed())
            for step, (images, labels) in enumerate(pairs(loader)):
                done = epoch * steps + step
                rate = learning_rate(config.schedule, done / (config.epochs * steps), config.warmup)
                for group, base in zip(raw.param_groups, bases, strict=True):
                    if not group.get("constant"):
                        group["lr"] = base * rate
                images, labels = images.to(fabric.device), labels.to(fabric.device)
                if images.dim() == 4:
                    images = images.contiguous(memory_format=torch.channels_last)
                own_images, own_labels, weight = parallel.own_share(fabric, images, labels)
                try:
                    loss = objective.loss(forward, own_images, own_labels)
                except ValueError as error:
                    if "Expected more than 1 value per channel" not in str(error):
                        raise
                    raise RequestError(
                        f"{phase}: a batch must have more than {len(own_images)} image, or batch "
                        "normalisation has no variance to divide by; take another batch size, or "
                        "leave a last batch of one out (drop_last)"
                    ) from None
                if weight != 1:
                    loss = loss * weight
                value = parallel.mean(fabric, loss)
                if not math.isfinite(value):
                    # of the whole batch: the trouble may be in another process's share
                    where, repair = origin(objective.module, images, fabric.autocast())
                    got = f"{value} in epoch {epoch + 1}, step {step + 1}: {where}"
                    raise RunError(_diverged(f"{phase}: loss", got, epoch, checkpoint, repair))
                optimizer.zero_grad(set_to_none=True)
                fabric.backward(loss)
                optimizer.step()
                objective.after_step((done + 1) / (config.epochs * steps))
                outcome.after_step()
                total, count = total + value * len(labels), count + len(labels)
                if watch:
                    watch(StepReport(phase, epoch, config.epochs, step + 1, steps, value))
        if not count:
            raise RequestError(f"{phase}: the training set must have images, got none")
        if (name := weight_not_finite(objective.module)) is not None:
            got = f"NaN or infinity in {name!r} after epoch {epoch + 1}"
            raise RunError(_diverged(f"{phase}: weights", got, epoch, checkpoint))
        parallel.average_statistics_(fabric, objective.module)
        try:
            validated = outcome.end_epoch(epoch + 1)
        except RunError as error:
            got = f"NaN or infinity on the validation data after epoch {epoch + 1}"
            raise RunError(_diverged(f"{phase}: outputs", got, epoch, checkpoint)) from error
        if watch:  # before the checkpoint: what it says of this epoch would be lost otherwise
            record = {
                "train_loss": total / count,
                "lr": config.lr * rate,
                **objective.describe(),
                **validated,
            }
            watch(StepReport(phase, epoch, config.epochs, steps, steps, total / count, record))
        if checkpoint:
            checkpoint.save(objective.module, raw, epoch + 1, outcome)
    return outcome.finish_()


def number_of_steps(loader: Loader) -> int:
    """Return the batches of an epoch; RequestError if the loader does not know."""
    count = length(loader)
    if count is None:
        raise RequestError(
            f"loader: must have a length (the schedule needs it), got {type(loader).__name__}; "
            "pass a DataLoader over a dataset with a length, or a list of batches"
        )
    return max(count, 1)


def _optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=config.lr)


def _diverged(
    what: str, got: str, epochs: int, checkpoint: Checkpoint | None, repair: str = LOWER
) -> str:
    kept = f"; the state after epoch {epochs} is kept" if checkpoint and epochs else ""
    return f"{what} must be finite, got {got}{kept}; {repair}"


def weight_groups(module: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Return two optimizer groups: weights, which decay, and everything else, which does not.

    Decay on a normalisation's gain, a bias or a quantizer's scale pulls it towards zero for no
    good reason.
    """
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (decay if is_weight(parameter) else rest).append(parameter)
    return [
        {"params": decay, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": rest, "lr": config.lr, "weight_decay": 0.0},
    ]


def is_weight(parameter: Tensor) -> bool:
    """Tell whether a parameter is a weight, and not a bias, a factor or a quantizer's scale."""
    # per-channel scales are (K, 1, ...): as many elements as their first dimension
    return parameter.dim() > 1 and parameter.numel() > parameter.shape[0]


@dataclass
class FloatTraining:
    """Plain supervised training."""

    module: nn.Module
    config: TrainConfig

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return weights with and without decay."""
        return weight_groups(self.module, self.config)

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the task's loss: of classes the cross-entropy."""
        logits = forward(images)
        return task_of(logits).loss(logits, labels)

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
    validation: Loader | None = None,
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> Trained:
    """Train a float network in place with its task's loss; see :func:`fit` for the arguments.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    >>> batch = (torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))
    >>> train_(net, [batch], TrainConfig(epochs=1))
    Trained(best_epoch=1, selected_by='last', score=None)
    """
    config = config or TrainConfig()
    return fit(
        FloatTraining(model, config), loader, config, phase="train", validation=validation,
        fabric=fabric, checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
