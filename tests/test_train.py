"""The training loop: schedule, groups, seeds, resume to the bit, and what goes wrong."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from sdq.batches import Augmentation, Batches, Normalization
from sdq.checkpoint import Checkpoint, load_tensors, save_tensors
from sdq.config import TrainConfig
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError, RunError
from sdq.learned_scale import WeightQuantizer
from sdq.train import StepReport, number_of_steps, train_, weight_groups

Batch = tuple[Tensor, Tensor]


class Stopped(Exception):
    """Stands for a killed process."""


def stop_after(epoch: int, step: int | None = None) -> Callable[[StepReport], None]:
    """Raise at the end of an epoch (counted from 1), or after a step of the one that follows."""

    def watch(report: StepReport) -> None:
        at_end = report.end_of_epoch is not None and report.epoch + 1 == epoch
        if (step is None and at_end) or (report.epoch == epoch and report.step == step):
            raise Stopped

    return watch


def state(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def augmented(seed: int = 0) -> Batches:
    pixels = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    )
    labels = torch.arange(40) % 3
    pixels[labels == 0, :, 3] = 255
    images = ImageSet(ArrayImages(pixels), labels)
    return Batches(
        images, Normalization((0.5,), (0.25,)), batch_size=16, shuffle=True,
        augment=Augmentation(), seed=seed,
    )  # fmt: skip


# ----------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_one_epoch_equals_a_loop_by_hand(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], optimizer: str
) -> None:
    config = TrainConfig(epochs=2, lr=0.01, weight_decay=0.1, optimizer=optimizer, warmup=0.25)
    loader = batches(count=4)
    ours, theirs = toy(), toy()
    train_(ours, loader, config)
    decay = [p for n, p in theirs.named_parameters() if n.endswith("weight") and "bn" not in n]
    rest = [p for n, p in theirs.named_parameters() if not n.endswith("weight") or "bn" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    reference: torch.optim.Optimizer
    if optimizer == "sgd":
        reference = torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True)
    else:
        reference = torch.optim.AdamW(groups, lr=0.01)
    theirs.train()
    for step, (images, labels) in enumerate([*loader, *loader]):
        done = step / 8
        # rises over a quarter of the steps, then half a cosine
        share = max(done / 0.25, 1e-3) if done < 0.25 else None
        if share is None:
            share = 0.5 * (1 + math.cos(math.pi * (done - 0.25) / 0.75))
        for group in reference.param_groups:
            group["lr"] = 0.01 * share
        loss = F.cross_entropy(theirs(images), labels)
        reference.zero_grad()
        loss.backward()
        reference.step()
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        # channels-last and plain convolutions add in another order, and Adam divides by the size
        # of a gradient: where that is near zero, rounding decides a step of 0.01 or so
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_training_learns(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net, losses = toy(), []
    train_(
        net, batches(), TrainConfig(epochs=8, lr=0.01),
        watch=lambda r: losses.append(r.loss) if r.end_of_epoch else None,
    )  # fmt: skip
    assert losses[-1] < 0.5 * losses[0]
    images, labels = batches(seed=1, count=1, size=200)[0]
    accuracy = (net.eval()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.8  # three classes


def test_a_network_s_layout_is_its_own(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], tmp_path: Path
) -> None:
    net = toy()
    train_(net, batches(), TrainConfig(epochs=1))
    assert all(t.is_contiguous() for t in net.state_dict().values())
    save_file(net.state_dict(), tmp_path / "net.safetensors")  # which refuses other layouts


def test_networks_of_three_dimensions_train() -> None:
    net = nn.Sequential(nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 2, 3, padding=1), nn.Flatten(),
                        nn.Linear(96, 2))  # fmt: skip
    before = state(net)
    train_(net, [(torch.randn(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]))], TrainConfig(epochs=1))
    assert not same(before, state(net))


def test_labels_of_no_class_are_refused_in_training() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(RequestError, match=r"labels: must be 0 to 1, .* got 0 to 2"):
        train_(net, [(torch.zeros(2, 1, 2, 2), torch.tensor([0, 2]))], TrainConfig(epochs=1))


def test_decay_is_for_weights_alone(toy: Callable[..., nn.Module]) -> None:
    net = toy()
    net.quantizer = WeightQuantizer(net.wide.weight.detach(), 4, per_channel=True)
    net.bn1.weight.requires_grad_(False)
    decay, rest = weight_groups(net, TrainConfig(lr=0.5, weight_decay=0.1))
    named = {id(p): n for n, p in net.named_parameters()}
    assert [named[id(p)] for p in decay["params"]] == [
        f"{n}.weight" for n in ("first", "small", "wide", "deep", "hidden", "last")
    ]
    assert {named[id(p)] for p in rest["params"]} == {
        "bn1.bias", "bn2.weight", "bn2.bias", "small.bias", "deep.bias", "hidden.bias",
        "last.bias", "quantizer.gain",
    }  # fmt: skip
    assert (decay["lr"], decay["weight_decay"]) == (0.5, 0.1)
    assert (rest["lr"], rest["weight_decay"]) == (0.5, 0.0)


def test_reports_of_every_step_and_epoch(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    reports: list[StepReport] = []
    train_(toy(), batches(count=3), TrainConfig(epochs=2), watch=reports.append)
    assert [(r.epoch, r.step, r.end_of_epoch is not None) for r in reports] == [
        (e, s, end) for e in (0, 1) for s, end in ((1, False), (2, False), (3, False), (3, True))
    ]
    assert {(r.phase, r.epochs, r.steps) for r in reports} == {("train", 2, 3)}
    mean = sum(r.loss for r in reports[:3]) / 3  # equal batches
    assert reports[3].loss == pytest.approx(mean)
    # a cosine over 6 steps, after a rise over a twentieth of them; no validation data
    last = 1e-3 * 0.5 * (1 + math.cos(math.pi * (2 / 6 - 0.05) / 0.95))
    assert reports[3].end_of_epoch == {
        "train_loss": reports[3].loss, "lr": pytest.approx(last), "selected_by": "last",
    }  # fmt: skip


def test_no_epochs_change_nothing(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net = toy()
    before = state(net)
    train_(net, batches(), TrainConfig(epochs=0))
    assert same(state(net), before)


# ------------------------------------------------------------------------------------------ seeds


def test_a_seed_repeats_bit_for_bit(toy: Callable[..., nn.Module]) -> None:
    runs = []
    for seed in (0, 0, 1):
        net = toy(dropout=0.3)
        torch.manual_seed(len(runs))  # the caller's generator has no say
        train_(net, augmented(), TrainConfig(epochs=2, seed=seed))
        runs.append(state(net))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])  # dropout


def test_the_global_generator_is_left_alone(toy: Callable[..., nn.Module]) -> None:
    net = toy(dropout=0.3)
    before = torch.get_rng_state()
    train_(net, augmented(), TrainConfig(epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("epoch", "step"), [(2, None), (3, None), (2, 1), (0, 2)])
def test_a_resumed_run_ends_bit_for_bit_where_the_undisturbed_one_does(
    toy: Callable[..., nn.Module], tmp_path: Path, optimizer: str, epoch: int, step: int | None
) -> None:
    config = TrainConfig(epochs=3, lr=0.01, optimizer=optimizer)
    whole = toy(dropout=0.3)
    train_(whole, augmented(), config, checkpoint=Checkpoint(tmp_path / "whole.safetensors"))
    broken = toy(dropout=0.3)
    file = tmp_path / "broken.safetensors"
    with pytest.raises(Stopped):
        train_(
            broken, augmented(), config, checkpoint=Checkpoint(file),
            watch=stop_after(epoch, step),
        )  # fmt: skip
    # whoever watches hears of an epoch before it is saved
    assert file.exists() == (epoch > (step is None))
    resumed, reports = toy(seed=5, dropout=0.3) if epoch else toy(dropout=0.3), []
    train_(
        resumed, augmented(), config, checkpoint=Checkpoint(file),
        watch=lambda r: reports.append(r.epoch),
    )  # fmt: skip
    assert set(reports) == set(range(epoch - (step is None), 3))
    assert same(state(resumed), state(whole))
    # the optimizer's state too
    assert same(load_tensors(file)[0], load_tensors(tmp_path / "whole.safetensors")[0])


def test_a_finished_phase_is_loaded_and_not_repeated(
    toy: Callable[..., nn.Module], tmp_path: Path
) -> None:
    config, file = TrainConfig(epochs=2), tmp_path / "c.safetensors"
    net, again = toy(), toy(seed=3)
    train_(net, augmented(), config, checkpoint=Checkpoint(file))
    reports: list[StepReport] = []
    train_(again, augmented(), config, checkpoint=Checkpoint(file), watch=reports.append)
    assert reports == []
    assert same(state(again), state(net))


def saved(toy: Callable[..., nn.Module], path: Path, identity: dict[str, object]) -> None:
    train_(toy(), augmented(), TrainConfig(epochs=1), checkpoint=Checkpoint(path, identity))


def test_a_checkpoint_of_another_run_is_refused(
    toy: Callable[..., nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    saved(toy, file, {"seed": 0, "data": "a"})
    net = toy(seed=1)
    before = state(net)
    with pytest.raises(RequestError, match="must be of this run, but data or configuration differ"):
        train_(net, augmented(), checkpoint=Checkpoint(file, {"seed": 1, "data": "a"}))
    assert same(state(net), before)


def test_the_identity_does_not_depend_on_the_order_of_its_keys(
    toy: Callable[..., nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    saved(toy, file, {"seed": 0, "data": "a"})
    steps: list[object] = []
    train_(
        toy(), augmented(), TrainConfig(epochs=1), watch=steps.append,
        checkpoint=Checkpoint(file, {"data": "a", "seed": 0}),
    )  # fmt: skip
    assert not steps  # the epoch was done, and is not done again


def test_a_checkpoint_of_another_network_is_refused(
    toy: Callable[..., nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    saved(toy, file, {})
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(RequestError, match=r"c\.safetensors: must be of this network"):
        train_(other, augmented(), checkpoint=Checkpoint(file))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_checkpoint_is_refused(
    toy: Callable[..., nn.Module], tmp_path: Path, keep: int
) -> None:
    file = tmp_path / "c.safetensors"
    saved(toy, file, {})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RequestError, match=r"c\.safetensors: must be a whole safetensors file"):
        train_(toy(), augmented(), checkpoint=Checkpoint(file))


def test_a_safetensors_file_that_is_no_checkpoint_is_refused(
    toy: Callable[..., nn.Module], tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    save_tensors(file, toy().state_dict())
    with pytest.raises(RequestError, match="must be of this run"):
        train_(toy(), augmented(), checkpoint=Checkpoint(file))


def test_a_failed_write_leaves_the_last_checkpoint_and_no_rest(
    toy: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.safetensors"
    saved(toy, file, {})
    before = file.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdq.checkpoint.os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        train_(toy(), augmented(), TrainConfig(epochs=2), checkpoint=Checkpoint(file))
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


# ------------------------------------------------------------------------------------- what fails


def poisoned(batches: list[Batch], epoch: int, step: int) -> Any:
    """Batches of which one has a NaN."""

    class Loader:
        current = 0

        def __len__(self) -> int:
            return len(batches)

        def set_epoch(self, number: int) -> None:
            self.current = number

        def __iter__(self) -> Iterator[Batch]:
            for index, (images, labels) in enumerate(batches):
                bad = self.current == epoch and index == step
                yield (images * float("nan") if bad else images), labels

    return Loader()


def test_a_batch_of_one_is_named_where_batch_normalisation_refuses_it() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    loader = [(torch.randn(2, 3), torch.tensor([0, 1])), (torch.randn(1, 3), torch.tensor([0]))]
    with pytest.raises(RequestError, match=r"train: a batch must have more than 1 image"):
        train_(net, loader, TrainConfig(epochs=1))


@pytest.mark.parametrize(("epoch", "step"), [(0, 0), (1, 2)])
def test_a_loss_that_is_not_finite_names_phase_epoch_and_step(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], tmp_path: Path,
    epoch: int, step: int,
) -> None:  # fmt: skip
    file = tmp_path / "c.safetensors"
    kept = f"; the state after epoch {epoch} is kept" if epoch else ""
    message = (
        f"train: loss must be finite, got nan in epoch {epoch + 1}, step {step + 1}: "
        f"the images of the batch are not finite{kept}; mend the data"
    )
    with pytest.raises(RunError) as caught:
        train_(
            toy(), poisoned(batches(count=3), epoch, step), TrainConfig(epochs=3),
            checkpoint=Checkpoint(file),
        )  # fmt: skip
    assert str(caught.value) == message
    assert file.exists() == (epoch > 0)
    if epoch:
        tensors, metadata = load_tensors(file)
        assert metadata["epochs"] == str(epoch)
        assert all(torch.isfinite(t).all() for t in tensors.values())


def test_a_learning_rate_beyond_reason_ends_in_a_run_error(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    config = TrainConfig(epochs=2, lr=1e38, optimizer="sgd", warmup=0, weight_decay=0)
    with pytest.raises(RunError, match=r"train: (loss|weights) must be finite"):
        train_(toy(), batches(), config)


def test_weights_that_diverge_in_the_last_step_are_found(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], tmp_path: Path
) -> None:
    net, file = toy(), tmp_path / "c.safetensors"

    def spoil(report: StepReport) -> None:
        if report.step == report.steps and report.end_of_epoch is None:
            net.hidden.weight.data[0, 0] = float("inf")

    with pytest.raises(RunError, match=r"got NaN or infinity in 'hidden\.weight' after epoch 1"):
        train_(net, batches(), TrainConfig(epochs=2), checkpoint=Checkpoint(file), watch=spoil)
    assert not file.exists()


def test_a_loader_has_a_length_and_images(toy: Callable[..., nn.Module]) -> None:
    with pytest.raises(RequestError, match=r"loader: must have a length.*got generator"):
        train_(toy(), (b for b in [(torch.zeros(1, 1, 8, 8), torch.tensor([0]))]))
    with pytest.raises(RequestError, match="train: the training set must have images, got none"):
        train_(toy(), [])
    assert number_of_steps([]) == 1


def test_the_caller_s_mode_of_the_copy_does_not_matter(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    runs = []
    for training in (True, False):
        net = copy.deepcopy(toy()).train(training)
        train_(net, batches(), TrainConfig(epochs=1))
        runs.append(state(net))
    assert same(*runs)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("optimizer.0.exp_avg"),
        lambda t: t.update({"optimizer.0.step": torch.tensor(-5.0)}),
        lambda t: t.update({"optimizer.0.exp_avg": torch.zeros(1, 7)}),
        lambda t: t.update({"optimizer.99.step": torch.tensor(1.0)}),
        lambda t: t.update({"optimizer.x.step": torch.tensor(1.0)}),
    ],
)
def test_a_damaged_state_of_the_optimizer_is_refused(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], object]
) -> None:
    def optimizer_of(network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters())

    network = nn.Linear(2, 3)
    optimizer = optimizer_of(network)
    network(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(tmp_path / "c.safetensors")
    checkpoint.save(network, optimizer, 1)
    assert checkpoint.load_(network, optimizer_of(network)) == 1
    tensors, metadata = load_tensors(checkpoint.path)
    damage(tensors)
    save_tensors(checkpoint.path, tensors, metadata)
    with pytest.raises(RequestError, match="must be of this network"):
        checkpoint.load_(network, optimizer_of(network))
