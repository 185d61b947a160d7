"""Where numbers that are not finite come from."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

LOWER = "lower the learning rate"


def weight_not_finite(module: nn.Module) -> str | None:
    """Return the path of the first parameter that holds NaN or infinity, or None."""
    return next((n for n, p in module.named_parameters() if not torch.isfinite(p).all()), None)


def origin(
    module: nn.Module, images: Tensor, precision: AbstractContextManager[Any]
) -> tuple[str, str]:
    """Say where the first number that is not finite appears when a batch is passed once more.

    Args:
        module: as it was when the loss was not finite; its statistics change.
        images: ``(N, C, H, W)``, on the module's device.
        precision: of the forward pass.

    Returns:
        Half a sentence that names the images, a weight, a layer's output, or the loss itself; and
        what to do about it.
    """
    if not torch.isfinite(images).all():
        return "the images of the batch are not finite", "mend the data"
    if (weight := weight_not_finite(module)) is not None:
        return f"weight {weight!r} is not finite", LOWER
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return hook

    # a module's hook runs when it is done, so after those of the modules inside it
    hooks = [m.register_forward_hook(look(name)) for name, m in module.named_modules()]
    try:
        with torch.no_grad(), precision:
            module(images)
    finally:
        for handle in hooks:
            handle.remove()
    if not found:
        return "every layer's output is finite, the loss is not", LOWER
    where = f"the output of {found[0]!r}" if found[0] else "the network's output"
    return f"first in {where}", LOWER


def _finite(output: Any) -> bool:
    if isinstance(output, Tensor):
        return not output.is_floating_point() or bool(torch.isfinite(output).all())
    if isinstance(output, tuple | list):
        return all(_finite(part) for part in output)
    return True
