"""What a training leaves in the network: averaged weights, fresh statistics, the best epoch.

All three are off the path of the training itself, which goes on with its own weights; the result
is put into the network when the last epoch is done.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from sdq.batches import Loader, seeded
from sdq.config import TrainConfig
from sdq.metrics import predict
from sdq.modes import evaluating
from sdq.task import task_of

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Trained:
    """Which epoch's network a training left.

    Attributes:
        best_epoch: counted from 1; 0 where nothing was trained.
        selected_by: a validation metric, or ``last``: the last epoch counts.
        score: the metric at that epoch; None where the last epoch counts.
    """

    best_epoch: int
    selected_by: str
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what ``metrics.json`` says of it."""
        return {
            "best_epoch": self.best_epoch,
            "selected_by": self.selected_by,
            "validation_score": self.score,
        }


class _StatisticsOnly(nn.Module):
    """A network of which only batch normalisation is in training mode: dropout would disturb."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def train(self, mode: bool = True) -> "_StatisticsOnly":
        self.training = mode
        self.network.eval()
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.training = mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.network(x)
        return result


def reestimate_statistics_(network: nn.Module, loader: Loader, batches: int) -> None:
    """Estimate batch normalisation's statistics anew: the mean of those of so many batches.

    Args:
        network: changed in place; its training mode is kept.
        loader: of ``(images, labels)``; asked for ``unaugmented()`` batches where it has that,
            since a network meets no augmented images when it is used.
        batches: to look at, from the first on.
    """
    if hasattr(loader, "unaugmented"):
        loader = loader.unaugmented()
    if hasattr(loader, "set_epoch"):  # the same images whenever this is called
        loader.set_epoch(0)
    device = next(network.parameters()).device
    with evaluating(network):  # but for batch normalisation, which torch trains and puts back
        update_bn(islice(loader, batches), _StatisticsOnly(network), device=device)


def ema_decay(decay: float, updates: int) -> float:
    """Return the decay after so many updates: small at first, and never above ``decay``.

    Source: TensorFlow's ``ExponentialMovingAverage`` with ``num_updates``.
    """
    return min(decay, (1 + updates) / (10 + updates))


def _average(average: Any, current: Any, updates: Tensor, decay: float) -> None:
    get_ema_multi_avg_fn(ema_decay(decay, int(updates)))(average, current, updates)


class Outcome:
    """Follows a training and holds what shall come of it.

    Args:
        module: what is trained.
        loader: of the training set; for statistics.
        config: ``ema_decay``, ``bn_batches``, ``select``.
        fabric: whose first process measures for all.
        validation: what epochs are compared on; None: the last one counts.
    """

    def __init__(
        self,
        module: nn.Module,
        loader: Loader,
        config: TrainConfig,
        fabric: "Fabric",
        validation: Loader | None,
    ) -> None:
        self.module, self.loader, self.config = module, loader, config
        self.fabric, self.validation = fabric, validation
        self.average: AveragedModel | None = None
        if config.ema_decay:
            decay = config.ema_decay
            self.average = AveragedModel(
                module,
                multi_avg_fn=lambda a, b, n: _average(a, b, torch.as_tensor(n), decay),
                use_buffers=True,
            )
        self.best: dict[str, Tensor] = {}
        self.best_epoch, self.best_score = 0, -math.inf
        # the first output says which task it is, and so what None stands for
        self.selected_by: str = config.select or "last"

    @property
    def selects(self) -> bool:
        """Whether epochs are compared."""
        return self.validation is not None and self.config.select != "last"

    def after_step(self) -> None:
        """Take the module's weights into the average."""
        if self.average is not None:
            self.average.update_parameters(self.module)

    def networks(self) -> Iterator[nn.Module]:
        """Yield what is trained, and the average of its weights where there is one."""
        yield self.module
        if self.average is not None:
            yield self.average.module

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Measure the network of an epoch, counted from 1, keep it if it is the best so far.

        Returns:
            For the log: validation metrics, and the best epoch so far.
        """
        if self.validation is None:
            self.best_epoch = epoch
            # whoever expects a selection reads in the log that there is none
            return {} if self.config.select == "last" else {"selected_by": "last"}
        with self._result() as network:
            metrics = self._measure(network, self.validation)
            if not self.selects:
                self.best_epoch = epoch
                return metrics
            found = metrics[f"val_{self.selected_by}"]
            # of a single class there is no AUC; the network may be as good as any
            score = -math.inf if found is None else found
            score = -score if self.selected_by == "loss" else score
            # processes must not part over a rounding
            score = self.fabric.broadcast(score)
            if score >= self.best_score:
                self.best_epoch, self.best_score = epoch, score
                self.best = {k: v.detach().clone() for k, v in network.state_dict().items()}
        return {**metrics, "best_epoch": self.best_epoch}

    def finish_(self) -> Trained:
        """Put the result into the module."""
        if self.best_epoch == 0:
            return Trained(0, "last")
        if self.selects:
            self.module.load_state_dict(self.best)
            score = -self.best_score if self.selected_by == "loss" else self.best_score
            return Trained(
                self.best_epoch, self.selected_by, score if math.isfinite(score) else None
            )
        if self.average is None and not self.config.bn_batches:
            return Trained(self.best_epoch, "last")
        with self._result() as network:
            state = copy.deepcopy(network.state_dict())
        self.module.load_state_dict(state)
        return Trained(self.best_epoch, "last")

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the module."""
        tensors = {f"best.{k}": v for k, v in self.best.items()}
        if self.average is not None:
            tensors |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        if math.isfinite(self.best_score):
            score = torch.tensor(self.best_score, dtype=torch.float64)
            tensors[f"best_score.{self.selected_by}"] = score
        return {**tensors, "best_epoch": torch.tensor(self.best_epoch)}

    def load_state_dict(self, tensors: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned; RuntimeError if it is of something else."""
        tensors = dict(tensors)
        if "best_epoch" not in tensors:
            raise RuntimeError("no best epoch in the checkpoint")
        self.best_epoch = int(tensors.pop("best_epoch"))
        parts: dict[str, dict[str, Tensor]] = {"best": {}, "average": {}, "best_score": {}}
        for name, tensor in tensors.items():
            part, _, path = name.partition(".")
            parts[part][path] = tensor
        self.best = parts["best"]
        for metric, score in parts["best_score"].items():
            self.selected_by, self.best_score = metric, float(score)
        if self.average is not None:
            self.average.load_state_dict(parts["average"])

    @contextmanager
    def _result(self) -> Iterator[nn.Module]:
        """Give the network that would be left now; the training's own is as before afterwards."""
        average = self.average
        network = self.module if average is None else average.module
        assert isinstance(network, nn.Module)
        if average is not None:
            for mine, now in zip(network.buffers(), self.module.buffers(), strict=True):
                if not mine.is_floating_point():  # a counter has no average
                    mine.copy_(now)
        before = {k: v.clone() for k, v in network.named_buffers()}
        training = network.training
        # a loader may draw from torch's global generator, and so may dropout
        with seeded(self.config.seed, "result"):
            if self.config.bn_batches:
                reestimate_statistics_(network, self.loader, self.config.bn_batches)
            try:
                yield network
            finally:
                for name, buffer in network.named_buffers():
                    buffer.copy_(before[name])
                network.train(training)

    def _measure(self, network: nn.Module, validation: Loader) -> dict[str, Any]:
        logits, labels = predict(network, validation)
        task = task_of(logits)
        self.selected_by = task.selection(self.config.select)
        return {
            "val_loss": float(task.loss(logits, labels)),
            **{f"val_{name}": score for name, score in task.scores(logits, labels).items()},
        }
