"""Metrics against scikit-learn, by hand, and on real images with published weights."""

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdq.batches import Batches, Normalization
from sdq.checkpoint import load_tensors
from sdq.data import DataOptions, open_data
from sdq.errors import RequestError
from sdq.metrics import agreement, classification_metrics, predict
from sdq.models import resnet20
from sdq.task import evaluate

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the reference")


def predictions(n: int, classes: int, seed: int, skill: float = 1.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    logits = torch.randn(n, classes, generator=rng)
    logits[torch.arange(n), labels] += skill
    return logits, labels


@pytest.mark.parametrize(
    ("n", "classes", "absent"),
    [(500, 7, ()), (500, 7, (0,)), (60, 5, ()), (60, 5, (2, 4)), (400, 2, ()), (400, 3, (1,))],
)
def test_metrics_equal_those_of_scikit_learn(n: int, classes: int, absent: tuple[int, ...]) -> None:
    logits, labels = predictions(n, classes, seed=n)
    keep = torch.tensor([int(y) not in absent for y in labels])
    logits, labels = logits[keep], labels[keep]
    present = [c for c in range(classes) if c not in absent]
    found = classification_metrics(logits, labels)
    y, chosen = labels.numpy(), logits.argmax(1).numpy()
    probabilities = logits.double().softmax(1).numpy()
    close = {"abs": 1e-6}  # both are ratios of counts; torchmetrics computes in float32
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(y, chosen), **close)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        balanced = sk.balanced_accuracy_score(y, chosen)
    assert found["balanced_accuracy"] == pytest.approx(balanced, **close)
    f1 = sk.f1_score(y, chosen, average=None, labels=present, zero_division=0).mean()
    assert found["macro_f1"] == pytest.approx(f1, **close)
    areas = [sk.roc_auc_score(y == c, probabilities[:, c]) for c in present]
    assert found["auc"] == pytest.approx(np.mean(areas), **close)
    recall = sk.recall_score(y, chosen, average=None, labels=range(classes), zero_division=0)
    for c in range(classes):
        if c in absent:
            assert found["per_class_recall"][c] is None
        else:
            assert found["per_class_recall"][c] == pytest.approx(recall[c], **close)
    assert found["num_examples"] == len(y)


def test_auc_is_sklearn_s_one_against_the_rest() -> None:
    logits, labels = predictions(300, 4, seed=1)
    probabilities = logits.double().softmax(1)
    expected = sk.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert classification_metrics(logits, labels)["auc"] == pytest.approx(expected, abs=1e-6)


def test_labels_of_no_class_are_refused() -> None:
    logits = torch.zeros(3, 2)
    for wrong in (2, -1):
        with pytest.raises(RequestError, match=r"labels: must be 0 to 1, .* 2 outputs, got"):
            classification_metrics(logits, torch.tensor([0, wrong, 1]))


def test_a_loader_without_images_is_refused() -> None:
    with pytest.raises(RequestError, match="the loader must have images, got none"):
        predict(nn.Linear(2, 2), [])


def test_always_the_largest_class() -> None:
    labels = torch.tensor([0] * 90 + [1] * 10)
    logits = torch.tensor([[1.0, 0.0]]).repeat(100, 1)
    found = classification_metrics(logits, labels)
    assert found["accuracy"] == pytest.approx(0.9)
    assert found["balanced_accuracy"] == 0.5
    assert found["auc"] == 0.5  # all tied
    assert found["per_class_recall"] == [1.0, 0.0]
    assert found["macro_f1"] == pytest.approx((2 * 0.9 / 1.9 + 0) / 2, abs=1e-6)


def ece_by_hand(probabilities: list[list[float]], labels: list[int], bins: int = 15) -> float:
    """Guo et al., ICML 2017, equation 3: bins (m - 1) / M < confidence <= m / M."""
    confidence = [max(p) for p in probabilities]
    right = [p.index(max(p)) == y for p, y in zip(probabilities, labels, strict=True)]
    total = 0.0
    for m in range(1, bins + 1):
        inside = [
            i for i, c in enumerate(confidence) if (m - 1) / bins < c <= m / bins + 1e-9
        ]  # the last end is 1
        if inside:
            accuracy = sum(right[i] for i in inside) / len(inside)
            total += abs(accuracy - sum(confidence[i] for i in inside) / len(inside)) * len(inside)
    return total / len(labels)


def test_ece_by_hand() -> None:
    probabilities = [[0.61, 0.39], [0.65, 0.35], [0.3, 0.7], [0.99, 0.01], [0.95, 0.05]]
    labels = [0, 1, 1, 0, 1]
    # bins (.6, .667]: 1 of 2 right at .63; (.667, .733]: right at .7; (.933, 1]: 1 of 2 at .97
    expected = (2 * abs(0.5 - 0.63) + 0.3 + 2 * abs(0.5 - 0.97)) / 5
    assert ece_by_hand(probabilities, labels) == pytest.approx(expected)
    logits = torch.tensor(probabilities).log()
    found = classification_metrics(logits, torch.tensor(labels))["ece"]
    assert found == pytest.approx(expected, abs=1e-6)  # float32


def test_ece_of_many() -> None:
    logits, labels = predictions(2000, 5, seed=3, skill=2.0)
    expected = ece_by_hand(logits.softmax(1).tolist(), labels.tolist())
    assert classification_metrics(logits, labels)["ece"] == pytest.approx(expected, abs=1e-6)


def test_ece_of_logits_that_look_like_probabilities() -> None:
    # all within [0, 1]: still logits, of which the probabilities are the softmax
    logits = torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.1], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 1, 1])
    expected = ece_by_hand(logits.softmax(1).tolist(), labels.tolist())
    assert classification_metrics(logits, labels)["ece"] == pytest.approx(expected, abs=1e-6)


def test_ece_of_a_confidence_of_one() -> None:
    # exp(-100) vanishes in float32: confidence 1 exactly belongs to the last bin
    logits = torch.tensor([[100.0, 0.0], [3.0, 0.0]])
    labels = torch.tensor([1, 0])
    expected = ece_by_hand(logits.softmax(1).tolist(), labels.tolist())
    assert classification_metrics(logits, labels)["ece"] == pytest.approx(expected, abs=1e-6)


def test_a_perfect_classifier() -> None:
    labels = torch.arange(6) % 3
    found = classification_metrics(nn.functional.one_hot(labels, 3) * 50.0, labels)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc"):
        assert found[name] == pytest.approx(1.0)
    assert found["ece"] == pytest.approx(0.0, abs=1e-6)


def test_agreement_counts_equal_answers() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    b = torch.tensor([[5.0, 0.0], [2.0, 1.0], [0.2, 0.1], [0.0, 0.1]])
    assert agreement(a, b) == 0.75


def test_predict_evaluates_and_gives_the_mode_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3))
    loader = [
        (torch.randn(5, 1, 2, 2), torch.arange(5) % 3),
        (torch.randn(2, 1, 2, 2), torch.tensor([2, 0])),
    ]
    model.train()
    logits, labels = predict(model, loader)
    assert model.training
    assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    images = torch.cat([x for x, _ in loader])
    expected = nn.functional.linear(images.flatten(1), model[2].weight, model[2].bias)
    # float32: the batches are multiplied apart
    torch.testing.assert_close(logits, expected.detach(), rtol=1e-5, atol=1e-6)
    assert evaluate(model, loader) == classification_metrics(logits, labels)
    model.eval()
    predict(model, loader)
    assert not model.training


@pytest.mark.slow
def test_published_resnet20_on_cifar10(real_root: Path) -> None:
    file = real_root / "resnet20_cifar10.safetensors"
    if not file.is_file():
        pytest.skip("no resnet20_cifar10.safetensors in the data root")
    splits = open_data("cifar10", DataOptions(root=real_root))
    assert splits.test is not None
    assert len(splits.test) == 10_000
    model = resnet20.build(10)
    model.load_state_dict(load_tensors(file)[0])
    normalization = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    found = evaluate(model, Batches(splits.test, normalization, batch_size=500))
    # measured once, on images that JPEG has taken ten points from; decoders differ by a few images
    assert found["accuracy"] == pytest.approx(0.810, abs=0.003)
    assert math.isfinite(found["auc"])
