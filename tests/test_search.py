"""Phase 1: budgets are kept, seeds repeat, a resumed search ends where the undisturbed one does."""

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hw
from sdq import plugins
from sdq.calibration import calibrate_
from sdq.checkpoint import Checkpoint, load_tensors
from sdq.config import QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.errors import RequestError, RunError
from sdq.gradient_search import BitwidthSearch
from sdq.policy import BitwidthPolicy
from sdq.projection import SLACK
from sdq.quant_model import QuantModel, quantize
from sdq.search import search, uniform_policy
from sdq.search_methods.hessian import hessian_diagonals
from sdq.search_problem import SearchProblem
from sdq.search_space import SearchSpace
from sdq.train import StepReport

Batch = tuple[Tensor, Tensor]
QUICK = SearchConfig(epochs=2, lr=3e-3)


def chosen(policy: BitwidthPolicy) -> list[int]:
    return [b.weight_bits for b in policy if b.searched]


def best_average(qmodel: QuantModel, limit: float) -> float:
    """The average closest to the limit from below that any policy has."""
    counts = [b.num_weights for b in qmodel.policy if b.searched]
    averages = (
        sum(c * b for c, b in zip(counts, bits, strict=True)) / sum(counts)
        for bits in itertools.product(qmodel.config.bit_choices, repeat=len(counts))
    )
    return max(a for a in averages if a <= limit)


# ---------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("start", ["budget", "highest", "hessian"])
@pytest.mark.parametrize(("bits", "seed"), [(1.0, 0), (1.5, 1), (2.0, 0), (2.0, 1), (3.3, 2)])
def test_the_average_is_never_above_the_budget_and_close_below(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]], bits: float, seed: int,
    start: str,
) -> None:  # fmt: skip
    qmodel = qtoy()
    config = SearchConfig(epochs=1, seed=seed, start=start)
    loader = batches(count=4)
    policy = search(qmodel, loader, budget=Budget(avg_weight_bits=bits), config=config)
    assert policy.avg_weight_bits <= bits
    assert policy.avg_weight_bits >= min(best_average(qmodel, bits), bits * (1 - SLACK))
    assert set(chosen(policy)) <= {1, 2, 3, 4, 6, 8}
    pinned = [(b.name, b.weight_bits) for b in policy if not b.searched]
    assert pinned == [("first", 8), ("last", 8)]


def test_budgets_in_bytes_and_bit_operations_are_kept_together(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    qmodel = qtoy()
    three = uniform_policy(qmodel, Budget(avg_weight_bits=3.0))
    budget = Budget(weight_bytes=three.weight_bytes, bops=0.9 * hw.total_bops(qmodel.layers, three))
    policy = search(qmodel, batches(), budget=budget, config=QUICK)
    assert policy.weight_bytes <= budget.weight_bytes
    assert hw.total_bops(qmodel.layers, policy) <= budget.bops


def test_an_unreachable_budget_is_refused_before_anything_is_trained(
    qtoy: Callable[..., QuantModel],
) -> None:
    def explode() -> Any:
        raise AssertionError("no batch should be asked for")

    class Loader:
        __iter__ = lambda self: explode()  # noqa: E731
        __len__ = lambda self: explode()  # noqa: E731

    message = "average weight bits must be at least 2 with bit choices 2,4 (reachable 2 to 4)"
    with pytest.raises(RequestError, match=re.escape(message)):
        search(qtoy(bit_choices=(2, 4)), Loader(), budget=Budget(avg_weight_bits=1.9))


def test_the_model_is_left_as_it_is(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    qmodel = qtoy().eval()
    before, policy = copy.deepcopy(qmodel.state_dict()), qmodel.policy
    modules = [type(m) for m in qmodel.modules()]
    search(qmodel, batches(), budget=Budget(avg_weight_bits=2.0), config=QUICK)
    assert not qmodel.training
    assert not qmodel.calibrated
    assert qmodel.policy == policy
    assert [type(m) for m in qmodel.modules()] == modules
    after = qmodel.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_a_network_with_nothing_to_search_keeps_its_policy(
    batches: Callable[..., list[Batch]], sample: Tensor
) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    qmodel = quantize(net, sample=sample)
    policy = search(qmodel, batches(), budget=Budget(avg_weight_bits=8.0), config=QUICK)
    assert policy == qmodel.policy
    assert search(qmodel, batches(), budget=Budget(weight_bytes=1e6), config=QUICK) == policy
    with pytest.raises(RequestError, match="must be at least 8, as no layer's bits are searched"):
        search(qmodel, batches(), budget=Budget(avg_weight_bits=2.0), config=QUICK)


def test_a_single_choice_leaves_nothing_to_learn(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    qmodel = qtoy(bit_choices=(3,))
    policy = search(qmodel, batches(), budget=Budget(avg_weight_bits=3.0), config=QUICK)
    assert chosen(policy) == [3] * 4


def test_uniform_takes_the_most_bits_that_fit(qtoy: Callable[..., QuantModel]) -> None:
    qmodel = qtoy()
    for limit, bits in ((1.0, 1), (2.5, 2), (5.9, 4), (6.0, 6), (100.0, 8)):
        policy = uniform_policy(qmodel, Budget(avg_weight_bits=limit))
        assert chosen(policy) == [bits] * 4
    both = Budget(avg_weight_bits=6.0, weight_bytes=qmodel.policy.weight_bytes / 2)
    policy = uniform_policy(qmodel, both)
    assert policy.weight_bytes <= both.weight_bytes
    with pytest.raises(RequestError, match="average weight bits must be at least 1"):
        uniform_policy(qmodel, Budget(avg_weight_bits=0.9))


# ------------------------------------------------------------------------------- seeds and resume


def traced(
    qmodel: QuantModel, loader: list[Batch], file: Path, config: SearchConfig,
    watch: Callable[[StepReport], None] | None = None,
) -> tuple[BitwidthPolicy, dict[str, Tensor]]:  # fmt: skip
    policy = search(
        qmodel, loader, budget=Budget(avg_weight_bits=2.0), config=config,
        checkpoint=Checkpoint(file), watch=watch,
    )  # fmt: skip
    return policy, load_tensors(file)[0]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_seed_repeats_bit_for_bit(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]], tmp_path: Path
) -> None:
    runs = []
    for index, seed in enumerate((0, 0, 1)):
        torch.manual_seed(index)
        config = QUICK.replaced(seed=seed)
        runs.append(traced(qtoy(), batches(count=3), tmp_path / f"{index}.safetensors", config))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])
    assert not same(runs[0][1], runs[2][1])


class Stopped(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize("start", ["budget", "highest", "hessian"])
@pytest.mark.parametrize(("epoch", "step"), [(1, None), (2, None), (1, 2)])
def test_a_resumed_search_ends_bit_for_bit_where_the_undisturbed_one_does(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]], tmp_path: Path,
    epoch: int, step: int | None, start: str,
) -> None:  # fmt: skip
    config = SearchConfig(epochs=3, lr=3e-3, start=start, end_temperature=0.3)
    whole = traced(qtoy(), batches(count=3), tmp_path / "whole.safetensors", config)

    def stop(report: StepReport) -> None:
        at_end = report.end_of_epoch is not None and report.epoch + 1 == epoch
        if (step is None and at_end) or (report.epoch == epoch and report.step == step):
            raise Stopped

    file = tmp_path / "broken.safetensors"
    with pytest.raises(Stopped):
        traced(qtoy(), batches(count=3), file, config, stop)
    epochs: set[int] = set()
    resumed = traced(qtoy(), batches(count=3), file, config, lambda r: epochs.add(r.epoch))
    assert epochs == set(range(epoch - (step is None), 3))
    assert resumed[0] == whole[0]
    assert same(resumed[1], whole[1])


def test_a_loss_that_is_not_finite_is_of_the_search(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    qmodel = qtoy()
    calibrate_(qmodel, batches())
    bad = [(x * float("nan"), y) for x, y in batches()]
    with pytest.raises(RunError, match="search: loss must be finite, got nan in epoch 1, step 1"):
        search(qmodel, bad, budget=Budget(avg_weight_bits=2.0), config=QUICK)


# ------------------------------------------------------------------------------------ what it does


def test_layers_that_the_task_needs_keep_their_bits(
    sample: Tensor,
) -> None:
    """Two layers of equal size: one carries the answer, the other is added with weight 0."""

    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 8, 3, padding=1)
            self.needed = nn.Conv2d(8, 8, 3, padding=1)
            self.useless = nn.Conv2d(8, 8, 3, padding=1)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            x = self.needed(x) + 0.0 * self.useless(x)
            return self.last(x.relu().mean((2, 3)))

    rng = torch.Generator().manual_seed(0)
    images = torch.randn(6, 32, 1, 8, 8, generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Gate()
    with torch.no_grad():
        labels = [net(x).argmax(1) for x in images]
    loader = list(zip(images, labels, strict=True))
    qmodel = quantize(net, QuantConfig(bit_choices=(1, 2, 4), act_bits=8), sample=sample)
    config = SearchConfig(epochs=8, lr=1e-4, bitwidth_lr=0.2, start="highest")
    policy = search(qmodel, loader, budget=Budget(avg_weight_bits=2.5), config=config)
    assert (policy["needed"].weight_bits, policy["useless"].weight_bits) == (4, 1)


def test_hessian_knows_no_activations(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    with pytest.raises(RequestError, match=r"search\.start: must be budget or highest where"):
        search(
            qtoy(act_choices=(2, 4)), batches(), config=SearchConfig(start="hessian"),
            budget=Budget(avg_weight_bits=2.0, avg_act_bits=3.0),
        )  # fmt: skip


def test_weights_can_be_left_as_they_are(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]], tmp_path: Path
) -> None:
    qmodel, before = qtoy(), {}
    for bits in qmodel.policy:
        before[bits.name] = qmodel.weight(bits.name).clone()
    file = tmp_path / "s.safetensors"
    config = QUICK.replaced(train_weights=False)
    traced(qmodel, batches(), file, config)
    after = load_tensors(file)[0]
    for name, weight in before.items():
        assert torch.equal(after[f"module.qmodel.net.{name}.weight"], weight)


class Scaled(nn.Module):
    """A user's own parameter of that name, which is no scale of a quantizer."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


def test_a_user_s_gain_is_left_as_it_is(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], sample: Tensor,
    tmp_path: Path,
) -> None:  # fmt: skip
    qmodel = quantize(nn.Sequential(toy(), Scaled()), QuantConfig(act_bits=8), sample=sample)
    file = tmp_path / "s.safetensors"
    traced(qmodel, batches(), file, QUICK.replaced(train_weights=False))
    after = load_tensors(file)[0]
    (name,) = [n for n in after if n.startswith("module.qmodel") and n.endswith("net.1.gain")]
    assert float(after[name]) == 1.0
    scales = [t for n, t in after.items() if n.endswith("tensor_quant.gain")]
    assert any((t != 1).any() for t in scales)  # what is learned


@pytest.mark.parametrize("method", ["sdq", "greedy", "hessian", "sensitivity"])
def test_a_shuffling_loader_s_images_follow_from_the_seed(
    method: str, qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(), strict=True)))
    seen: list[list[float]] = []
    for outer in (1, 2):
        torch.manual_seed(outer)
        loader, first = DataLoader(data, 10, shuffle=True), []
        qmodel = qtoy()
        qmodel.net.register_forward_pre_hook(lambda m, x, f=first: f.append(float(x[0].sum())))
        budget = Budget(avg_weight_bits=2.0)
        search(qmodel, loader, budget=budget, config=QUICK, method=method)
        seen.append(first)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("method", ["sdq", "hessian"])
def test_the_model_can_keep_the_weights_of_the_search(
    method: str, qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]],
    tmp_path: Path,
) -> None:  # fmt: skip
    """All but the searched layers' quantizers, which are fitted to the new weights."""
    qmodel, alone = qtoy(), qtoy()
    alone.load_state_dict(qmodel.state_dict())
    for each in (qmodel, alone):
        calibrate_(each, batches())
    file = tmp_path / "s.safetensors"
    found = search(
        qmodel, batches(), budget=Budget(avg_weight_bits=2.0), method=method,
        config=QUICK.replaced(keep_weights=True), checkpoint=Checkpoint(file),
    )  # fmt: skip
    same_way = search(
        alone, batches(), budget=Budget(avg_weight_bits=2.0), method=method, config=QUICK
    )
    assert found == same_way
    before, after = alone.state_dict(), qmodel.state_dict()
    assert after.keys() == before.keys()
    if method == "hessian":  # which trains none
        assert same(after, before)
        return
    trained = load_tensors(file)[0]
    taken = [name for name in after if f"module.qmodel.{name}" in trained]
    assert {f"net.{bits.name}.weight" for bits in found} < set(taken)
    for name in taken:
        assert torch.equal(after[name], trained[f"module.qmodel.{name}"]), name
    left = set(after) - set(taken)
    assert left
    for bits in found:
        if bits.searched:
            fresh = qmodel.new_weight_quantizer(bits.name, qmodel.policy[bits.name].weight_bits)
            assert same(qmodel.weight_quantizer(bits.name).state_dict(), fresh.state_dict())


def test_reports_tell_price_use_and_bits(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    ends: list[dict[str, Any]] = []
    search(
        qtoy(), batches(), budget=Budget(avg_weight_bits=2.0), config=QUICK,
        watch=lambda r: ends.append(r.end_of_epoch) if r.end_of_epoch else None,
    )  # fmt: skip
    assert len(ends) == 2
    for record in ends:
        assert set(record) >= {"train_loss", "lambda_q", "budget_use", "bits_and_beta"}
        assert list(record["bits_and_beta"]) == ["small", "wide", "deep", "hidden"]
        for bits, beta in record["bits_and_beta"].values():
            assert bits in (1, 2, 3, 4, 6, 8)
            assert 0 < beta < 1


@pytest.mark.slow
def test_the_expected_cost_arrives_at_the_budget(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    for bits, seed in itertools.product((1.5, 2.0, 3.0), range(3)):
        ends: list[dict[str, Any]] = []
        search(
            qtoy(), batches(), budget=Budget(avg_weight_bits=bits),
            config=SearchConfig(epochs=20, seed=seed),
            watch=lambda r, e=ends: e.append(r.end_of_epoch) if r.end_of_epoch else None,
        )  # fmt: skip
        # 120 steps are few: nine runs measured ended at .79 to 1.04. What the user gets is exact
        # nevertheless (the projection), so that this holds the steering to the right region only
        (use,) = ends[-1]["budget_use"].values()
        assert use == pytest.approx(1.0, abs=0.25), (bits, seed)


def test_every_method_computes_where_the_fabric_does(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """On the meta device, which stands for any other than the CPU: nothing but moving works."""
    problems: list[SearchProblem] = []

    def choose(problem: SearchProblem) -> list[int]:
        problems.append(problem)
        return [0] * len(problem.space.units)

    method = SimpleNamespace(choose=choose, CHOOSES_ACTS=False, CHOOSES_CHANNELS=False)
    monkeypatch.setattr(plugins, "load", lambda *_: method)
    qmodel, fabric = qtoy(), SimpleNamespace(device=torch.device("meta"))
    calibrate_(qmodel, batches())
    search(
        qmodel, [], budget=Budget(avg_weight_bits=4.0), fabric=fabric,
        config=SearchConfig(train_weights=False),
    )  # fmt: skip
    (problem,) = problems
    assert {p.device.type for p in problem.qmodel.parameters()} == {"meta"}
    assert {p.device.type for p in qmodel.parameters()} == {"cpu"}
    objective = BitwidthSearch(problem, "draw", steps=10)
    (cost,) = objective.costs
    assert cost(objective.bits.probabilities()).device.type == "meta"


def test_hessian_measures_frozen_layers_and_leaves_them_frozen(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    free, frozen = qtoy(), qtoy()
    for qmodel in (free, frozen):
        calibrate_(qmodel, batches())
    frozen.weight("small").requires_grad_(False)
    budget = Budget(avg_weight_bits=3.0)
    wanted = search(free, batches(), budget=budget, method="hessian")
    assert search(frozen, batches(), budget=budget, method="hessian") == wanted
    space = SearchSpace.of(frozen)
    problem = SearchProblem(frozen, batches(), space, budget.constraints(space), SearchConfig())
    hessian_diagonals(problem)
    assert [b.name for b in frozen.policy if not frozen.weight(b.name).requires_grad] == ["small"]


def test_learned_activation_bits_follow_from_the_seed_alone(
    qtoy: Callable[..., QuantModel], batches: Callable[..., list[Batch]]
) -> None:
    found = []
    for state in range(3):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            found.append(
                search(
                    qtoy(act_choices=(2, 4, 8)),
                    batches(),
                    config=QUICK,
                    budget=Budget(avg_weight_bits=3.0, avg_act_bits=4.0),
                )
            )
    assert found[0] == found[1] == found[2]
