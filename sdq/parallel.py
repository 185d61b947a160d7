"""Several processes, one training: devices, precision, and each process's share of a batch.

Every process reads the same batches and takes its slice of each, so that ``n`` processes see in a
step what one sees. Gradients are averaged by torch's DistributedDataParallel; the slices' losses
are weighted by their sizes, so that the mean gradient is the whole batch's. What is decided (bits,
price, best epoch) is decided from equal numbers, in every process alike.

Batch normalisation is what differs: each process normalises its own slice, as is usual where
processes are not synchronised in every layer. The running statistics are averaged after an epoch.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sdq.errors import RequestError

if TYPE_CHECKING:  # it imports half of torch: only who trains waits for it
    from lightning_fabric import Fabric

Precision = Literal["32", "bf16"]


def open_fabric(device: str = "auto", devices: int = 1, precision: Precision = "32") -> "Fabric":
    """Return Fabric for a device; call its ``launch()`` before anything else if there are several.

    Args:
        device: ``cpu``, ``cuda`` or ``auto``.
        devices: number of GPUs, or of processes on a CPU.
        precision: ``bf16`` runs forward passes under autocast; weights, scales, losses and
            whatever is measured or exported stay in float32.

    Raises:
        RequestError: no such device, or not so many.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise RequestError(f"--device: must be auto, cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RequestError("--device: cuda must be available, but torch sees none; use cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and devices > torch.cuda.device_count():
        raise RequestError(
            f"--devices: must be at most the {torch.cuda.device_count()} that torch sees, "
            f"got {devices}"
        )
    from lightning_fabric import Fabric  # here: it imports half of torch
    from lightning_fabric.strategies.ddp import DDPStrategy

    kind: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if precision == "bf16" else "32-true"
    if devices == 1:
        return Fabric(accelerator=device, devices=1, precision=kind)
    # a search leaves the scales of inactive bitwidths unused; statistics are averaged by us
    strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False)
    return Fabric(accelerator=device, devices=devices, precision=kind, strategy=strategy)


def own_share(fabric: "Fabric", images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return this process's slice of a batch, and the weight of its mean loss.

    The mean of the weighted means over all processes is the mean over the batch. A batch with
    fewer than two images a process is given to each process whole: batch normalisation cannot
    learn from one image, and an empty slice has no loss.
    """
    world, count = fabric.world_size, len(labels)
    if world == 1 or count < 2 * world:
        return images, labels, 1.0
    own_images = images.tensor_split(world)[fabric.global_rank]
    own_labels = labels.tensor_split(world)[fabric.global_rank]
    return own_images, own_labels, len(own_labels) * world / count


def mean(fabric: "Fabric", value: Tensor) -> float:
    """Return the mean over all processes; NaN in one is NaN in all."""
    if fabric.world_size == 1:
        return float(value.detach())
    reduced = fabric.all_reduce(value.detach().clone(), reduce_op="mean")
    assert isinstance(reduced, Tensor)
    return float(reduced)


def average_statistics_(fabric: "Fabric", module: nn.Module) -> None:
    """Average the running statistics of batch normalisation over all processes."""
    if fabric.world_size == 1:
        return
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            for statistic in (layer.running_mean, layer.running_var):
                if statistic is not None:
                    reduced = fabric.all_reduce(statistic.clone(), reduce_op="mean")
                    assert isinstance(reduced, Tensor)
                    statistic.copy_(reduced)
