"""What every search method is given: the network, the data, the space and the budget."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sdq.batches import Loader, pairs
from sdq.checkpoint import Checkpoint
from sdq.config import SearchConfig
from sdq.cost import Constraint
from sdq.projection import project
from sdq.quant_model import QuantModel
from sdq.search_space import SearchSpace
from sdq.train import StepReport, Watcher

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class SearchProblem:
    """A search to be done.

    Args:
        qmodel: a calibrated copy that the method may change.
        loader: of ``(images, labels)``.
        space: what is to be decided.
        constraints: of the budget, on the space's units.
        config: of the search.
        teacher: a float network whose soft labels are learned, or None.
        fabric: device and precision.
        checkpoint: where to save, and to resume from.
        watch: called after every step.
    """

    qmodel: QuantModel
    loader: Loader
    space: SearchSpace
    constraints: list[Constraint]
    config: SearchConfig
    teacher: nn.Module | None = None
    fabric: "Fabric | None" = None
    checkpoint: Checkpoint | None = None
    watch: Watcher | None = None

    def tell(self, part: int, parts: int, step: int, steps: int, loss: float) -> None:
        """Tell whoever watches how far a method without a training loop is.

        Args:
            part: of the search, from 0.
            parts: of which it consists, each of as many steps.
            step: of the part, done.
            steps: of a part.
            loss: as it is now.
        """
        if self.watch is not None:
            self.watch(StepReport("search", part, parts, step, steps, loss))

    def project(self, utilities: Sequence[Sequence[float]]) -> list[int]:
        """Return the candidates of greatest total utility within the budget."""
        return project(utilities, self.constraints)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the first batches of the loader."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(0)
        return islice(pairs(self.loader), count)

    def images(self, count: int) -> Iterator[Tensor]:
        """Return the first so many images of the loader, by batch ``(N, C, H, W)``."""
        for images, _ in self.batches(count):
            yield images[:count]
            count -= len(images)
            if count <= 0:  # before another batch is read
                return

    def weight(self, layer: int) -> Tensor:
        """Return the float weight ``(K, ...)`` of a layer, by index."""
        return self.qmodel.weight(self.space.layers[layer].name).detach()

    def quantized(self, layer: int, bits: int) -> Tensor:
        """Return a layer's weight at this bitwidth."""
        quantizer = self.qmodel.new_weight_quantizer(self.space.layers[layer].name, bits)
        with torch.no_grad():
            values: Tensor = quantizer(self.weight(layer))[0]
        return values
