"""Batches: normalisation to the bit, augmentation by hand, order from seed and epoch."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sdq
from sdq.batches import Augmentation, Batches, Normalization, generator
from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError


def image_set(n: int = 10, channels: int = 3, side: int = 8, seed: int = 0) -> ImageSet:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (n, channels, side, side), dtype=np.uint8)
    return ImageSet(ArrayImages(torch.from_numpy(pixels)), torch.arange(n))


PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)


def epoch(batches: Batches, number: int = 0) -> list[tuple[Tensor, Tensor]]:
    batches.set_epoch(number)
    return list(batches)


# -------------------------------------------------------------------------------- normalisation


def test_normalisation_is_exact() -> None:
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pixels = torch.arange(256, dtype=torch.uint8).repeat(1, 3, 1, 1)  # every value, (1, 3, 1, 256)
    ours = Normalization(mean, std)(pixels)
    f32 = np.float32
    values = np.arange(256).astype(f32) / f32(255)
    for c in range(3):
        expected = (values - f32(mean[c])) / f32(std[c])
        assert np.array_equal(ours[0, c, 0].numpy(), expected)


def test_statistics_are_those_of_all_pixels() -> None:
    images = image_set(20)
    found = Normalization.of(images)
    pixels = images.images.take(torch.arange(20)).numpy().astype(np.float64) / 255
    assert found.mean == tuple(round(float(m), 6) for m in pixels.mean((0, 2, 3)))
    assert found.std == tuple(round(float(s), 6) for s in pixels.std((0, 2, 3), ddof=1))


def test_statistics_of_a_sample_are_of_evenly_spaced_images() -> None:
    images = image_set(21)
    found = Normalization.of(images, sample=3)
    assert found == Normalization.of(images.subset(torch.tensor([0, 10, 20])))


def test_a_constant_channel_does_not_divide_by_zero() -> None:
    pixels = torch.zeros(4, 1, 2, 2, dtype=torch.uint8)
    found = Normalization.of(ImageSet(ArrayImages(pixels), torch.zeros(4).long()))
    assert found == Normalization((0.0,), (0.001,))


def test_given_statistics_serve_every_channel_or_each_its_own() -> None:
    assert Normalization.given([0.5], [0.25], 3) == Normalization((0.5,) * 3, (0.25,) * 3)
    assert Normalization.given([0.1, 0.2], [0.5], 2) == Normalization((0.1, 0.2), (0.5, 0.5))
    with pytest.raises(RequestError, match=r"--mean: must be one value or one a channel \(3\)"):
        Normalization.given([0.1, 0.2], [0.5], 3)
    with pytest.raises(RequestError, match=r"--std: must be one value or one a channel \(3\)"):
        Normalization.given([0.1], [0.5] * 4, 3)


@pytest.mark.parametrize("std", [(0.0,), (-1.0,), (float("nan"),), (1.0, 1.0)])
def test_wrong_statistics_are_refused(std: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="one value a channel and std be positive"):
        Normalization((0.5,), std)


# --------------------------------------------------------------------------------- augmentation


HAND = torch.arange(16, dtype=torch.uint8).reshape(1, 1, 4, 4)


def variants(augmentation: Augmentation, draws: int = 200) -> set[tuple[int, ...]]:
    rng = torch.Generator().manual_seed(0)
    return {tuple(augmentation(HAND, rng).flatten().tolist()) for _ in range(draws)}


def shifted(image: np.ndarray, dy: int, dx: int) -> tuple[int, ...]:
    """The pixel at (y + dy, x + dx), the edge repeated."""
    rows, cols = np.clip(np.arange(4) + dy, 0, 3), np.clip(np.arange(4) + dx, 0, 3)
    return tuple(image[np.ix_(rows, cols)].flatten().tolist())


def test_flips_by_hand() -> None:
    image = HAND[0, 0].numpy()
    plain, across = shifted(image, 0, 0), shifted(image[:, ::-1], 0, 0)
    down, both = shifted(image[::-1], 0, 0), shifted(image[::-1, ::-1], 0, 0)
    assert across[:4] == (3, 2, 1, 0)
    assert down[:4] == (12, 13, 14, 15)
    assert variants(Augmentation(False, False, 0.0)) == {plain}
    assert variants(Augmentation(True, False, 0.0)) == {plain, across}
    assert variants(Augmentation(False, True, 0.0)) == {plain, down}
    assert variants(Augmentation(True, True, 0.0)) == {plain, across, down, both}


def test_shifts_by_hand() -> None:
    image = HAND[0, 0].numpy()
    moved = variants(Augmentation(False, False, 0.25))
    assert moved == {shifted(image, dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert shifted(image, 1, 0) == (4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 12, 13, 14, 15)


def test_shift_and_flip_together_by_hand() -> None:
    image = HAND[0, 0].numpy()
    expected = {
        shifted(i, dy, dx)
        for i in (image, image[:, ::-1])
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    }
    assert variants(Augmentation(True, False, 0.25), draws=600) == expected


def test_each_image_has_its_own_draw_and_channels_move_together() -> None:
    pixels = HAND.repeat(400, 3, 1, 1)
    moved = Augmentation(True, True, 0.25)(pixels, torch.Generator().manual_seed(1))
    assert moved.shape == pixels.shape
    assert moved.dtype == torch.uint8
    assert moved.is_contiguous()
    assert torch.equal(moved[:, 0], moved[:, 1])
    assert torch.equal(moved[:, 0], moved[:, 2])
    assert len({tuple(m.flatten().tolist()) for m in moved[:, 0]}) == 4 * 9
    flipped = (moved[:, 0, :, 0].int() > moved[:, 0, :, 3].int()).all(1).float().mean()
    assert abs(float(flipped) - 0.5) < 5 * 0.5 / 20  # five deviations of 400 fair draws


def test_the_input_is_left_as_it_is() -> None:
    before = HAND.clone()
    Augmentation(True, True, 0.25)(HAND, torch.Generator().manual_seed(1))
    assert torch.equal(HAND, before)


# ---------------------------------------------------------------------------------------- order


def test_without_shuffling_the_order_is_the_set_s() -> None:
    images = image_set(10)
    found = epoch(Batches(images, PLAIN, batch_size=4))
    assert [y.tolist() for _, y in found] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    pixels = images.images.take(torch.arange(10))
    assert torch.equal(torch.cat([x for x, _ in found]), pixels.float() / 255)
    assert found[0][0].dtype == torch.float32
    assert found[0][1].dtype == torch.int64


def test_seed_and_epoch_determine_order_and_augmentation() -> None:
    def run(seed: int, number: int) -> list[tuple[Tensor, Tensor]]:
        batches = Batches(
            image_set(30), PLAIN, batch_size=8, shuffle=True, augment=Augmentation(), seed=seed
        )
        return epoch(batches, number)

    first, again = run(1, 2), run(1, 2)
    for (x, y), (other_x, other_y) in zip(first, again, strict=True):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
    for seed, number in ((1, 3), (2, 2)):
        assert torch.cat([y for _, y in run(seed, number)]).tolist() != (
            torch.cat([y for _, y in first]).tolist()
        )


def test_a_pass_does_not_change_the_next_and_set_epoch_does() -> None:
    batches = Batches(image_set(30), PLAIN, batch_size=8, shuffle=True, seed=1)
    once, twice = (torch.cat([y for _, y in batches]).tolist() for _ in range(2))
    assert once == twice
    assert torch.cat([y for _, y in epoch(batches, 1)]).tolist() != once


def test_shuffling_gives_every_image_once() -> None:
    found = epoch(Batches(image_set(30), PLAIN, batch_size=8, shuffle=True))
    order = torch.cat([y for _, y in found]).tolist()
    assert sorted(order) == list(range(30))
    assert order != list(range(30))


def test_images_and_labels_stay_together() -> None:
    images = image_set(20)
    for x, y in epoch(Batches(images, PLAIN, batch_size=6, shuffle=True)):
        assert torch.equal(x, images.images.take(y).float() / 255)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(Batches(image_set(), PLAIN, shuffle=True, augment=Augmentation()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("n", "size"), [(10, 4), (9, 4), (8, 4), (3, 128), (1, 4), (5, 1)])
def test_the_length_is_the_number_of_batches(n: int, size: int, shuffle: bool) -> None:
    batches = Batches(image_set(n), PLAIN, batch_size=size, shuffle=shuffle)
    assert len(epoch(batches)) == len(batches)


def test_a_single_image_is_left_out_of_training_batches_but_not_of_evaluation() -> None:
    sizes = {
        shuffle: [len(y) for _, y in Batches(image_set(9), PLAIN, batch_size=4, shuffle=shuffle)]
        for shuffle in (True, False)
    }
    assert sizes == {True: [4, 4], False: [4, 4, 1]}


def test_batches_of_one_are_given_if_asked_for() -> None:
    found = epoch(Batches(image_set(5), PLAIN, batch_size=1, shuffle=True))
    assert sorted(int(y) for _, y in found) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, -3])
def test_batch_size_is_positive(size: int) -> None:
    with pytest.raises(RequestError, match="batch_size: must be at least 1"):
        Batches(image_set(), PLAIN, batch_size=size)


def test_every_purpose_and_epoch_has_its_own_stream() -> None:
    streams = {
        (seed, purpose, number): generator(seed, purpose, number).initial_seed()
        for seed in (-1, *range(40))
        for purpose in ("batches", "gumbel", "train", "search", "finetune")
        for number in range(40)
    }
    assert len(set(streams.values())) == len(streams)
    first = torch.tensor([
        float(torch.rand((), generator=torch.Generator().manual_seed(s))) for s in streams.values()
    ])  # fmt: skip
    # nearby seeds are unrelated: first draws are uniform (five standard errors of their mean)
    assert abs(float(first.mean()) - 0.5) < 5 * (1 / 12) ** 0.5 / len(first) ** 0.5
    assert generator(3, "gumbel", 2).initial_seed() == streams[3, "gumbel", 2]


def test_unaugmented_batches_are_the_same_images_in_the_same_order() -> None:
    whole = Batches(image_set(), PLAIN, batch_size=4, shuffle=True, augment=Augmentation(), seed=3)
    plain = Batches(image_set(), PLAIN, batch_size=4, shuffle=True, seed=3)
    for number in (0, 2):
        for (x, y), (a, b) in zip(
            epoch(whole.unaugmented(), number), epoch(plain, number), strict=True
        ):
            assert torch.equal(x, a)
            assert torch.equal(y, b)
        labels = [y for _, y in epoch(whole, number)]
        assert all(
            torch.equal(a, b)
            for a, (_, b) in zip(labels, epoch(whole.unaugmented(), number), strict=True)
        )


# ---------------------------------------------------------------------------------- other loaders


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ({"image": torch.zeros(2, 3, 8, 8), "label": torch.zeros(2)}, "a dict of 'image', 'label'"),
        (torch.zeros(2, 3, 8, 8), "one Tensor"),
        ((torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(2)), "a tuple of Tensor, Tensor, T"),
        ((torch.zeros(2, 3, 8, 8), [0, 1]), "a tuple of Tensor, list"),
    ],
)
def test_other_batches_are_refused_by_name(batch: Any, what: str) -> None:
    """Two tensors are not taken for images and labels, nor keys for them."""
    layers = (nn.Linear(192, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    network = nn.Sequential(nn.Flatten(), *layers)
    expected = rf"loader: must yield \(images, labels\), two tensors, got {what}"
    with pytest.raises(RequestError, match=expected):
        sdq.evaluate(network, [batch])
    with pytest.raises(RequestError, match=expected):
        sdq.train_(network, [batch], config=sdq.TrainConfig(epochs=1))
    quantized = sdq.quantize(network, sample=torch.zeros(1, 3, 8, 8))
    with pytest.raises(RequestError, match=expected):
        sdq.calibrate_(quantized, [batch])
    with pytest.raises(RequestError, match=expected):
        sdq.search(quantized, [batch], budget=sdq.Budget(avg_weight_bits=3))
