"""Phase 2: train the weights under a fixed policy."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdq import losses
from sdq.batches import seeded
from sdq.calibration import calibrate_
from sdq.checkpoint import Checkpoint
from sdq.config import TrainConfig
from sdq.errors import RequestError
from sdq.outcome import Trained
from sdq.quant_model import QuantModel
from sdq.task import Teacher, task_of
from sdq.train import Forward, Loader, Watcher, fit, weight_groups

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric


class FineTuning:
    """The objective of phase 2: distillation (or the task's loss) plus bin regularization.

    Source: Huang et al., SDQ, ICML 2022, equations 9 and 10.
    """

    def __init__(
        self, qmodel: QuantModel, config: TrainConfig, teacher: nn.Module | None = None
    ) -> None:
        self.module: nn.Module = qmodel
        self.qmodel, self.config = qmodel, config
        self.teacher = Teacher(teacher) if teacher is not None and config.distill else None
        self.names = [bits.name for bits in qmodel.policy if bits.searched]
        self.bin_weight = 0.0

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return weights with and without decay."""
        return weight_groups(self.module, self.config)

    def loss(self, forward: Forward, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a batch."""
        logits = forward(images)
        if self.teacher is not None:
            loss = self.teacher.loss(logits, images)
        else:
            loss = task_of(logits).loss(logits, labels)
        if self.bin_weight:
            loss = loss + self.bin_weight * self.bin_loss()
        return loss

    def bin_loss(self) -> Tensor:
        """Return the bin regularization summed over the searched layers."""
        total = torch.zeros((), device=next(self.qmodel.parameters()).device)
        for name in self.names:
            weight = self.qmodel.weight(name)
            for part, weights in self.qmodel.settled_quantizer(name).parts(weight):
                position, level = part.in_steps(weights)
                loss = losses.bin_regularization(position, level, self.config.bin_reduction)
                total = total + weights.numel() / weight.numel() * loss
        return total

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Switch bin regularization on once the bins have settled."""
        on = epoch >= self.config.bin_warmup * epochs
        self.bin_weight = self.config.bin_weight if on else 0.0

    def after_step(self, progress: float) -> None:
        """Nothing to follow up."""

    def describe(self) -> dict[str, Any]:
        """Return the bin loss."""
        return {"bin_loss": float(self.bin_loss().detach())}


def finetune_(
    qmodel: QuantModel,
    loader: Loader,
    *,
    teacher: nn.Module | None = None,
    config: TrainConfig | None = None,
    validation: Loader | None = None,
    fabric: "Fabric | None" = None,
    checkpoint: Checkpoint | None = None,
    watch: Watcher | None = None,
) -> Trained:
    """Train a quantized model in place under its policy.

    Args:
        qmodel: with the policy applied.
        loader: of ``(images, labels)``, with a length.
        teacher: any network of the same classes, whose soft labels are learned (the float
            network itself, or a larger one); None learns the hard labels.
        config: of training.
        validation: of ``(images, labels)``; what epochs are compared on. Never the test data.
        fabric: device, precision and processes, launched.
        checkpoint: where to save after each epoch, and to resume from.
        watch: called after every step.

    Returns:
        The epoch whose network is left in ``qmodel``, and why.

    Raises:
        RunError: the loss became NaN or infinite.
    """
    config = config or TrainConfig()
    if not hasattr(qmodel, "policy"):  # a compiled one has its own
        raise RequestError(
            f"finetune: must have a quantized model, got {type(qmodel).__name__}; give what "
            "sdq.quantize returned (of DataParallel its .module)"
        )
    if not qmodel.calibrated:
        with seeded(config.seed, "calibrate"):
            calibrate_(qmodel, loader)
    objective = FineTuning(qmodel, config, teacher)
    return fit(
        objective, loader, config, phase="finetune", validation=validation, fabric=fabric,
        checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
