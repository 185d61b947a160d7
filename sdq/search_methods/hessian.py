"""Sensitivity from the Hessian's trace, and an integer program.

A layer's loss increase at b bits is taken as its mean Hessian trace times the squared error of its
weights; the policy of least total increase within the budget follows exactly.

The trace is that of the Hessian's Gauss-Newton part, which is all of it where the network's own
answers are the labels, and never negative. Hutchinson's estimate of the whole Hessian, with random
vectors in all layers at once, is drowned by the products of different layers' vectors: with 16 it
gave one layer of ResNet-20 0.027 with a seed and -0.0007 with another, and so 1 bit.

Source: Dong et al., "HAWQ-V2", NeurIPS 2020, equations 4 and 8, https://arxiv.org/abs/1911.03852;
the integer program: Yao et al., "HAWQ-V3", ICML 2021, https://arxiv.org/abs/2011.10680; the
Gauss-Newton matrix: Martens, JMLR 2020, https://arxiv.org/abs/1412.1193.
"""

import torch
from torch import Tensor

from sdq.batches import generator
from sdq.calibration import in_float
from sdq.search_problem import SearchProblem
from sdq.task import task_of

CHOOSES_ACTS, CHOOSES_CHANNELS = False, True

PROBES, IMAGES = 2, 512
"""Random vectors a batch, and images: traces of layers vary by some 15 % from seed to seed."""


def choose(problem: SearchProblem) -> list[int]:
    """Return the candidates of least total sensitivity within the budget."""
    diagonals = hessian_diagonals(problem)
    rows = {i: _increases(problem, i, diagonal) for i, diagonal in diagonals.items()}
    utilities = []
    for unit in problem.space.units:
        row = [0.0] * len(unit.choices)
        for i in unit.layers:
            for k, bits in enumerate(unit.choices):
                increase = rows[i][bits]
                part = increase.sum() if unit.channel is None else increase[unit.channel]
                row[k] -= float(part)
        utilities.append(row)
    return problem.project(utilities)


def _increases(problem: SearchProblem, layer: int, diagonal: Tensor) -> dict[int, Tensor]:
    """Return, for each candidate of a layer, the increase of the loss by each output channel."""
    choices = {b for u in problem.space.units if layer in u.layers for b in u.choices}
    by_channel = problem.config.granularity == "channel"
    trace = diagonal.flatten(1).mean(1) if by_channel else diagonal.mean()
    weight = problem.weight(layer)
    errors = {b: (problem.quantized(layer, b) - weight).square() for b in choices}
    return {b: trace * error.flatten(1).sum(1) for b, error in errors.items()}


def hessian_diagonals(problem: SearchProblem) -> dict[int, Tensor]:
    r"""Return, for each searched layer, the Gauss-Newton part of the Hessian's diagonal, estimated.

    For an output z with the Hessian of the loss :math:`H_z = R R^T`, and random signs s, the square
    of :math:`\nabla_w (z \cdot R s)` has the mean :math:`\mathrm{diag}(J^T H_z J)`.

    Returns:
        By layer index, a tensor of the weight's shape; its mean is the mean trace.
    """
    qmodel, rng = problem.qmodel, generator(problem.config.seed, "hessian")
    wanted = sorted({i for unit in problem.space.units for i in unit.layers})
    names = [problem.space.layers[i].name for i in wanted]
    device = next(qmodel.parameters()).device
    with in_float(qmodel):
        qmodel.eval()
        weights = [qmodel.weight(name) for name in names]
        frozen = [weight for weight in weights if not weight.requires_grad]
        for weight in frozen:  # they are quantized like the others
            weight.requires_grad_(True)
        found = [torch.zeros_like(weight) for weight in weights]
        batches = list(problem.images(IMAGES))
        seen, count = 0, sum(map(len, batches))
        for images in batches:
            logits = qmodel(images.to(device))
            task = task_of(logits)
            for _ in range(PROBES):
                signs = torch.randint(0, 2, logits.shape, generator=rng) * 2.0 - 1
                noise = task.curvature_noise(logits.detach(), signs.to(logits))
                # images have signs of their own, so that products of two vanish in the mean
                gradients = torch.autograd.grad(logits, weights, noise, retain_graph=True)
                for total, gradient in zip(found, gradients, strict=True):
                    total += gradient.square()
            seen += len(images)
            problem.tell(0, 1, seen, count, float(task.distillation(logits, logits).detach()))
        for weight in frozen:
            weight.requires_grad_(False)
    return {i: total / (seen * PROBES) for i, total in zip(wanted, found, strict=True)}
