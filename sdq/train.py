"""The one training loop, on Lightning Fabric; phases differ only in their objective.

After every epoch the whole state goes to one safetensors file, so that a run killed at any moment
resumes at its last epoch. Everything random in an epoch follows from ``(seed, epoch)``; on a CPU
the resumed run ends bit for bit where the undisturbed one does.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from sdq import parallel
from sdq.batches import Loader as Loader
from sdq.batches import length, pairs, seeded
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
    with channels_last(objective.module):
        raw = _optimizer(groups, config)
        forward, optimizer = fabric.setup(objective.module, raw)
        # after setup, so that what is loaded goes to the device where the module now is
        outcome = Outcome(objective.module, loader, config, fabric, validation)
        first = checkpoint.load_(objective.module, raw, outcome) if checkpoint else 0
        if not fabric.is_global_zero:  # the first process speaks and writes for all
            checkpoint = watch = None
        bases = [group["lr"] for group in groups]
        loop = _Loop(
            objective, config, phase, fabric, outcome, checkpoint, watch, forward, optimizer, raw,
            bases, number_of_steps(loader),
        )  # fmt: skip
        for epoch in range(first, config.epochs):
            if hasattr(loader, "set_epoch"):
                loader.set_epoch(epoch)
            mean_loss = loop.train_epoch(epoch, loader)
            loop.end_epoch(epoch, mean_loss)
        return outcome.finish_()


@dataclass
class _Loop:
    """The epochs of :func:`fit`, and what it has set up for them.

    Args:
        objective: see :func:`fit`; so ``config``, ``phase`` and ``fabric``.
        outcome: what is kept of the training.
        checkpoint: of the first process; None in others, and where there is none; so ``watch``.
        forward: the module as Fabric set it up.
        optimizer: likewise.
        raw: the optimizer itself.
        bases: the groups' learning rates before the schedule.
        steps: of an epoch.
        rate: the schedule's factor at the last step.
    """

    objective: Objective
    config: TrainConfig
    phase: str
    fabric: "Fabric"
    outcome: Outcome
    checkpoint: Checkpoint | None
    watch: Watcher | None
    forward: Forward
    optimizer: Any
    raw: torch.optim.Optimizer
    bases: list[float]
    steps: int
    rate: float = 0.0

    def train_epoch(self, epoch: int, loader: Loader) -> float:
        """Train on every batch once; return the mean loss of an image."""
        self.objective.start_epoch(epoch, self.config.epochs)
        self.objective.module.train()
        total, count = 0.0, 0
        # dropout draws from torch's global generator, and so does a shuffling DataLoader, whose
        # batches must be the same in every process
        with seeded(self.config.seed, self.phase, epoch):
            for step, (images, labels) in enumerate(pairs(loader)):
                value = self._step(epoch, step, images, labels)
                total, count = total + value * len(labels), count + len(labels)
                if self.watch:
                    self.watch(self._report(epoch, step + 1, value))
        if not count:
            raise RequestError(f"{self.phase}: the training set must have images, got none")
        return total / count

    def end_epoch(self, epoch: int, mean_loss: float) -> None:
        """Measure what the epoch gave, tell of it, and keep it."""
        module = self.objective.module
        if (name := weight_not_finite(module)) is not None:
            got = f"NaN or infinity in {name!r} after epoch {epoch + 1}"
            raise RunError(_diverged(f"{self.phase}: weights", got, epoch, self.checkpoint))
        for network in self.outcome.networks():
            parallel.average_statistics_(self.fabric, network)
        try:
            validated = self.outcome.end_epoch(epoch + 1)
        except RunError as error:
            got = f"NaN or infinity on the validation data after epoch {epoch + 1}"
            what = f"{self.phase}: outputs"
            raise RunError(_diverged(what, got, epoch, self.checkpoint)) from error
        if self.watch:  # before the checkpoint: what it says of this epoch would be lost otherwise
            record = {
                "train_loss": mean_loss,
                "lr": self.config.lr * self.rate,
                **self.objective.describe(),
                **validated,
            }
            self.watch(self._report(epoch, self.steps, mean_loss, record))
        if self.checkpoint:
            self.checkpoint.save(module, self.raw, epoch + 1, self.outcome)

    def _step(self, epoch: int, step: int, images: Tensor, labels: Tensor) -> float:
        """Do one optimizer step on a batch; return its loss, of all processes together."""
        objective, fabric = self.objective, self.fabric
        done, whole = epoch * self.steps + step, self.config.epochs * self.steps
        self.rate = learning_rate(self.config.schedule, done / whole, self.config.warmup)
        for group, base in zip(self.raw.param_groups, self.bases, strict=True):
            if not group.get("constant"):
                group["lr"] = base * self.rate
        images, labels = images.to(fabric.device), labels.to(fabric.device)
        if images.dim() == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        loss = self._loss(images, labels)
        value = parallel.mean(fabric, loss)
        if not math.isfinite(value):
            # of the whole batch: the trouble may be in another process's share
            where, repair = origin(objective.module, images, fabric.autocast())
            got = f"{value} in epoch {epoch + 1}, step {step + 1}: {where}"
            what = f"{self.phase}: loss"
            raise RunError(_diverged(what, got, epoch, self.checkpoint, repair))
        self.optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        self.optimizer.step()
        objective.after_step((done + 1) / whole)
        self.outcome.after_step()
        return value

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of this process's share of a batch, as it counts in the mean."""
        own_images, own_labels, weight = parallel.own_share(self.fabric, images, labels)
        try:
            loss = self.objective.loss(self.forward, own_images, own_labels)
        except ValueError as error:
            if "Expected more than 1 value per channel" not in str(error):
                raise
            raise RequestError(
                f"{self.phase}: a batch must have more than {len(own_images)} image, or batch "
                "normalisation has no variance to divide by; take another batch size, or "
                "leave a last batch of one out (drop_last)"
            ) from None
        return loss if weight == 1 else loss * weight

    def _report(
        self, epoch: int, step: int, loss: float, record: dict[str, Any] | None = None
    ) -> StepReport:
        return StepReport(self.phase, epoch, self.config.epochs, step, self.steps, loss, record)


def number_of_steps(loader: Loader) -> int:
    """Return the batches of an epoch; RequestError if the loader does not know."""
    count = length(loader)
    if count is None:
        raise RequestError(
            f"loader: must have a length (the schedule needs it), got {type(loader).__name__}; "
            "pass a DataLoader over a dataset with a length, or a list of batches"
        )
    return max(count, 1)


def channels_last_(module: nn.Module) -> None:
    """Lay out the weights of two-dimensional convolutions in the order that is faster on a CPU.

    By a fifth; what is computed is the same. ``module.to`` refuses networks with others.
    """
    for _, tensor in _tensors(module):
        if tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def channels_last(module: nn.Module) -> Iterator[None]:
    """Lay out weights as :func:`channels_last_` does for a while.

    A user's network is as before afterwards: safetensors, for one, refuses other layouts.
    """
    plain = {name for name, tensor in _tensors(module) if tensor.is_contiguous()}
    channels_last_(module)
    try:
        yield
    finally:
        for name, tensor in _tensors(module):
            if name in plain:
                tensor.data = tensor.data.contiguous()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


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
