"""Every search method: budgets, seeds, and that the model is left alone; and what each is."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_, in_float
from sdq.config import QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.divergence import Divergence
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize
from sdq.search import search
from sdq.search_methods import greedy, hessian, sensitivity
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace, block_of
from sdq.task import TASKS, Task
from sdq.train import StepReport

Batch = tuple[Tensor, Tensor]
METHODS = plugins.names("sdq.search_methods")
QUICK = SearchConfig(epochs=2, lr=3e-3)


@pytest.fixture
def qmodel(
    toy: Callable[..., nn.Module], sample: Tensor, batches: Callable[..., list[Batch]]
) -> QuantModel:
    found = quantize(toy(), QuantConfig(bit_choices=(1, 2, 4)), sample=sample)
    calibrate_(found, batches())
    return found


def chosen(policy: BitwidthPolicy) -> list[int]:
    return [b.weight_bits for b in policy if b.searched]


@pytest.mark.parametrize("method", METHODS)
def test_budget_seed_and_model(
    method: str, qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    before = copy.deepcopy(qmodel.state_dict())
    policies = [
        search(qmodel, batches(), budget=Budget(avg_weight_bits=2.0), config=QUICK, method=method)
        for _ in range(2)
    ]
    assert policies[0] == policies[1]
    assert policies[0].avg_weight_bits <= 2.0
    assert policies[0].avg_weight_bits >= 1.96 or method == "uniform"
    assert set(chosen(policies[0])) <= {1, 2, 4}
    assert all(torch.equal(v, before[k]) for k, v in qmodel.state_dict().items())
    apply_policy_(qmodel, policies[0])
    assert qmodel(batches()[0][0]).isfinite().all()


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("uniform", "random")])
def test_whoever_watches_sees_it_begin_go_on_and_end(
    method: str, qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    seen: list[StepReport] = []
    search(
        qmodel, batches(), budget=Budget(avg_weight_bits=2.0), config=QUICK, method=method,
        watch=seen.append,
    )  # fmt: skip
    assert len({(r.phase, r.epochs, r.steps) for r in seen}) == 1
    done = [r.epoch * r.steps + r.step for r in seen]
    assert done == sorted(done)
    assert 0 < done[0] < done[-1] == seen[0].epochs * seen[0].steps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("granularity", ["network", "block", "channel"])
def test_granularities(
    method: str, granularity: str, qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    config = QUICK.replaced(granularity=granularity)
    budget = Budget(avg_weight_bits=2.0)
    if method in ("greedy", "sensitivity") and granularity == "channel":
        with pytest.raises(RequestError, match="use --granularity layer"):
            search(qmodel, batches(), budget=budget, config=config, method=method)
        return
    policy = search(qmodel, batches(), budget=budget, config=config, method=method)
    assert policy.avg_weight_bits <= 2.0
    if granularity == "network":
        assert chosen(policy) == [2] * 4
    if granularity == "channel":
        assert all(b.channel_bits is not None for b in policy if b.searched)
    apply_policy_(qmodel, policy)
    assert qmodel(batches()[0][0]).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_activations_are_learned_or_refused(
    method: str, toy: Callable[..., nn.Module], sample: Tensor,
    batches: Callable[..., list[Batch]],
) -> None:  # fmt: skip
    qmodel = quantize(toy(), QuantConfig(act_choices=(2, 4, 8)), sample=sample)
    budget = Budget(avg_weight_bits=3.0, avg_act_bits=4.0)
    if method in ("hessian", "greedy", "sensitivity"):
        with pytest.raises(RequestError, match="chooses weight bitwidths only"):
            search(qmodel, batches(), budget=budget, config=QUICK, method=method)
        return
    policy = search(qmodel, batches(), budget=budget, config=QUICK, method=method)
    searched = [(s, b) for s, b in zip(qmodel.layers, policy, strict=True) if b.searched]
    elements = [torch.Size(s.in_shape).numel() for s, _ in searched]
    mean = sum(n * b.act_bits for n, (_, b) in zip(elements, searched, strict=True))
    assert mean / sum(elements) <= 4.0
    assert policy.avg_weight_bits <= 3.0
    apply_policy_(qmodel, policy)
    calibrate_(qmodel, batches())
    assert qmodel(batches()[0][0]).isfinite().all()


def test_an_unknown_method_is_refused_with_the_nearest(qmodel: QuantModel) -> None:
    with pytest.raises(RequestError, match=r"unknown name 'hesian'.*hessian"):
        search(qmodel, [], budget=Budget(avg_weight_bits=2.0), method="hesian")


def test_uniform_takes_one_bitwidth_and_random_another_each_seed(
    qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    def run(method: str, bits: float, seed: int = 0) -> list[int]:
        config = QUICK.replaced(seed=seed)
        budget = Budget(avg_weight_bits=bits)
        return chosen(search(qmodel, batches(), budget=budget, config=config, method=method))

    assert run("uniform", 3.9) == [2] * 4
    assert len({tuple(run("random", 3.0, seed)) for seed in range(8)}) > 2


def problem_of(qmodel: QuantModel, loader: list[Batch], bits: float = 2.0) -> SearchProblem:
    space = SearchSpace.of(qmodel)
    budget = Budget(avg_weight_bits=bits)
    return SearchProblem(copy.deepcopy(qmodel), loader, space, budget.constraints(space), QUICK)


def test_hessian_traces_against_the_exact_gauss_newton_matrix(
    batches: Callable[..., list[Batch]], sample: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.Softplus(), nn.Conv2d(2, 3, 2), nn.Softplus(),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip
    qmodel = quantize(net, QuantConfig(bit_choices=(1, 2)), sample=sample)
    calibrate_(qmodel, batches())
    monkeypatch.setattr(hessian, "PROBES", 2000)
    monkeypatch.setattr(hessian, "IMAGES", 20)  # one batch and a quarter
    batches_of_16 = batches()
    problem = problem_of(qmodel, batches_of_16)
    (found,) = hessian.hessian_diagonals(problem).values()
    images = torch.cat([batches_of_16[0][0], batches_of_16[1][0][:4]])

    def answer(weight: Tensor) -> Tensor:
        x = net[1](net[0](images))
        x = net[3](F.conv2d(x, weight, net[2].bias))
        return net[5](x.flatten(1))

    weight = net[2].weight.detach()
    jacobian = torch.autograd.functional.jacobian(answer, weight).reshape(20, 3, 24)
    p = answer(weight).detach().softmax(1)
    of_logits = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    exact = torch.einsum("ncw,ncd,ndw->w", jacobian, of_logits, jacobian) / 20
    # a square of a near-normal variable has a relative deviation of the root of 2; 4,000 of them
    torch.testing.assert_close(found.flatten(), exact, rtol=0.12, atol=0)
    assert float(found.mean()) == pytest.approx(float(exact.mean()), rel=0.04)


@pytest.mark.parametrize("task", list(TASKS.values()), ids=lambda t: t.name)
def test_the_curvature_of_the_outputs_against_autograd(task: Task) -> None:
    shape = (1, 4) if task.name == "classification" else (1, 2, 1, 2)
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(shape, generator=rng)

    def divergence(x: Tensor) -> Tensor:
        return task.divergence(x.reshape(shape), logits)

    exact = torch.autograd.functional.hessian(divergence, logits.flatten())
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)))
    vectors = torch.stack([task.curvature_noise(logits, s.reshape(shape)).flatten() for s in every])
    torch.testing.assert_close(vectors.T @ vectors / len(every), exact, rtol=1e-4, atol=1e-6)


def test_greedy_gives_way_where_the_outputs_change_least(
    qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    problem = problem_of(qmodel, batches(), bits=3.0)
    measure = Divergence(problem, [images for images, _ in batches()[:2]])
    picks = greedy.choose(problem)
    assert measure([2, 2, 2, 2]) < measure(picks)
    every = [
        list(p)
        for p in itertools.product(range(3), repeat=4)
        if problem.constraints[0].cost(p) <= 3.0
    ]
    ranked = sorted(measure(p) for p in every)
    # greedy is not exact, and the projection spends what its last step left: among the best third
    assert measure(picks) <= ranked[len(ranked) // 3]


def test_greedy_counts_what_a_step_saves(
    qmodel: QuantModel, batches: Callable[..., list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer's step changes more than the first's, and less for each bit it saves."""
    sizes, changes = [b.num_weights for b in qmodel.policy if b.searched], [1.0, 1.5, 2.0, 1.0]
    assert sizes == [144, 288, 288, 96]

    def measured(problem: SearchProblem, images: Any) -> Callable[[list[int]], float]:
        return lambda picks: sum(c * (2 - k) for c, k in zip(changes, picks, strict=True))

    monkeypatch.setattr(greedy, "Divergence", measured)
    limit = 4 - 2 * 288 / sum(sizes)  # what one large layer at 2 bits leaves
    picks = greedy.choose(problem_of(qmodel, batches(), bits=limit + 1e-6))
    assert picks == [2, 1, 2, 2]


def test_sensitivity_finds_the_least_sum_of_what_single_layers_cost(
    qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    """Against every policy, with the divergences worked out from the probabilities here."""
    problem = problem_of(qmodel, batches(), bits=2.5)
    parts = [part for images, _ in batches() for part in images.split(12)]  # of 12 and of 4
    problem = replace(problem, loader=[(part, part) for part in parts])
    picks = sensitivity.choose(problem)
    images = torch.cat(parts)  # 96: fewer than it would take
    net = copy.deepcopy(qmodel).eval()
    with torch.no_grad(), in_float(net):
        wanted = net(images).double().softmax(1)

    def alone(unit: int, k: int) -> float:
        policy = problem.space.policy_of([2 if u != unit else k for u in range(4)])
        apply_policy_(net, policy)
        with torch.no_grad():
            found = net(images).double().log_softmax(1)
        return float((wanted * (wanted.log() - found)).sum(1).mean())

    table = [[alone(u, k) for k in range(3)] for u in range(4)]
    every = [
        p for p in itertools.product(range(3), repeat=4) if problem.constraints[0].cost(p) <= 2.5
    ]
    best = min(every, key=lambda p: sum(table[u][k] for u, k in enumerate(p)))
    assert tuple(picks) == best


def test_the_divergence_of_the_float_network_is_zero(
    qmodel: QuantModel, batches: Callable[..., list[Batch]]
) -> None:
    measure = Divergence(problem_of(qmodel, batches()), [batches()[0][0]])
    with in_float(measure.qmodel), torch.no_grad():
        assert measure.of(measure.images[0], measure.targets[0]) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "block"),
    [("layer1.0.conv1", "layer1.0"), ("layer1.0.downsample.0", "layer1.0"), ("conv1", "conv1"),
     ("features.3.conv.0.0", "features.3"), ("features.0", "features.0"),
     ("denseblock1.denselayer2.conv1", "denseblock1.denselayer2")],
)  # fmt: skip
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def test_units_of_a_block_move_together(
    sample: Tensor, batches: Callable[..., list[Batch]]
) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 4, 3)
            self.stage = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 1))
                for _ in range(3)
            )
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            for block in self.stage:
                x = block(x).relu()
            return self.head(x.mean((2, 3)))

    qmodel = quantize(Net(), QuantConfig(bit_choices=(1, 2, 4)), sample=sample)
    config = QUICK.replaced(granularity="block")
    space = SearchSpace.of(qmodel, "block")
    assert [unit.name for unit in space.units] == ["stage.0", "stage.1", "stage.2"]
    policy = search(qmodel, batches(), budget=Budget(avg_weight_bits=2.5), config=config)
    bits: dict[str, set[int]] = {}
    for b in policy:
        if b.searched:
            bits.setdefault(block_of(b.name), set()).add(b.weight_bits)
    assert all(len(found) == 1 for found in bits.values())


def test_units_have_names_of_their_own(toy: Callable[..., nn.Module], sample: Tensor) -> None:
    config = QuantConfig(layer_choices=(("wide", (1, 2)), ("deep", (2, 4))))
    qmodel = quantize(toy(), config, sample=sample)
    for granularity in ("network", "block", "layer", "channel"):
        names = [unit.name for unit in SearchSpace.of(qmodel, granularity).units]
        assert len(set(names)) == len(names)
    named = {unit.name for unit in SearchSpace.of(qmodel, "network").units}
    assert named == {"network (1,2)", "network (2,4)", "network (1,2,3,4,6,8)"}


def test_cost_functions_and_products_of_bits_as_budgets(
    toy: Callable[..., nn.Module], sample: Tensor, batches: Callable[..., list[Batch]]
) -> None:
    def squares(spec: Any, weight_bits: int, act_bits: int) -> float:
        return spec.macs * weight_bits**2 * act_bits / 1e3

    qmodel = quantize(toy(), QuantConfig(act_choices=(2, 4, 8)), sample=sample)
    highest = sum(squares(s, 8, 8) for s in qmodel.layers)
    budget = Budget(costs=((squares, 0.3 * highest),))
    policy = search(qmodel, batches(), budget=budget, config=QUICK)
    cost = sum(
        squares(s, b.weight_bits, b.act_bits) for s, b in zip(qmodel.layers, policy, strict=True)
    )
    assert 0.98 * 0.3 * highest <= cost <= 0.3 * highest
