"""A user's network as federated methods see it: a model, its head and features, and extras."""

import copy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from sdq.errors import RequestError, nearest
from sdq.modes import evaluating

HeadLayer = nn.Linear | nn.Conv2d


@dataclass(frozen=True)
class Outputs:
    """One forward pass: ``images`` (N, ...), ``logits`` (N, classes) and ``features`` (N, D).

    ``features`` is what enters the head, and None where the network has no head that is known.
    ``own`` are those of a personal model on the same images, where a method has one beside.
    """

    images: Tensor
    logits: Tensor
    features: Tensor | None
    own: "Outputs | None" = None

    @property
    def known_features(self) -> Tensor:
        """Return the features; only for methods whose server checked that there is a head."""
        assert self.features is not None
        return self.features


class Network(nn.Module):
    """A model and what a method adds to it.

    Its ``state_dict`` names the user's tensors ``model.…`` and those of an extra (a second head, a
    personal copy) ``extras.NAME.…``; routing goes by these names.

    The head is the last linear layer (or 1 x 1 convolution) that a forward pass calls, if the
    model's output is that layer's output; the features are what enters it. ``head`` names another.

    Args:
        model: maps ``(N, C, H, W)`` to logits; taken as it is, not copied.
        sample: an input ``(1, C, H, W)`` to find the head with.
        head: path of the head in the model, or None to find it.

    Raises:
        RequestError: there is no layer of that name, or it is no linear layer.
    """

    def __init__(self, model: nn.Module, sample: Tensor, head: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.extras = nn.ModuleDict()
        self._head_name, self._no_head = _find_head(model, sample, head)

    @property
    def head_name(self) -> str:
        """Return the head's path in the model; RequestError if the network has none."""
        if self._head_name is None:
            raise RequestError(f"network: {self._no_head}; name the layer with head=")
        return self._head_name

    @property
    def has_head(self) -> bool:
        """Tell whether the head is known."""
        return self._head_name is not None

    @property
    def head(self) -> HeadLayer:
        """Return the layer that maps features to logits; RequestError if there is none."""
        return cast(HeadLayer, self.model.get_submodule(self.head_name))

    def is_head(self, name: str) -> bool:
        """Tell whether a tensor of this network (``model.…``) belongs to the head."""
        return name.startswith(f"model.{self.head_name}.")

    def outputs(self, images: Tensor, model: nn.Module | None = None) -> Outputs:
        """Run the model, or a copy of it, and return logits and features of one pass."""
        model = self.model if model is None else model
        if self._head_name is None:
            return Outputs(images, model(images), None)
        seen: list[Tensor] = []
        # put in place for this call alone: a hook that stays would be copied with the model
        handle = model.get_submodule(self._head_name).register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            logits = model(images)
        finally:
            handle.remove()
        return Outputs(images, logits, seen[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits."""
        return cast(Tensor, self.model(images))

    def new_head(self, generator: torch.Generator) -> HeadLayer:
        """Return a layer like the head with fresh weights, uniform as torch draws them."""
        fresh = copy.deepcopy(self.head)
        bound = 1 / (self.head.weight[0].numel() ** 0.5)
        with torch.no_grad():
            for parameter in fresh.parameters():
                # drawn on the CPU, so that every device starts from the same numbers
                drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
                parameter.copy_(drawn * bound)
        return fresh

    def frozen_copy(self) -> nn.Module:
        """Return a copy of the model as it is now, in evaluation mode, without gradients."""
        return copy.deepcopy(self.model).eval().requires_grad_(False)


def _find_head(model: nn.Module, sample: Tensor, head: str | None) -> tuple[str | None, str]:
    """Return the head's path, or None and why there is none."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, HeadLayer)}
    if head is not None and head not in layers:
        raise RequestError(f"head: no linear layer {head!r}; {nearest(head, layers)}")
    calls: list[tuple[str, Tensor]] = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, out, name=name: calls.append((name, out)))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model), torch.no_grad():
            output = model(sample)
    finally:
        for handle in handles:
            handle.remove()
    if head is not None:
        return head, ""
    for name, out in reversed(calls):
        layer = layers[name]
        linear = isinstance(layer, nn.Linear) or layer.kernel_size == (1, 1)
        if (
            linear
            and out.numel() == output.numel()
            and torch.equal(out.reshape(output.shape), output)
        ):
            return name, ""
        break
    return None, "its output must be that of its last linear layer for the head to be found"
