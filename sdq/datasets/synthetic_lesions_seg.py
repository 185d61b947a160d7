"""Built-in ultrasound-like images with masks: procedural, one foreground class, no download.

For demonstrations and tests only; nothing measured here says anything about patients. An image
shows tissue in layers under speckle and, unless it is ``normal``, one dark lesion: ``benign`` with
a smooth outline, ``malignant`` with a rough one and a shadow below. Vessels, which are small, flat
and dark too, are no lesions, so that darkness alone does not find the mask. The mask of a normal
image is empty.

The images come from four centres with a gain, speckle, contrast and mix of diagnoses of their own,
for federated training (``--partition natural``).
Licence: the images are made by this file and carry its licence.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sdq.data import ArrayImages, DataOptions, ImageSet, Splits

CLASS_NAMES = ("lesion",)
LABEL_NAMES = ("benign", "malignant", "normal")
COUNTS = {"train": 400, "val": 80, "test": 160}
SIDE = 64

F32 = np.float32
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


@dataclass(frozen=True)
class Centre:
    """What tells one centre's images from another's."""

    gain: float
    """Brightness of tissue, of 1."""
    speckle: float
    """Standard deviation of the noise that multiplies the image."""
    contrast: float
    """Light that a lesion lacks, as a share."""
    fading: float
    """Light lost from top to bottom, as a share."""
    diagnoses: tuple[float, ...]
    """Shares of LABEL_NAMES."""


CENTRES: dict[str, Centre] = {
    "north": Centre(0.55, 0.12, 0.60, 0.15, (0.75, 0.15, 0.10)),
    "east": Centre(0.70, 0.20, 0.45, 0.30, (0.25, 0.65, 0.10)),
    "south": Centre(0.40, 0.08, 0.50, 0.05, (0.55, 0.10, 0.35)),
    "west": Centre(0.60, 0.16, 0.35, 0.40, (0.30, 0.45, 0.25)),
}


def load(options: DataOptions) -> Splits:
    """Return the built-in set: train 400, val 80 and test 160 images, one channel.

    Args:
        options: ``seed`` makes another set; ``image_size`` is the side, 64 when None.

    >>> load(DataOptions()).test.masks.shape
    (160, 1, 64, 64)
    """
    side = options.image_size or SIDE
    train, val, test = (
        _part(count, np.random.default_rng([options.seed, stream]), side)
        for stream, count in enumerate(COUNTS.values())
    )
    return Splits(
        train, val, test, CLASS_NAMES, centre_names=tuple(CENTRES), task="segmentation",
        label_names=LABEL_NAMES,
    )  # fmt: skip


def _part(count: int, rng: np.random.Generator, side: int) -> ImageSet:
    centres = rng.permutation(np.arange(count) % len(CENTRES))
    shares = np.array([centre.diagnoses for centre in CENTRES.values()])
    drawn = rng.random((count, 1)) > np.cumsum(shares, 1)[centres, :-1]
    labels = drawn.sum(1)
    images, masks = _render(labels, centres, rng, side)
    return ImageSet(
        ArrayImages(torch.from_numpy(images)),
        torch.from_numpy(labels),
        torch.from_numpy(centres),
        masks=ArrayImages(torch.from_numpy(masks)),
    )


def _render(
    labels: np.ndarray, centres: np.ndarray, rng: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images and masks, uint8 ``(N, 1, side, side)``."""
    count = len(labels)
    axis = ((np.arange(side, dtype=F32) + F32(0.5)) / F32(side) * 2 - 1).astype(F32)
    u, v = axis[None, None, :], axis[None, :, None]  # (1, 1, W), (1, H, 1)
    figures = [(c.gain, c.speckle, c.contrast, c.fading) for c in CENTRES.values()]
    gain, speckle, contrast, fading = np.array(figures, F32)[centres].T[..., None, None]

    def draw(low: float, high: float) -> Array:
        return rng.uniform(low, high, (count, 1, 1)).astype(F32)

    benign, normal = (labels == 0)[:, None, None], (labels == 2)[:, None, None]
    layers = _waves(rng, count, F32(0.4) * u + F32(2.0) * v)
    patches = _waves(rng, count, u + v) * _waves(rng, count, u - v)
    image = gain * (1 + F32(0.22) * layers + F32(0.10) * patches) * (1 - fading * (v + 1) / 2)
    for _ in range(3):  # vessels, and in some images fewer
        flat = _depth(u, v, draw(-0.9, 0.9), draw(-0.9, 0.9), draw(0.08, 0.16), draw(2.5, 4), 0)
        image = image * (1 - (draw(0, 1) < 0.6) * contrast * _inside(flat, 0.2))
    x, y = draw(-0.45, 0.45), draw(-0.45, 0.45)
    rough = np.where(benign, draw(0.02, 0.06), draw(0.06, 0.12))
    border = sum(
        (rough * draw(0.4, 1.6) * np.cos(k * np.arctan2(v - y, u - x) + draw(0, 2 * np.pi)))
        for k in (2, 3, 5, 7)
    )
    depth = _depth(u, v, x, y, draw(0.22, 0.45), draw(0.9, 1.8), border)
    mask = (depth < 1) & ~normal
    edge = np.where(benign, F32(0.08), F32(0.2))
    image = image * (1 - ~normal * contrast * draw(0.8, 1.2) * _inside(depth, edge))
    shadow = np.exp(-(((u - x) / F32(0.2)) ** 2)) * (v > y)
    image = image * (1 - (labels == 1)[:, None, None] * F32(0.25) * shadow * ~mask)
    image = image * (1 + speckle * rng.standard_normal(image.shape, F32))
    pixels = (np.clip(image, 0, 1) * F32(255) + F32(0.5)).astype(np.uint8)
    return pixels[:, None], mask[:, None].astype(np.uint8)


def _waves(rng: np.random.Generator, count: int, along: Array) -> Array:
    """Return a slow random wave along a direction, -1..1, for each image."""
    k, phase = rng.uniform(2, 5, (count, 1, 1)), rng.uniform(0, 2 * np.pi, (count, 1, 1))
    wave: Array = np.sin(k.astype(F32) * along + phase.astype(F32))
    return wave


def _depth(
    u: Array, v: Array, x: Array, y: Array, radius: Array, wide: Array, border: Array | int
) -> Array:
    """Return the distance from a centre in units of an ellipse's bent outline: 1 lies on it."""
    stretch = np.sqrt(wide)
    distance: Array = np.hypot((u - x) / stretch, (v - y) * stretch) / (radius * (1 + border))
    return distance


def _inside(depth: Array, softness: Array | float) -> Array:
    """Return 1 inside and 0 outside, with a soft edge."""
    return (1 - np.tanh((depth - 1) / softness)) / 2
