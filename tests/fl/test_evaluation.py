"""Masks, priors and means over clients, by hand."""

import math

import pytest
import torch

from fl.evaluation import specialization, variants
from fl.losses import log_prior
from sdq.metrics import classification_metrics


def test_masking_an_absent_class() -> None:
    logits = torch.tensor([[1.0, 0.0, 5.0], [0.0, 1.0, 5.0]])
    counts = torch.tensor([3.0, 1.0, 0.0])
    found = variants(logits, counts)
    assert list(found) == ["plain", "masked"]
    labels = torch.tensor([0, 1])
    assert classification_metrics(found["plain"], labels)["balanced_accuracy"] == 0.0
    masked = classification_metrics(found["masked"], labels)
    assert masked["balanced_accuracy"] == 1.0
    assert masked["auc"] == 1.0
    assert math.isfinite(masked["ece"])
    assert list(variants(logits, torch.ones(3))) == ["plain"]


def test_a_masked_class_that_occurs_is_never_found() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    found = variants(logits, torch.tensor([5.0, 0.0]))["masked"]
    assert classification_metrics(found, torch.tensor([0, 1]))["per_class_recall"] == [1.0, 0.0]


def test_logit_adjustment() -> None:
    """Of nine images to one: log 9 goes to the rare class."""
    logits = torch.tensor([[2.0, 0.0]])
    found = variants(logits, torch.tensor([9.0, 1.0]), adjust=1.0)["adjusted"]
    assert float(found[0, 1] - found[0, 0]) == pytest.approx(math.log(9) - 2, abs=1e-6)
    assert int(found.argmax()) == 1
    absent = variants(torch.zeros(1, 3), torch.tensor([9.0, 1.0, 0.0]), adjust=1.0)["adjusted"]
    assert int(absent.argmax()) == 1
    assert float(log_prior(torch.tensor([0.0, 1.0]))[0]) < -20


def client(predicted: list[int], labels: list[int]) -> dict[str, object]:
    logits = torch.nn.functional.one_hot(torch.tensor(predicted), 3).float() * 4
    metrics = classification_metrics(logits, torch.tensor(labels))
    return {"model": {"plain": metrics}}


def test_specialization_by_hand() -> None:
    """Clients of 1, 1/2 and 0: each counts once, whatever it has of images."""
    evaluations = {
        4: client([0, 1, 2, 2, 2], [0, 1, 2, 2, 2]),
        1: client([0, 0], [0, 1]),
        2: client([1], [0]),
    }
    found = specialization(evaluations)
    assert found["balanced_accuracy"] == pytest.approx(0.5)
    assert found["worst_client"] == 2
    assert found["worst_balanced_accuracy"] == 0.0
    assert found["clients"] == {"1": 0.5, "2": 0.0, "4": 1.0}
    assert found["num_examples"] == 8
    # recall of class 0 is 1, 1, 0; of class 1, which client 2 has not, 1, 0; of class 2 1
    assert found["per_class_recall"] == [pytest.approx(2 / 3), 0.5, 1.0]


def test_a_client_without_absent_classes_counts_plain_among_the_masked() -> None:
    one, other = client([0, 1], [0, 1]), client([1, 1], [0, 1])
    one["model"]["masked"] = classification_metrics(torch.eye(3)[[0, 1]], torch.tensor([1, 0]))  # type: ignore[index]
    found = specialization({0: one, 1: other})
    assert found["views"]["model"]["masked"]["balanced_accuracy"] == pytest.approx((0 + 0.5) / 2)
    assert found["views"]["model"]["plain"]["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)
