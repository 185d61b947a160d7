"""Phase 2: the loss is distillation plus bins, it falls, and a resumed run ends the same."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import losses
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.checkpoint import Checkpoint, load_tensors
from sdq.config import QuantConfig, TrainConfig
from sdq.errors import RunError
from sdq.finetune import FineTuning, finetune_
from sdq.learned_scale import ActQuantizer
from sdq.parallel import open_fabric
from sdq.quant_model import QuantModel, quantize
from sdq.train import StepReport, train_

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def teacher(toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]) -> nn.Module:
    net = toy()
    train_(net, batches(), TrainConfig(epochs=6, lr=0.01))
    return net.eval()


def student(teacher: nn.Module, bits: tuple[int, ...] = (1, 2, 3, 4)) -> QuantModel:
    qmodel = quantize(teacher, QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
    names = [b.name for b in qmodel.policy if b.searched]
    apply_policy_(qmodel, qmodel.policy.with_weight_bits(dict(zip(names, bits, strict=True))))
    return qmodel


def kd(qmodel: nn.Module, teacher: nn.Module, loader: list[Batch]) -> float:
    qmodel.eval()
    with torch.no_grad():
        return sum(float(losses.distillation(qmodel(x), teacher(x))) for x, _ in loader)


def test_the_loss_is_distillation_plus_the_bins_of_the_searched_layers(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    qmodel = student(teacher)
    calibrate_(qmodel, batches())
    qmodel.eval()
    config = TrainConfig(bin_weight=0.3, bin_warmup=0.25)
    objective = FineTuning(qmodel, config, teacher)
    images, labels = batches()[0]
    kd_loss = float(losses.distillation(qmodel(images), teacher(images)).detach())
    bins = 0.0
    for name, bits in (("small", 1), ("wide", 2), ("deep", 3), ("hidden", 4)):
        quantizer = qmodel.weight_quantizer(name)
        assert quantizer.bits == bits
        bins += float(losses.bin_regularization(*quantizer.in_steps(qmodel.weight(name))).detach())
    objective.start_epoch(0, 8)
    assert float(objective.loss(qmodel, images, labels).detach()) == pytest.approx(kd_loss)
    objective.start_epoch(1, 8)  # a quarter of 8 epochs is 2
    assert float(objective.loss(qmodel, images, labels).detach()) == pytest.approx(kd_loss)
    objective.start_epoch(2, 8)
    found = float(objective.loss(qmodel, images, labels).detach())
    assert found == pytest.approx(kd_loss + 0.3 * bins, rel=1e-5)  # float32
    assert objective.describe()["bin_loss"] == pytest.approx(bins, rel=1e-5)


def test_the_bins_are_summed_if_that_is_asked_for(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    qmodel = student(teacher)
    calibrate_(qmodel, batches())
    found = FineTuning(qmodel, TrainConfig(bin_reduction="sum"), teacher).bin_loss()
    expected = sum(
        losses.bin_regularization(*qmodel.weight_quantizer(n).in_steps(qmodel.weight(n)), "sum")
        for n in ("small", "wide", "deep", "hidden")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("distill", [True, False])
def test_without_a_teacher_or_its_labels_the_loss_is_cross_entropy(
    teacher: nn.Module, batches: Callable[..., list[Batch]], distill: bool
) -> None:
    qmodel = student(teacher)
    calibrate_(qmodel, batches())
    qmodel.eval()
    images, labels = batches()[0]
    expected = F.cross_entropy(qmodel(images), labels)
    config = TrainConfig(bin_weight=0, distill=distill)
    objective = FineTuning(qmodel, config, None if distill else teacher)
    objective.start_epoch(5, 6)
    assert torch.equal(objective.loss(qmodel, images, labels), expected)


def test_finetuning_lowers_the_distillation_loss(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    qmodel, loader = student(teacher), batches()
    calibrate_(qmodel, loader)
    before = kd(qmodel, teacher, loader)
    state = copy.deepcopy(teacher.state_dict())
    finetune_(qmodel, loader, teacher=teacher, config=TrainConfig(epochs=6, lr=3e-3))
    floor = kd(teacher, teacher, loader)  # the teacher's own entropy
    assert kd(qmodel, teacher, loader) - floor < 0.5 * (before - floor)
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())
    assert [b.weight_bits for b in qmodel.policy] == [8, 1, 2, 3, 4, 8]


def test_the_teacher_is_in_evaluation_mode_and_stays_as_it_was(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    teacher.train()
    state = copy.deepcopy(teacher.state_dict())
    finetune_(student(teacher), batches(), teacher=teacher, config=TrainConfig(epochs=1))
    assert teacher.training
    assert all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, state[k]) for k, v in teacher.state_dict().items())


def test_bin_regularization_draws_weights_to_their_levels(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    ends = {}
    for weight in (0.0, 1.0):
        qmodel = student(teacher)
        config = TrainConfig(epochs=6, lr=3e-3, bin_weight=weight, bin_warmup=0)
        finetune_(qmodel, batches(), teacher=teacher, config=config)
        ends[weight] = FineTuning(qmodel, config).describe()["bin_loss"]
    assert ends[1.0] < 0.7 * ends[0.0]


def test_an_uncalibrated_network_is_calibrated_and_a_calibrated_one_is_not_again(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    qmodel = student(teacher)
    finetune_(qmodel, batches(), config=TrainConfig(epochs=0))
    assert qmodel.calibrated
    scales = [q.base.clone() for q in qmodel.act_quantizers().values()]
    finetune_(qmodel, batches(seed=3), config=TrainConfig(epochs=0))
    again = [q.base for q in qmodel.act_quantizers().values()]
    assert all(torch.equal(a, b) for a, b in zip(scales, again, strict=True))


def test_a_larger_teacher_of_other_layers(batches: Callable[..., list[Batch]]) -> None:
    torch.manual_seed(0)
    large = nn.Sequential(
        nn.Conv2d(1, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(864, 3)
    )
    train_(large, batches(), TrainConfig(epochs=4, lr=0.01))
    large.eval()
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 3),
    )  # fmt: skip
    qmodel, loader = quantize(net, QuantConfig(), sample=torch.zeros(1, 1, 8, 8)), batches()
    calibrate_(qmodel, loader)
    before = kd(qmodel, large, loader)
    finetune_(qmodel, loader, teacher=large, config=TrainConfig(epochs=6, lr=1e-2))
    assert kd(qmodel, large, loader) < 0.5 * before


def test_bfloat16_is_close_to_float32(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    found: dict[str, list[float]] = {"32": [], "bf16": []}
    for precision, reported in found.items():
        qmodel = student(teacher)
        finetune_(
            qmodel, batches(), teacher=teacher, config=TrainConfig(epochs=2, lr=1e-3),
            fabric=open_fabric("cpu", 1, precision), watch=lambda r, to=reported: to.append(r.loss),
        )  # fmt: skip
        floats = [v for v in qmodel.state_dict().values() if v.is_floating_point()]
        assert {v.dtype for v in floats} == {torch.float32}
        quantizers = list(qmodel.act_quantizers().values())
        assert {q.scale.dtype for q in quantizers} == {torch.float32}
    # bfloat16 has 8 bits of precision: 2^-8 is 0.4 % in each product
    assert found["bf16"] == pytest.approx(found["32"], rel=0.05)
    assert found["bf16"] != found["32"]


def test_activations_are_rounded_in_float32_whatever_comes_in() -> None:
    quantizer = ActQuantizer(8, signed=False)
    quantizer.base.fill_(0.013)
    quantizer.calibrated.fill_(True)
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)).mul(3).to(torch.bfloat16)
    values, scale, *_ = quantizer(x)
    assert values.dtype == scale.dtype == torch.float32
    assert torch.equal(values, quantizer(x.float())[0])


class Stopped(Exception):
    """Stands for a killed process."""


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize(("epoch", "step"), [(1, None), (3, None), (2, 2)])
def test_a_resumed_run_ends_bit_for_bit_where_the_undisturbed_one_does(
    teacher: nn.Module, batches: Callable[..., list[Batch]], tmp_path: Path,
    epoch: int, step: int | None,
) -> None:  # fmt: skip
    config = TrainConfig(epochs=4, lr=3e-3)

    def run(name: str, watch: Callable[[StepReport], None] | None = None) -> dict[str, Tensor]:
        qmodel = student(teacher)
        finetune_(
            qmodel, batches(count=3), teacher=teacher, config=config,
            checkpoint=Checkpoint(tmp_path / name), watch=watch,
        )  # fmt: skip
        return qmodel.state_dict()

    def stop(report: StepReport) -> None:
        at_end = report.end_of_epoch is not None and report.epoch + 1 == epoch
        if (step is None and at_end) or (report.epoch == epoch and report.step == step):
            raise Stopped

    whole = run("whole.safetensors")
    with pytest.raises(Stopped):
        run("broken.safetensors", stop)
    epochs: set[int] = set()
    assert same(run("broken.safetensors", lambda r: epochs.add(r.epoch)), whole)
    assert epochs == set(range(epoch - (step is None), 4))
    files = [load_tensors(tmp_path / f"{n}.safetensors")[0] for n in ("whole", "broken")]
    assert same(*files)


def test_a_loss_that_is_not_finite_is_of_the_finetuning(
    teacher: nn.Module, batches: Callable[..., list[Batch]]
) -> None:
    qmodel = student(teacher)
    calibrate_(qmodel, batches())
    bad = [*batches(count=2), (torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4).long())]
    with pytest.raises(RunError, match="finetune: loss must be finite, got nan in epoch 1, step 3"):
        finetune_(qmodel, bad, config=TrainConfig(epochs=1))
