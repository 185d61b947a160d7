"""What follows from a network's output."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdq
from sdq.batches import length
from sdq.losses import distillation
from sdq.task import CLASSIFICATION, SEGMENTATION, Teacher, task_of
from sdq.train import number_of_steps

RNG = torch.Generator().manual_seed(0)
MAPS, LOGITS = torch.randn(2, 3, 4, 4, generator=RNG), torch.randn(2, 3, generator=RNG)


def test_the_output_says_the_task() -> None:
    assert task_of(MAPS) is SEGMENTATION
    assert task_of(LOGITS) is CLASSIFICATION


@pytest.mark.parametrize(
    ("task", "logits"),
    [(SEGMENTATION, MAPS), (CLASSIFICATION, LOGITS)],
    ids=["segmentation", "classification"],
)
def test_divergence_is_distillation_less_its_least_value(task: Any, logits: Tensor) -> None:
    other = logits.flip(0) + 0.5
    expected = task.distillation(other, logits) - task.distillation(logits, logits)
    torch.testing.assert_close(task.divergence(other, logits), expected)
    # and soft labels are what distillation learns
    torch.testing.assert_close(
        task.distillation(other, logits), _learned(task, other, task.soft_labels(logits))
    )
    assert task.agreement(logits, logits) == 1


def _learned(task: Any, logits: Tensor, soft: Tensor) -> Tensor:
    if task is CLASSIFICATION:
        return task.loss(logits, soft)
    return nn.functional.binary_cross_entropy_with_logits(logits, soft)


def test_a_teacher_speaks_of_its_task() -> None:
    images = torch.randn(2, 1, 4, 4)
    maps, classes = nn.Conv2d(1, 3, 1), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    for net, logits in ((maps, MAPS), (classes, LOGITS)):
        expected = task_of(logits).distillation(logits, net(images))
        torch.testing.assert_close(Teacher(net).loss(logits, images), expected)
    assert task_of(LOGITS).distillation is distillation


@pytest.mark.parametrize("task", [CLASSIFICATION, SEGMENTATION], ids=lambda task: task.name)
def test_every_selection_is_a_score(task: Any) -> None:
    logits = MAPS if task is SEGMENTATION else LOGITS
    targets = torch.zeros(2, 4, 4, dtype=torch.long) if task is SEGMENTATION else torch.arange(2)
    assert set(task.selections) == set(task.scores(logits, targets))
    assert task.selection(None) == task.selections[0]
    assert task.selection("last") == "last"
    with pytest.raises(sdq.RequestError, match="--select: must be one of"):
        task.selection("f1")


def test_a_segmenter_is_trained_and_its_best_epoch_kept() -> None:
    """Through the same functions as a classifier, with nothing said."""
    rng = torch.Generator().manual_seed(0)
    masks = (torch.rand(8, 8, 8, generator=rng) > 0.6).long()
    images = masks[:, None] * 2.0 - 1 + 0.1 * torch.randn(8, 1, 8, 8, generator=rng)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
                            nn.Conv2d(4, 1, 1))  # fmt: skip
    batches = [(images, masks)]
    trained = sdq.train_(
        net, batches, sdq.TrainConfig(epochs=40, lr=0.05), validation=batches
    )  # fmt: skip
    assert trained.selected_by == "dice"
    found = sdq.evaluate(net, batches)
    assert found["dice"] == trained.score
    assert found["dice"] > 0.98
    qmodel = sdq.quantize(net, sdq.QuantConfig(act_bits=8), sample=images[:1])
    policy = sdq.search(
        qmodel, batches, budget=sdq.Budget(avg_weight_bits=3.0), teacher=net,
        config=sdq.SearchConfig(epochs=2),
    )  # fmt: skip
    sdq.apply_policy_(qmodel, policy)
    config = sdq.TrainConfig(epochs=10, lr=0.01, select="iou")
    tuned = sdq.finetune_(qmodel, batches, teacher=net, config=config, validation=batches)
    assert tuned.selected_by == "iou"
    assert sdq.evaluate(qmodel, batches)["dice"] > 0.95


def test_a_metric_of_another_task_is_refused(
    toy: Callable[..., nn.Module], batches: Callable[..., Any]
) -> None:
    config = sdq.TrainConfig(epochs=1, select="dice")
    with pytest.raises(sdq.RequestError, match="in classification, got 'dice'"):
        sdq.train_(toy(), batches(), config, validation=batches())


def test_answers_and_labels_that_are_none(refuses) -> None:
    with refuses("network: must answer with one tensor of logits, got tuple"):
        task_of((torch.zeros(2, 3),))
    with refuses("network: must answer with a logit for each of 2 classes or more, got one"):
        task_of(torch.zeros(2, 1))
    for shape in ((6,), (2, 5, 3), (1, 2, 3, 4, 5)):
        with refuses(f"logits (N, classes), or maps of them (N, C, H, W), got {shape}"):
            task_of(torch.zeros(shape))
    logits = torch.randn(4, 3)
    loss = task_of(logits).loss
    soft = torch.rand(4, 3).softmax(1)
    torch.testing.assert_close(loss(logits, soft), -(soft * logits.log_softmax(1)).sum(1).mean())
    with refuses("labels: must be one class an image, int64 (N,), or probabilities of sum 1"):
        loss(logits, torch.ones(4, 3))
    for labels in (torch.zeros(4, 1).long(), torch.zeros(4).int(), torch.zeros(4)):
        with refuses("labels: must be int64 (N,), got"):
            loss(logits, labels)


def test_a_loader_of_no_known_length(refuses) -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.zeros(1, 2, 2), 0)] * 4)

    loader = torch.utils.data.DataLoader(Stream(), batch_size=2)
    assert length(loader) is None
    assert length([1, 2]) == 2
    with refuses("loader: must have a length (the schedule needs it), got DataLoader"):
        number_of_steps(loader)
