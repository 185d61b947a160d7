"""Batches of normalised images, with augmentation, in an order that follows from seed and epoch.

The order and the augmentation of an epoch depend on nothing but ``(seed, epoch)``: a run that
resumes at an epoch sees exactly what an undisturbed run would have seen.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sdq.data import ImageSet
from sdq.errors import RequestError

Loader = Iterable[tuple[Tensor, Tensor]]
"""Of ``(images, labels)``; in segmentation the labels are masks, int64 ``(B, H, W)``."""


def generator(seed: int, purpose: str, epoch: int = 0) -> torch.Generator:
    """Return a generator of its own for one purpose and epoch of a seeded run."""
    # splitmix-like: nearby seeds and epochs must not give related streams
    mixed = seed & 0xFFFFFFFF
    for value in (*purpose.encode(), epoch):
        mixed = (mixed ^ value) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 29
    return torch.Generator().manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


@contextmanager
def seeded(seed: int, purpose: str, epoch: int = 0) -> Iterator[None]:
    """Let what draws from torch's global generator within follow from a seed.

    Dropout does, and so does a shuffling DataLoader. The caller's generator is left alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(generator(seed, purpose, epoch).initial_seed())
        yield


def first_weights(seed: int) -> AbstractContextManager[None]:
    """Let a network that is built within have the weights that follow from a seed.

    Everything that is compared starts so.
    """
    return seeded(seed, "weights")


def balanced_indices(labels: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return indices of images, drawn with equal chances for each class that occurs.

    Args:
        labels: int64 ``(N,)``.
        count: how many to draw; an image may come several times.
        rng: to draw with.
    """
    chances = 1 / torch.bincount(labels).double()[labels]
    return torch.multinomial(chances, count, replacement=True, generator=rng)


@dataclass(frozen=True)
class Normalization:
    """``(pixel / 255 - mean) / std`` for each channel, in float32."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise RequestError(
                "normalization: mean and std must have one value a channel and std be positive, "
                f"got mean {self.mean} and std {self.std}"
            )

    def __call__(self, pixels: Tensor) -> Tensor:
        """Map uint8 ``(N, C, H, W)`` to float32 of the same shape."""
        shape = (1, len(self.mean), 1, 1)
        mean = torch.tensor(self.mean, device=pixels.device).view(shape)
        std = torch.tensor(self.std, device=pixels.device).view(shape)
        return (pixels.float() / 255.0 - mean) / std

    @classmethod
    def of(cls, images: ImageSet, sample: int = 2000) -> "Normalization":
        """Return the channel statistics of evenly spaced images."""
        count = len(images)
        indices = torch.linspace(0, count - 1, min(sample, count)).long()
        pixels = images.images.take(indices).double() / 255
        std = pixels.std(dim=(0, 2, 3)).clamp_min(1e-3)  # a constant channel must not divide by 0
        mean = pixels.mean(dim=(0, 2, 3))
        # six digits: what is recorded in the run is what is used
        return cls(tuple(round(float(m), 6) for m in mean), tuple(round(float(s), 6) for s in std))

    @classmethod
    def given(cls, mean: Sequence[float], std: Sequence[float], channels: int) -> "Normalization":
        """Return the caller's statistics; one value serves every channel.

        Args:
            mean: of pixels in 0..1, for all channels or for each.
            std: likewise.
            channels: of the images.

        Raises:
            RequestError: neither one value nor one for each channel, or not of pixels in 0..1.
        """
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise RequestError(
                    f"--{name}: must be one value or one a channel ({channels}), got {len(values)}"
                )
        if not all(0 <= m <= 1 for m in mean) or not all(s <= 1 for s in std):
            raise RequestError(
                f"--mean, --std: must be of pixels in 0..1, got {', '.join(f'{x:g}' for x in mean)}"
                f" and {', '.join(f'{x:g}' for x in std)}; divide those of 0..255 by 255"
            )
        repeat = channels if len(mean) == 1 else 1, channels if len(std) == 1 else 1
        return cls(tuple(mean) * repeat[0], tuple(std) * repeat[1])


def pairs(loader: Iterable[object]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches of a loader; RequestError unless each is ``(images, labels)``."""
    for batch in loader:
        if isinstance(batch, tuple | list) and len(batch) == 2:
            images, labels = batch
            if isinstance(images, Tensor) and isinstance(labels, Tensor):
                yield images, labels
                continue
        raise RequestError(
            f"loader: must yield (images, labels), two tensors, got {_described(batch)}; give an "
            "iterable with a length and an __iter__ that yields such pairs"
        )


def _described(batch: object) -> str:
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} of {', '.join(map(repr, batch))}"
    if isinstance(batch, tuple | list):
        kinds = ", ".join(type(part).__name__ for part in batch)
        return f"a {type(batch).__name__} of {kinds or 'nothing'}"
    return f"one {type(batch).__name__}"


def length(batches: object) -> int | None:
    """Return the number of batches, or None where it is not known.

    A DataLoader has a length in name, but over an IterableDataset none in fact.
    """
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def parts(images: Tensor, size: int) -> list[Tensor]:
    """Split images ``(N, ...)``; a last one joins those before: batch norm cannot learn from one.

    >>> [len(part) for part in parts(torch.zeros(7, 2), 3)]
    [3, 4]
    """
    found = list(images.split(size))
    if len(found) > 1 and len(found[-1]) == 1:
        found[-2:] = [torch.cat(found[-2:])]
    return found


@dataclass(frozen=True)
class Augmentation:
    """Random flips and shifts. ``shift`` is the largest shift as a share of the side."""

    horizontal_flip: bool = True
    vertical_flip: bool = False
    shift: float = 0.125

    def __call__(self, pixels: Tensor, rng: torch.Generator) -> Tensor:
        """Augment uint8 ``(N, C, H, W)``; each image has its own draw."""
        n, _, h, w = pixels.shape
        rows = torch.arange(h).expand(n, h)
        cols = torch.arange(w).expand(n, w)
        if self.vertical_flip:
            rows = torch.where(torch.rand(n, 1, generator=rng) < 0.5, rows, h - 1 - rows)
        if self.horizontal_flip:
            cols = torch.where(torch.rand(n, 1, generator=rng) < 0.5, cols, w - 1 - cols)
        reach_h, reach_w = int(self.shift * h), int(self.shift * w)
        if reach_h or reach_w:
            # beyond the edge the edge pixel repeats: black bars would be a new kind of image
            dy = torch.randint(-reach_h, reach_h + 1, (n, 1), generator=rng)
            dx = torch.randint(-reach_w, reach_w + 1, (n, 1), generator=rng)
            rows = rows.gather(1, (torch.arange(h) + dy).clamp(0, h - 1))
            cols = cols.gather(1, (torch.arange(w) + dx).clamp(0, w - 1))
        index = torch.arange(n)
        # (N, H, W, C): advanced indices around a slice put the slice last
        moved = pixels[index[:, None, None], :, rows[:, :, None], cols[:, None, :]]
        return moved.permute(0, 3, 1, 2).contiguous()


class Batches:
    """An iterable of ``(images, labels)``: float32 ``(B, C, H, W)`` and int64 ``(B,)``.

    Of images with masks the labels are the masks: int64 ``(B, H, W)``, 0 for background. Masks of
    several channels stay ``(B, L, H, W)``.

    Args:
        data: the images.
        normalization: applied to every batch.
        batch_size: images in a batch; the last may have fewer.
        shuffle: a new order each epoch.
        augment: applied to the pixels before normalisation, or None.
        seed: of order and augmentation.
    """

    def __init__(
        self,
        data: ImageSet,
        normalization: Normalization,
        *,
        batch_size: int = 128,
        shuffle: bool = False,
        augment: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        if batch_size < 1:
            raise RequestError(f"batch_size: must be at least 1, got {batch_size}")
        self.data = data
        self.normalization = normalization
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.augment = augment
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        count = math.ceil(len(self.data) / self.batch_size)
        return count - self._leaves_one_out()

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch's order and augmentation the next pass has."""
        self.epoch = epoch

    def unaugmented(self) -> "Batches":
        """Return the same images in the same orders, without augmentation."""
        return Batches(
            self.data, self.normalization, batch_size=self.batch_size, shuffle=self.shuffle,
            seed=self.seed,
        )  # fmt: skip

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rng = generator(self.seed, "batches", self.epoch)
        count = len(self.data)
        order = torch.randperm(count, generator=rng) if self.shuffle else torch.arange(count)
        for chunk in order.split(self.batch_size):
            if len(chunk) == 1 and self._leaves_one_out():
                continue
            pixels = self.data.images.take(chunk)
            channels = pixels.shape[1]
            if self.data.masks is not None:  # as more channels: a mask moves with its image
                pixels = torch.cat((pixels, self.data.masks.take(chunk)), 1)
            if self.augment is not None:
                pixels = self.augment(pixels, rng)
            if self.data.masks is None:
                yield self.normalization(pixels), self.data.labels[chunk]
            else:
                masks = pixels[:, channels:].long()
                yield self.normalization(pixels[:, :channels]), masks.squeeze(1)

    def _leaves_one_out(self) -> bool:
        """Tell whether training drops a last batch of one: batch norm cannot learn from it."""
        count, size = len(self.data), self.batch_size
        return self.shuffle and count > size > 1 and count % size == 1
