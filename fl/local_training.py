"""The one loop of local training: a client's epochs in one round, with the method's hooks.

It stands beside ``sdq.train.fit`` and not on it: a client's round is a few steps, thousands of
times over, on one network whose state comes and goes. It needs the gradient between backward pass
and step, an optimizer chosen by the federation that may outlive the round, a learning rate by
round, and several phases; it needs no Fabric set-up, checkpoint or schedule for each call. Batches,
seeds and the diagnosis of NaN are the engine's.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fl.config import FederationConfig
from fl.method import Client, ClientContext, Progress
from fl.record import Tensors
from sdq.diagnosis import origin, weight_not_finite
from sdq.errors import RunError
from sdq.train import is_weight


def train_(client: Client) -> Progress:
    """Train the client's network in place, as the client's hooks say.

    Raises:
        RunError: the loss or a weight became NaN or infinite, or there was no batch.
    """
    context = client.context
    network, config = context.network, context.config
    device = next(network.parameters()).device
    steps, total, count, epoch = 0, 0.0, 0, 0
    network.train()
    # dropout draws from torch's global generator
    with torch.random.fork_rng(), _flags_restored(network):
        _seed_(context.generator("dropout").initial_seed(), device)
        client.start()
        network.train()
        trainable = {n: p for n, p in network.named_parameters() if p.requires_grad}
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm)]
        for number, phase in enumerate(client.phases()):
            parameters = {n: p for n, p in trainable.items() if phase.trains(n)}
            for name, parameter in trainable.items():
                parameter.requires_grad_(name in parameters)
            optimizer = _optimizer(parameters, config, context.lr)
            group = f"optimizer.{number}"
            if config.keep_optimizer:
                _resume_(optimizer, parameters, context.memory.tensors.pop(group, {}))
            for _ in range(phase.epochs):
                client.start_epoch(epoch)
                network.train()
                for images, labels in client.batches(epoch):
                    images, labels = images.to(device), labels.to(device)
                    if images.dim() == 4:
                        images = images.contiguous(memory_format=torch.channels_last)
                    with _running_statistics(norms, len(labels) == 1):
                        loss = client.loss(client.forward(images), labels)
                        if not math.isfinite(value := float(loss.detach())):
                            raise RunError(_diverged(context, value, epoch, images))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    client.correct_gradients_()
                    optimizer.step()
                    client.after_step()
                    steps, count = steps + 1, count + len(labels)
                    total += value * len(labels)
                client.end_epoch(epoch)
                epoch += 1
            if config.keep_optimizer:
                context.memory.tensors[group] = _state(optimizer, parameters)
    if not count:
        raise RunError(f"client {context.client}: must have images to train on, got none")
    if (broken := weight_not_finite(network)) is not None:
        raise RunError(
            f"client {context.client}: weights must be finite, got NaN or infinity in {broken!r}; "
            "lower the learning rate"
        )
    return Progress(steps, total / count)


def _diverged(context: ClientContext, value: float, epoch: int, images: Tensor) -> str:
    where, repair = origin(context.network.model, images, contextlib.nullcontext())
    return (
        f"client {context.client}: loss must be finite, got {value} in round {context.round + 1}, "
        f"epoch {epoch + 1}: {where}; {repair}"
    )


def _seed_(seed: int, device: torch.device) -> None:
    """Seed torch's global generator.

    Without an accelerator only the CPU's: the others note where they were called from, to seed
    themselves later, and that takes as long as a step of a small network.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextlib.contextmanager
def _running_statistics(norms: list[_BatchNorm], needed: bool) -> Iterator[None]:
    """Let batch normalisation use its running statistics: one image has no variance of its own."""
    if not needed:
        yield
        return
    changed = [m for m in norms if m.training and m.track_running_stats]
    for module in changed:
        module.eval()
    try:
        yield
    finally:
        for module in changed:
            module.train()


@contextlib.contextmanager
def _flags_restored(network: nn.Module) -> Iterator[None]:
    """Restore which parameters are trained."""
    before = [(p, p.requires_grad) for p in network.parameters()]
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
            parameter.grad = None


def _optimizer(
    parameters: dict[str, nn.Parameter], config: FederationConfig, lr: float
) -> torch.optim.Optimizer:
    weights = [p for p in parameters.values() if is_weight(p)]
    rest = [p for p in parameters.values() if not is_weight(p)]
    groups = [
        {"params": weights, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(groups, lr=lr)


def _state(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> Tensors:
    """Return an optimizer's tensors as ``KEY/PARAMETER``."""
    return {
        f"{key}/{name}": value.detach().clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def _resume_(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], kept: Tensors
) -> None:
    for full_name, tensor in kept.items():
        key, _, name = full_name.partition("/")
        parameter = parameters[name]
        # Adam counts its steps on the CPU, whatever the parameter's device
        place = tensor.device if key == "step" else parameter.device
        optimizer.state[parameter][key] = tensor.to(place)
