"""A set divided among clients: parts stay parts, and every client is tested on its own mix."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fl import count_tables
from fl.clients import Partition, clients_of
from fl.method import ClientData
from sdq.data import ArrayImages, DataOptions, ImageSet, Splits
from sdq.datasets import synthetic_derm


def images(labels: Tensor, first: int, centres: Tensor | None = None) -> ImageSet:
    """Images that say which one they are."""
    number = torch.arange(first, first + len(labels))
    pixels = torch.stack([number % 256, number // 256], 1).to(torch.uint8)[:, :, None, None]
    return ImageSet(ArrayImages(pixels.repeat(1, 1, 2, 2)), labels, centres)


def which(part: ImageSet | None) -> list[int]:
    if part is None:
        return []
    pixels = part.images.take(torch.arange(len(part)))[:, :, 0, 0].long()
    return (pixels[:, 0] + 256 * pixels[:, 1]).tolist()


def splits(
    sizes: tuple[int, int, int] = (600, 200, 300), classes: int = 5, centres: int = 0
) -> Splits:
    parts, first = [], 0
    for size in sizes:
        labels = torch.arange(size) % classes
        of = torch.arange(size) % (centres + 1) - 1 if centres else None
        parts.append(images(labels, first, of) if size else None)
        first += size
    assert parts[0] is not None
    names = tuple(f"c{k}" for k in range(centres))
    return Splits(parts[0], parts[1], parts[2], tuple(map(str, range(classes))), centre_names=names)


def all_of(clients: list[ClientData], part: str) -> list[int]:
    return sorted(i for c in clients for i in which(getattr(c, part)))


@pytest.mark.parametrize(
    "text", ["iid", "iid:1,9,1,9,2,8,1,1,1,1", "dirichlet:0.5", "counts:ich10"]
)
def test_every_image_is_one_clients_and_in_its_own_part(text: str) -> None:
    clients = clients_of(splits(), Partition.parsed(text), 10, 0)
    assert len(clients) == 10
    assert all_of(clients, "train") == list(range(600))
    assert all_of(clients, "val") == list(range(600, 800))
    assert all_of(clients, "test") == list(range(800, 1100))
    again, other = (clients_of(splits(), Partition.parsed(text), 10, seed) for seed in (0, 1))
    assert [which(c.train) for c in again] == [which(c.train) for c in clients]
    assert [which(c.train) for c in other] != [which(c.train) for c in clients]


def counts(part: ImageSet | None, classes: int) -> np.ndarray:
    if part is None:
        return np.zeros(classes)
    return np.bincount(part.labels.numpy(), minlength=classes)


def test_clients_of_given_sizes() -> None:
    clients = clients_of(splits((1000, 0, 500)), Partition.parsed("iid:0.1,0.5,0.4"), None, 0)
    assert [c.name for c in clients] == ["client 0", "client 1", "client 2"]
    assert [len(c.test) for c in clients if c.test is not None] == [50, 250, 200]
    # a tenth of each client's training images is held out to validate
    assert [len(c.train) for c in clients] == [90, 450, 360]


@pytest.mark.parametrize("text", ["dirichlet:0.3", "counts:ich10"])
def test_a_client_is_tested_on_the_mix_it_trains_on(text: str) -> None:
    clients = clients_of(splits((6000, 0, 3000)), Partition.parsed(text), 10, 0)
    for client in clients:
        held_out = counts(client.train, 5) + counts(client.val, 5)
        # 1,200 and 600 images of each class, and each is rounded by less than one image
        assert np.abs(held_out / 1200 - counts(client.test, 5) / 600).max() < 1 / 1200 + 1 / 600


def test_the_counts_of_a_table_are_kept() -> None:
    table = np.array(count_tables.TABLES["ich10"])
    labels = torch.from_numpy(np.repeat(np.arange(5), table.sum(0)))
    whole = Splits(images(labels, 0), images(labels[:5], 0), None, tuple("abcde"))
    clients = clients_of(whole, Partition.parsed("counts:ich10"), None, 0)
    # the client's test images, which the set does not have, come out of its training images
    found = np.stack([counts(c.train, 5) + counts(c.test, 5) for c in clients])
    assert found.tolist() == table.tolist()


def test_the_tables_sum_to_what_was_published() -> None:
    sums = {name: np.array(table).sum(0).tolist() for name, table in count_tables.TABLES.items()}
    assert sums["ich10"] == [1198, 11146, 7130, 11773, 23125]
    # the five clients hold one image of each kind more or less than the ten
    assert np.abs(np.array(sums["ich5"]) - sums["ich10"]).max() <= 57
    assert sums["isic2019"] == [3332, 9084, 2649, 712, 1950, 184, 201, 485]
    rows = {name: np.array(table).sum(1).tolist() for name, table in count_tables.TABLES.items()}
    assert rows["isic2019"] == [9930, 3163, 2691, 1807, 655, 351]
    assert rows["dermoscopic4"] == [2091, 2708, 1144, 1400]


def test_other_numbers_of_classes_are_matched_by_size() -> None:
    """The table's columns by size are 4, 3, 1, 2, 0; the data's classes 2, 0, 1 and then 3."""
    labels = torch.from_numpy(np.repeat(np.arange(4), (30, 20, 40, 10)))
    shares = count_tables.shares("ich10", labels)
    table = np.array(count_tables.TABLES["ich10"])
    for c, column in {2: 4, 0: 3, 1: 1, 3: 2}.items():
        assert shares[c] == pytest.approx(table[:, column] / table[:, column].sum())
    seven = torch.from_numpy(np.repeat(np.arange(7), (70, 60, 50, 40, 30, 20, 10)))
    shares = count_tables.shares("ich10", seven)
    assert shares[5] == pytest.approx(shares[0])  # the sixth again as the first
    assert shares.sum(1) == pytest.approx(np.ones(7))


def test_by_centre_and_what_no_centre_has_is_left_out() -> None:
    clients = clients_of(splits(centres=2), Partition.parsed("natural"), None, 0)
    assert [c.name for c in clients] == ["c0", "c1"]
    assert which(clients[0].train) == [i for i in range(600) if i % 3 == 1]
    assert which(clients[1].test) == [i for i in range(800, 1100) if (i - 800) % 3 == 2]


def test_parts_that_the_set_lacks_are_held_out_from_training() -> None:
    clients = clients_of(splits((600, 0, 0)), Partition.parsed("iid"), 3, 0)
    every = sorted(i for part in ("train", "val", "test") for i in all_of(clients, part))
    assert every == list(range(600))
    for client in clients:
        assert client.test is not None
        assert client.val is not None
        assert len(client.test) == 40
        assert 10 <= len(client.val) <= 20  # a tenth of the rest, class by class
        assert counts(client.train, 5).min() > 0


def test_the_built_in_centres_differ_in_light_and_classes(all_of) -> None:
    found = synthetic_derm.load(DataOptions())
    clients = clients_of(found, Partition.parsed("natural"), 4, 0)
    assert [c.name for c in clients] == ["city", "coast", "hill", "plain"]
    assert sum(len(c.train) for c in clients) == 3500
    bright = [all_of(c, "train").float().mean().item() for c in clients]
    assert max(bright) - min(bright) > 40  # of 255
    mix = np.stack([counts(c.train, 7) / len(c.train) for c in clients])
    melanoma, vascular = mix[:, 4], mix[:, 6]
    assert melanoma.argmax() == 0
    assert vascular.argmax() == 3
    assert melanoma.max() > 3 * melanoma.min()
