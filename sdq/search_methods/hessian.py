"""Sensitivity from the Hessian's trace, and an integer program.

A layer's loss increase at b bits is taken as its mean Hessian trace times the squared error of its
weights; the policy of least total increase within the budget follows exactly.

Source: Dong et al., "HAWQ-V2", NeurIPS 2020, equations 4 and 8, https://arxiv.org/abs/1911.03852;
the integer program: Yao et al., "HAWQ-V3", ICML 2021, https://arxiv.org/abs/2011.10680.
"""

import torch
from torch import Tensor

from sdq.batches import generator
from sdq.calibration import in_float
from sdq.search_problem import SearchProblem
from sdq.task import task_of

CHOOSES_ACTS, CHOOSES_CHANNELS = False, True

PROBES, BATCHES = 4, 4
"""Random vectors a batch, and batches: the trace of a layer settles to some percent."""


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
    # a negative trace is noise, or a direction that training did not finish: no sensitivity
    if problem.config.granularity == "channel":
        trace = diagonal.flatten(1).mean(1).clamp_min(0)
    else:
        trace = diagonal.mean().clamp_min(0)
    weight = problem.weight(layer)
    errors = {b: (problem.quantized(layer, b) - weight).square() for b in choices}
    return {b: trace * error.flatten(1).sum(1) for b, error in errors.items()}


def hessian_diagonals(problem: SearchProblem) -> dict[int, Tensor]:
    """Return, for each searched layer, the Hessian's diagonal estimated by Hutchinson's method.

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
        found = [torch.zeros_like(weight) for weight in weights]
        count = 0
        batches = list(problem.batches(BATCHES))
        for images, labels in batches:
            logits = qmodel(images.to(device))
            loss = task_of(logits).loss(logits, labels.to(device))
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            for _ in range(PROBES):
                probes = [
                    (torch.randint(0, 2, w.shape, generator=rng) * 2.0 - 1).to(w) for w in weights
                ]
                inner = torch.stack(
                    [(g * p).sum() for g, p in zip(gradients, probes, strict=True)]
                ).sum()
                products = torch.autograd.grad(inner, weights, retain_graph=True)
                for total, probe, product in zip(found, probes, products, strict=True):
                    total += probe * product
                count += 1
                problem.tell(0, 1, count, len(batches) * PROBES, float(loss.detach()))
    return {i: total / count for i, total in zip(wanted, found, strict=True)}
