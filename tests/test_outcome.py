"""What a training leaves: averaged weights, fresh statistics, the best epoch; and resuming that."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq.apply_policy import apply_policy_
from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import Checkpoint, load_tensors
from sdq.config import QuantConfig, TrainConfig
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError
from sdq.finetune import finetune_
from sdq.outcome import Trained, ema_decay, reestimate_statistics_
from sdq.quant_model import quantize
from sdq.train import StepReport, train_

Batch = tuple[Tensor, Tensor]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -------------------------------------------------------------------------------- moving average


def test_the_decay_by_hand() -> None:
    assert [ema_decay(0.9, n) for n in (1, 2, 8)] == [2 / 11, 3 / 12, 9 / 18]
    assert ema_decay(0.9, 80) == 81 / 90
    assert ema_decay(0.9, 81) == 0.9


def test_the_average_equals_a_loop_by_hand(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net, expected = toy(), {}
    updates = 0

    def average(report: StepReport) -> None:
        nonlocal updates
        if report.end_of_epoch is not None:
            return
        for name, value in net.state_dict().items():
            if updates == 0 or not value.is_floating_point():  # counters are not averaged
                expected[name] = value.clone()
            else:
                share = min(0.8, (1 + updates) / (10 + updates))
                expected[name] = share * expected[name] + (1 - share) * value
        updates += 1

    train_(net, batches(), TrainConfig(epochs=8, lr=0.01, ema_decay=0.8), watch=average)
    assert updates == 48  # the decay is reached after 35
    assert int(net.bn1.num_batches_tracked) == 48
    for name, value in net.state_dict().items():
        # float32: a lerp rounds otherwise than two products
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_scales_are_averaged_too(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    ends = []
    for decay in (0.0, 0.9):
        qmodel = quantize(toy(), QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
        config = TrainConfig(epochs=2, lr=0.01, ema_decay=decay)
        finetune_(qmodel, batches(), config=config)
        ends.append(state(qmodel))
    gains = [name for name in ends[0] if name.endswith("gain")]
    assert len(gains) == 12
    for name in gains:
        last, averaged = ends[0][name], ends[1][name]
        assert not torch.equal(last, averaged)
        # behind the last ones on the way from 1; Adam's steps wind, hence the mean
        assert (averaged - 1).abs().mean() <= (last - 1).abs().mean() + 1e-2


# ----------------------------------------------------------------------------- fresh statistics


def test_statistics_are_the_means_over_the_batches(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net, loader = toy(dropout=0.5), batches(count=5)
    net.train()
    weights = copy.deepcopy({n: p.data for n, p in net.named_parameters()})
    reestimate_statistics_(net, loader, 3)
    assert all(m.training for m in net.modules())
    assert all(torch.equal(p, weights[n]) for n, p in net.named_parameters())
    outputs = [net.first(images).detach() for images, _ in loader[:3]]
    mean = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
    variance = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)  # unbiased
    torch.testing.assert_close(net.bn1.running_mean, mean)
    torch.testing.assert_close(net.bn1.running_var, variance)
    assert int(net.bn1.num_batches_tracked) == 3
    assert net.bn1.momentum == 0.1


def test_dropout_does_not_disturb_the_statistics(batches: Callable[..., list[Batch]]) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.BatchNorm1d(64)).train()
    net.append(nn.Linear(64, 3))
    images = batches(count=1)[0][0]
    reestimate_statistics_(net, batches(count=1), 1)
    torch.testing.assert_close(net[2].running_mean, images.flatten(1).mean(0))


def test_statistics_are_of_images_that_are_not_augmented() -> None:
    pixels = torch.zeros(6, 1, 4, 4, dtype=torch.uint8)
    pixels[:, :, 0] = 255
    data = ImageSet(ArrayImages(pixels), torch.arange(6) % 2)
    loader = Batches(
        data, Normalization((0.0,), (1.0,)), batch_size=3, shuffle=True,
        augment=Augmentation(vertical_flip=True, shift=0.5), seed=1,
    )  # fmt: skip
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2))
    reestimate_statistics_(net, loader, 10)
    torch.testing.assert_close(net[1].running_mean.view(4, 4), pixels[0, 0] / 255.0)
    assert loader.augment is not None


def test_a_training_ends_with_fresh_statistics(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    plain, fresh = toy(), toy()
    train_(plain, batches(), TrainConfig(epochs=2))
    train_(fresh, batches(), TrainConfig(epochs=2, bn_batches=4))
    weights = dict(plain.named_parameters())
    assert all(torch.equal(p, weights[n]) for n, p in fresh.named_parameters())
    reestimate_statistics_(plain, batches(), 4)
    for name, tensor in state(plain).items():  # in training weights lie otherwise in memory
        torch.testing.assert_close(tensor, state(fresh)[name], rtol=1e-5, atol=1e-7, msg=name)


# ------------------------------------------------------------------------------------ best epoch


class Scripted:
    """Validation data that make a chosen epoch the best: the labels are right in it alone."""

    def __init__(self, net: nn.Module, right: list[float]) -> None:
        self.net, self.right = net, right
        self.images = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        self.epoch = 0
        self.modes: list[bool] = []

    def __iter__(self) -> Iterator[Batch]:
        self.modes.append(self.net.training)
        with torch.no_grad():
            classes = self.net(self.images).argmax(1)
        count = round(self.right[self.epoch] * len(classes))
        self.epoch += 1
        labels = torch.where(torch.arange(len(classes)) < count, classes, (classes + 1) % 3)
        yield self.images, labels


@pytest.mark.parametrize(
    ("right", "best"),
    [([0.5, 0.9, 0.7], 2), ([0.9, 0.5, 0.1], 1), ([0.5, 0.5, 0.5], 3), ([0.1, 0.6, 0.6], 3)],
)
def test_the_epoch_with_the_best_metric_is_kept(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], right: list[float],
    best: int,
) -> None:  # fmt: skip
    net, ends, logs = toy(), [], []

    def keep(report: StepReport) -> None:
        if report.end_of_epoch is not None:
            ends.append(state(net))
            logs.append(report.end_of_epoch)

    validation = Scripted(net, right)
    config = TrainConfig(epochs=3, lr=0.01, select="accuracy")
    trained = train_(net, batches(), config, validation=validation, watch=keep)
    assert trained == Trained(best, "accuracy", pytest.approx(right[best - 1]))
    assert same(state(net), ends[best - 1])
    assert not same(ends[0], ends[1])
    assert validation.modes == [False] * 3
    assert [log["val_accuracy"] for log in logs] == pytest.approx(right)
    assert logs[-1]["best_epoch"] == best
    assert {"val_loss", "val_balanced_accuracy", "val_auc", "lr", "train_loss"} <= set(logs[0])


def test_measuring_does_not_change_the_training(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    plain, measured = toy(dropout=0.3), toy(dropout=0.3)
    config = TrainConfig(epochs=3, lr=0.01, select="last")
    train_(plain, batches(), config)
    before = torch.get_rng_state()
    trained = train_(measured, batches(), config, validation=batches(seed=1))
    assert trained == Trained(3, "last")
    assert torch.equal(torch.get_rng_state(), before)
    assert same(state(plain), state(measured))


def test_the_least_loss_is_the_best(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net, logs = toy(), []
    images, labels = batches(seed=1, count=1, size=60)[0]
    # the harder it learns the training set, the worse it is on these
    wrong = [(images, (labels + 1) % 3)]
    config = TrainConfig(epochs=4, lr=0.02, select="loss")
    trained = train_(
        net, batches(), config, validation=wrong,
        watch=lambda r: logs.append(r.end_of_epoch) if r.end_of_epoch else None,
    )  # fmt: skip
    values = [log["val_loss"] for log in logs]
    assert trained.best_epoch == values.index(min(values)) + 1 < 4
    assert trained.score == min(values)
    with torch.no_grad():
        loss = F.cross_entropy(net.eval()(images), wrong[0][1])
    assert float(loss) == pytest.approx(min(values), rel=1e-6)  # float32


def test_a_single_class_has_no_auc(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    one_class = [(torch.zeros(5, 1, 8, 8), torch.ones(5).long())]
    config = TrainConfig(epochs=2, select="auc")
    assert train_(toy(), batches(), config, validation=one_class) == Trained(2, "auc", None)


def test_without_validation_the_last_epoch_counts(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    logs: list[dict[str, Any]] = []
    trained = train_(
        toy(), batches(), TrainConfig(epochs=2, select="auc"),
        watch=lambda r: logs.append(r.end_of_epoch) if r.end_of_epoch else None,
    )  # fmt: skip
    assert trained == Trained(2, "last")
    assert [log["selected_by"] for log in logs] == ["last", "last"]
    assert train_(toy(), batches(), TrainConfig(epochs=0)) == Trained(0, "last")


def test_what_is_measured_is_what_is_kept(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    """With an average and fresh statistics: the network left has the score that is reported."""
    net, validation = toy(), batches(seed=1, count=2)
    config = TrainConfig(epochs=3, lr=0.01, ema_decay=0.9, bn_batches=3, select="loss")
    trained = train_(net, batches(), config, validation=validation)
    net.eval()
    with torch.no_grad():
        logits = torch.cat([net(images) for images, _ in validation])
    loss = F.cross_entropy(logits, torch.cat([labels for _, labels in validation]))
    assert float(loss) == pytest.approx(trained.score, rel=1e-6)  # float32


# ---------------------------------------------------------------------------------------- resume


class Stopped(Exception):
    """Stands for a killed process."""


@pytest.mark.parametrize(("epoch", "step"), [(1, None), (3, None), (2, 2)])
@pytest.mark.parametrize("select", ["loss", "last"])
def test_a_resumed_run_ends_bit_for_bit_where_the_undisturbed_one_does(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], tmp_path: Path,
    select: Any, epoch: int, step: int | None,
) -> None:  # fmt: skip
    config = TrainConfig(epochs=4, lr=0.01, ema_decay=0.9, bn_batches=2, select=select)
    # worse and worse from the first or second epoch on: the best one lies before the interruption
    wrong = [(images, (labels + 1) % 3) for images, labels in batches(seed=1, count=2)]

    def run(name: str, watch: Callable[[StepReport], None] | None = None) -> tuple[Any, Any]:
        qmodel = quantize(toy(), QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
        names = [b.name for b in qmodel.policy if b.searched]
        bits = dict(zip(names, (1, 2, 3, 4), strict=True))
        apply_policy_(qmodel, qmodel.policy.with_weight_bits(bits))
        trained = finetune_(
            qmodel, batches(count=3), teacher=toy(), config=config, validation=wrong,
            checkpoint=Checkpoint(tmp_path / name), watch=watch,
        )  # fmt: skip
        return qmodel.state_dict(), trained

    def stop(report: StepReport) -> None:
        at_end = report.end_of_epoch is not None and report.epoch + 1 == epoch
        if (step is None and at_end) or (report.epoch == epoch and report.step == step):
            raise Stopped

    whole, trained = run("whole.safetensors")
    assert (trained.best_epoch < 4) == (select == "loss")
    with pytest.raises(Stopped):
        run("broken.safetensors", stop)
    resumed, again = run("broken.safetensors")
    assert same(resumed, whole)
    assert again == trained
    files = [load_tensors(tmp_path / f"{n}.safetensors")[0] for n in ("whole", "broken")]
    assert same(*files)
    finished, once_more = run("whole.safetensors")  # nothing left to do
    assert same(finished, whole)
    assert once_more == trained


def test_a_checkpoint_without_an_average_is_refused_by_a_run_with_one(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    train_(toy(), batches(), TrainConfig(epochs=1), checkpoint=Checkpoint(file))
    with pytest.raises(RequestError, match=r"c\.safetensors: must be of this network"):
        train_(toy(), batches(), TrainConfig(epochs=1, ema_decay=0.9), checkpoint=Checkpoint(file))
