"""Built-in CT-like slices of the head: one channel, five kinds of bleeding, no download.

For demonstrations and tests only; nothing measured here says anything about patients. A slice is
a skull, a brain with ventricles and furrows, and one bleeding, whose kind is told by where it is
and what shape it has: a lens under the skull (epidural), a blob in the brain (intraparenchymal),
blood in the ventricles (intraventricular), blood in the furrows (subarachnoid), a crescent along
the skull (subdural). Small and faint bleedings are many, so that no kind is easy.

The shares of the kinds are about those of the RSNA set (subdural first, epidural last). The images
come from four scanners, each with its own window, sharpness, noise and mix of kinds, for federated
training (``--partition natural``). Every image depends on the seed and on nothing else.
Licence: the images are made by this file and carry its licence.
"""

from collections.abc import Callable

import numpy as np
import torch

from sdq.data import ArrayImages, DataOptions, ImageSet, Splits

CLASS_NAMES = ("epidural", "intraparenchymal", "intraventricular", "subarachnoid", "subdural")
COUNTS = {
    "train": (60, 300, 190, 320, 630),
    "val": (10, 40, 25, 45, 80),
    "test": (40, 120, 80, 130, 230),
}
SIDE = 32
CHUNK = 256  # images rendered at a time; part of the seed's stream

# scanner -> (brightness, contrast, noise, blur, how much it sees of each kind)
CENTRES: dict[str, tuple[float, float, float, float, tuple[float, ...]]] = {
    #                                   epi  paren ventr subar subdu
    "trauma": (0.00, 1.00, 0.020, 0.0, (4.0, 0.5, 0.3, 1.0, 1.5)),
    "stroke": (0.06, 0.85, 0.015, 0.5, (0.2, 3.0, 2.0, 1.0, 0.3)),
    "county": (-0.05, 1.15, 0.040, 0.0, (1.0, 1.0, 1.0, 0.3, 2.0)),
    "mobile": (0.10, 0.70, 0.025, 0.8, (0.5, 0.8, 1.5, 2.0, 0.5)),
}

F32 = np.float32
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def load(options: DataOptions) -> Splits:
    """Return the built-in set: train 1500, val 200 and test 600 slices of five kinds.

    Args:
        options: ``seed`` makes another set; ``image_size`` is the side, 32 when None.

    Source: made by this file; kinds and shares as in Flanders et al. 2020,
    https://doi.org/10.1148/ryai.2020190211.

    >>> load(DataOptions()).train.images.shape
    (1500, 1, 32, 32)
    """
    side = options.image_size or SIDE
    parts = {
        name: _part(counts, np.random.default_rng([options.seed, 7, stream]), side)
        for stream, (name, counts) in enumerate(COUNTS.items())
    }
    # a head has a left and a right, and a bleeding may be on either side
    return Splits(
        parts["train"], parts["val"], parts["test"], CLASS_NAMES, centre_names=tuple(CENTRES)
    )


def _part(counts: tuple[int, ...], rng: np.random.Generator, side: int) -> ImageSet:
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    sees = np.array([centre[4] for centre in CENTRES.values()])[:, labels]  # (centres, N)
    cumulated = np.cumsum(sees / sees.sum(0), 0)
    centres = (rng.random(len(labels)) > cumulated[:-1]).sum(0)
    chunks = [
        _render(labels[i : i + CHUNK], centres[i : i + CHUNK], rng, side)
        for i in range(0, len(labels), CHUNK)
    ]
    images = ArrayImages(torch.from_numpy(np.concatenate(chunks)))
    return ImageSet(images, torch.from_numpy(labels), torch.from_numpy(centres))


def _render(
    labels: np.ndarray, centres: np.ndarray, rng: np.random.Generator, side: int
) -> np.ndarray:
    """Return one slice a label, uint8 ``(B, 1, side, side)``."""
    batch = len(labels)
    axis = ((np.arange(side, dtype=F32) + F32(0.5)) / F32(side) * 2 - 1).astype(F32)

    def draw(low: float, high: float) -> Array:
        return rng.uniform(low, high, (batch, 1, 1)).astype(F32)

    turn = draw(-0.25, 0.25)
    x, y = axis[None, None, :] - draw(-0.06, 0.06), axis[None, :, None] - draw(-0.06, 0.06)
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    radius = np.hypot(u / draw(0.66, 0.74), v / draw(0.80, 0.90))  # 1 at the inner skull
    angle = np.arctan2(v, u)
    brain = _below(radius, 1.0, 0.04)
    furrows = brain * _near(np.cos(draw(9, 14) * angle + draw(0, 6)), 1, 0.35) * (radius > 0.72)
    middle = np.abs(u) - draw(0.07, 0.13)
    ventricles = _below(np.hypot(middle / 0.09, (v - draw(-0.1, 0.1)) / draw(0.2, 0.32)), 1.0, 0.25)
    image = 0.45 * brain + 0.02 * rng.standard_normal((batch, side, side), F32)
    image = image - 0.22 * ventricles - 0.12 * furrows
    blood = _blood(labels, draw, radius, angle, (u, v), ventricles, furrows) * brain
    image = image + draw(0.18, 0.36) * blood
    skull = _near(radius, 1.10, 0.07)
    return _scan(image + 0.75 * skull, centres, rng)


def _blood(
    labels: np.ndarray,
    draw: Callable[[float, float], Array],
    radius: Array,
    angle: Array,
    place: tuple[Array, Array],
    ventricles: Array,
    furrows: Array,
) -> Array:
    """Return where the bleeding of each slice is, ``(B, H, W)`` in 0..1."""
    around = draw(-np.pi, np.pi)
    apart = np.abs(np.angle(np.exp(1j * (angle - around)))).astype(F32)  # along the skull
    depth = (1 - radius) / draw(0.10, 0.22)
    width = draw(0.25, 0.45)
    lens = _below((apart / width) ** 2 + depth, 1.0, 0.2)
    crescent = _below(apart / (3.2 * width), 1.0, 0.1) * _below(depth, 0.6, 0.2)
    far, towards = draw(0.15, 0.55), draw(-np.pi, np.pi)
    size = draw(0.10, 0.24)
    off = np.hypot(place[0] - far * np.cos(towards), place[1] - far * np.sin(towards))
    blob = _below(off / size, 1.0, 0.2)
    part = _below(apart, 1.4, 0.3)
    of_kind = np.stack([lens, blob, ventricles * draw(0.7, 1.3), furrows * part * 1.2, crescent])
    found: Array = of_kind[labels, np.arange(len(labels))]
    return np.clip(found, 0, 1)


def _below(value: Array, limit: float, softness: float) -> Array:
    """1 where the value is below the limit, 0 above, smooth between."""
    found: Array = (1 - np.tanh((value - F32(limit)) / F32(softness))) / 2
    return found


def _near(value: Array, centre: float, width: float) -> Array:
    found: Array = np.exp(-(((value - F32(centre)) / F32(width)) ** 2))
    return found


def _scan(image: Array, centres: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each scanner's window, sharpness and noise."""
    values = np.array([centre[:4] for centre in CENTRES.values()], F32)[centres]
    bright, contrast, noise, blur = (values[:, i, None, None] for i in range(4))
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    cross = padded[:, :-2, 1:-1] + padded[:, 2:, 1:-1] + padded[:, 1:-1, :-2] + padded[:, 1:-1, 2:]
    image = (1 - blur) * image + blur * cross / 4
    image = (image - F32(0.4)) * contrast + F32(0.4) + bright
    image = image + noise * rng.standard_normal(image.shape, F32)
    pixels = (np.clip(image, 0, 1) * F32(255) + F32(0.5)).astype(np.uint8)
    return pixels[:, None]
