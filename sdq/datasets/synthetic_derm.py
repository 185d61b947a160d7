"""Built-in dermoscopy-like images: procedural, seven long-tailed classes, no download.

For demonstrations and tests only; nothing measured here says anything about skin. The classes are
named after those of HAM10000 and differ by several overlapping cues (border, colour, texture,
structures), none of which decides alone. Two choices make the bitwidth of a layer matter:

* the class shifts the colour by a few grey levels across a far larger spread of skin tone and
  lamp, so the first layer must cancel the brightness precisely to see it;
* the structures (network, globules, streaks, vessels) have a period of three to eight pixels.

All three parts share their mix of classes; every image depends on the seed and on nothing else.

The images come from four centres, for federated training (``--partition natural``). A centre has
its lamp and the warmth of its light, and sees some classes more than others; which centre an image
is from is drawn from its light and its class, and changes no pixel.
Licence: the images are made by this file and carry its licence.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sdq.data import ArrayImages, DataOptions, ImageSet, Splits

CLASS_NAMES = ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
COUNTS = {  # images a class; about the shares of HAM10000, and at least 30 to test on
    "train": (105, 175, 385, 105, 385, 2275, 70),
    "val": (15, 25, 55, 15, 55, 325, 10),
    "test": (45, 75, 165, 45, 165, 975, 30),
}
SIDE = 28  # pixels, as DermaMNIST
CHUNK = (
    256  # images rendered at a time: bounds the memory at large sides; part of the seed's stream
)

F32 = np.float32
Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

# cue -> (mean of each class, in the order of CLASS_NAMES; spread shared by all classes)
MEASURES: dict[str, tuple[tuple[float, ...], float]] = {
    #              akiec  bcc   bkl   df    mel   nv    vasc
    "size": ((0.56, 0.50, 0.58, 0.54, 0.64, 0.52, 0.46), 0.09),  # radius; half the side is 1
    "irregularity": ((0.12, 0.09, 0.08, 0.06, 0.17, 0.07, 0.08), 0.035),  # share of the radius
    "elongation": ((1.3, 1.25, 1.25, 1.15, 1.4, 1.2, 1.2), 0.13),  # long axis by short axis
    "softness": ((0.20, 0.14, 0.07, 0.18, 0.11, 0.13, 0.09), 0.035),  # of the border
    "darkness": ((0.18, 0.20, 0.30, 0.28, 0.40, 0.34, 0.30), 0.08),  # light the lesion absorbs
    "redness": ((0.038, 0.016, -0.025, 0.012, -0.012, 0.00, 0.060), 0.008),  # red against green
    "blueness": ((-0.018, 0.026, -0.020, -0.026, 0.020, -0.002, 0.010), 0.008),  # against yellow
    "variegation": ((0.03, 0.03, 0.03, 0.02, 0.06, 0.02, 0.03), 0.012),  # spread of the colours
}
# structure -> (chance that an image of the class shows it, its contrast)
STRUCTURES: dict[str, tuple[tuple[float, ...], float]] = {
    #              akiec  bcc   bkl   df    mel   nv    vasc
    "network": ((0.05, 0.03, 0.10, 0.30, 0.55, 0.80, 0.02), 0.13),  # fine dark mesh
    "globules": ((0.05, 0.15, 0.15, 0.10, 0.50, 0.30, 0.10), 0.20),  # dark dots
    "streaks": ((0.05, 0.05, 0.05, 0.05, 0.50, 0.05, 0.02), 0.22),  # radial lines at the border
    "veil": ((0.03, 0.15, 0.10, 0.03, 0.45, 0.03, 0.10), 0.30),  # blue-white haze
    "vessels": ((0.60, 0.80, 0.05, 0.15, 0.20, 0.03, 0.25), 0.22),  # thin red curves
    "milia": ((0.20, 0.10, 0.80, 0.05, 0.06, 0.05, 0.02), 0.22),  # bright dots
    "scar": ((0.04, 0.05, 0.02, 0.95, 0.03, 0.01, 0.03), 0.45),  # pale centre
    "lacunae": ((0.03, 0.05, 0.03, 0.02, 0.03, 0.02, 0.75), 0.26),  # round red lakes
}
# centre -> (brightness of its lamp, warmth of its light, how much it sees of each class)
CENTRES: dict[str, tuple[float, float, tuple[float, ...]]] = {
    #                          akiec bcc  bkl  df   mel  nv   vasc
    "city": (0.70, -0.02, (1.0, 1.0, 1.0, 1.0, 3.0, 1.0, 0.3)),  # a melanoma clinic
    "coast": (1.00, 0.02, (3.0, 3.0, 1.0, 0.3, 0.5, 0.4, 1.0)),  # skin that saw much sun
    "hill": (0.90, -0.02, (0.3, 0.5, 0.5, 2.0, 0.3, 1.5, 1.0)),  # screening: mostly nevi
    "plain": (0.80, 0.02, (0.5, 0.3, 2.0, 1.0, 0.6, 0.8, 3.0)),
}
LIGHT_SPREAD = (0.10, 0.02)  # of brightness and warmth around the centre's
SKIN = np.array([0.86, 0.68, 0.58], F32)  # light skin under a white lamp
ABSORBED = np.array([0.75, 1.05, 1.15], F32)  # melanin takes most of the blue
RED_GREEN = np.array([1.0, -1.0, -0.1], F32)
BLUE_YELLOW = np.array([-0.5, -0.35, 1.0], F32)
BLOOD = np.array([0.15, -1.0, -0.7], F32)
HAZE = np.array([0.56, 0.58, 0.70], F32)


def load(options: DataOptions) -> Splits:
    """Return the built-in set: train 3500, val 500 and test 1500 images of seven classes.

    Args:
        options: ``seed`` makes another set; ``image_size`` is the side, 28 when None.

    Source: made by this file; class names as in Tschandl 2018, doi:10.1038/sdata.2018.161.

    >>> load(DataOptions()).test.images.shape
    (1500, 3, 28, 28)
    """
    side = options.image_size or SIDE
    parts = {
        name: _part(counts, [options.seed, stream], side)
        for stream, (name, counts) in enumerate(COUNTS.items())
    }
    return Splits(
        parts["train"], parts["val"], parts["test"], CLASS_NAMES, vertical_flip=True,
        centre_names=tuple(CENTRES),
    )  # fmt: skip


def _part(counts: tuple[int, ...], seed: list[int], side: int) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    chunks = [
        _render(labels[start : start + CHUNK], rng, side) for start in range(0, len(labels), CHUNK)
    ]
    images, lights = (np.concatenate(arrays) for arrays in zip(*chunks, strict=True))
    return ImageSet(
        ArrayImages(torch.from_numpy(images)),
        torch.from_numpy(labels),
        torch.from_numpy(_centres(labels, lights, np.random.default_rng([*seed, 1]))),
    )


def _centres(labels: np.ndarray, lights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw the centre of each image from its class and its light, ``(N, 2)``."""
    own = np.array([centre[:2] for centre in CENTRES.values()])
    sees = np.array([centre[2] for centre in CENTRES.values()])  # (centres, classes)
    distance = (lights[:, None] - own[None]) / np.array(LIGHT_SPREAD)  # (N, centres, 2)
    odds = sees[:, labels].T * np.exp(-(distance**2).sum(2) / 2) + 1e-9
    cumulated = np.cumsum(odds / odds.sum(1, keepdims=True), 1)
    drawn: np.ndarray = (rng.random((len(labels), 1)) > cumulated[:, :-1]).sum(1)
    return drawn


@dataclass(frozen=True)
class _Canvas:
    """What every structure is drawn on; all arrays are ``(B, H, W)`` or broadcast to it."""

    rng: np.random.Generator
    batch: int
    u: Array  # (1, 1, W) to the right, -1..1
    v: Array  # (1, H, 1) down, -1..1
    depth: Array  # distance from the centre, 1 at the border of the lesion
    angle: Array  # around the centre
    mask: Array  # 1 inside the lesion, 0 outside

    def uniform(self, low: float, high: float) -> Array:
        """One number an image, ``(B, 1, 1)``."""
        return self.rng.uniform(low, high, (self.batch, 1, 1)).astype(F32)

    def waves(self, period: float, count: int) -> Array:
        """A random smooth field of standard deviation 1; ``period`` in half sides."""
        field: Array = np.zeros_like(self.depth)
        for _ in range(count):
            turn, phase = self.uniform(0, np.pi), self.uniform(0, 2 * np.pi)
            k = self.uniform(0.8, 1.2) * F32(2 * np.pi / period)
            field += np.cos(k * (np.cos(turn) * self.u + np.sin(turn) * self.v) + phase)
        return field * F32(np.sqrt(2 / count))

    def mesh(self, period: float) -> Array:
        """Two crossed waves, -1..1, in a random direction: peaks on a slightly bent lattice."""
        turn, k = self.uniform(0, np.pi), self.uniform(0.85, 1.15) * F32(2 * np.pi / period)
        bend = self.uniform(0.3, 0.8) * np.sin(F32(2.5) * self.u * self.v + self.uniform(0, 6))
        across = k * (np.cos(turn) * self.u + np.sin(turn) * self.v) + bend
        along = k * (np.cos(turn) * self.v - np.sin(turn) * self.u) + self.uniform(0, 6)
        peaks: Array = np.cos(across) * np.cos(along)
        return peaks


def _render(
    labels: np.ndarray, rng: np.random.Generator, side: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return one image a label, uint8 ``(B, 3, side, side)``, and its light, ``(B, 2)``."""
    measure = {
        cue: (np.asarray(means, F32)[labels] + rng.normal(0, spread, len(labels)).astype(F32))[
            :, None, None
        ]
        for cue, (means, spread) in MEASURES.items()
    }
    contrast = {
        name: (
            (rng.random(len(labels)) < np.asarray(chances)[labels])
            * rng.uniform(0.6, 1.2, len(labels))
            * strength
        ).astype(F32)[:, None, None]
        for name, (chances, strength) in STRUCTURES.items()
    }
    canvas = _outline(measure, rng, side)
    skin = _skin(canvas)  # (B, 3, H, W)
    image = _colour(canvas, skin, measure)
    image = _structures(canvas, image, contrast)
    image, light = _camera(canvas, image)
    return (np.clip(image, 0, 1) * F32(255) + F32(0.5)).astype(np.uint8), light


def _outline(measure: dict[str, Array], rng: np.random.Generator, side: int) -> _Canvas:
    """An ellipse whose radius carries five harmonics."""
    batch = len(measure["size"])
    axis = ((np.arange(side, dtype=F32) + F32(0.5)) / F32(side) * 2 - 1).astype(F32)
    u, v = axis[None, None, :], axis[None, :, None]

    def draw(low: float, high: float) -> Array:
        return rng.uniform(low, high, (batch, 1, 1)).astype(F32)

    x, y, turn = u - draw(-0.15, 0.15), v - draw(-0.15, 0.15), draw(0, np.pi)
    stretch = np.sqrt(np.maximum(measure["elongation"], 1))
    along = (np.cos(turn) * x + np.sin(turn) * y) / stretch
    across = (np.cos(turn) * y - np.sin(turn) * x) * stretch
    angle = np.arctan2(across, along)
    border = np.ones_like(angle)
    for k in range(2, 7):
        amplitude = np.maximum(measure["irregularity"], 0) * draw(0.3, 1.7) / F32(np.sqrt(k))
        border += amplitude * np.cos(k * angle + draw(0, 2 * np.pi))
    depth = np.hypot(along, across) / (np.maximum(measure["size"], 0.2) * np.maximum(border, 0.2))
    mask = (1 - np.tanh((depth - 1) / np.maximum(2 * measure["softness"], 0.06))) / 2
    return _Canvas(rng, batch, u, v, depth, angle, mask)


def _channels(values: Array, colour: Array) -> Array:
    """``(B, H, W)`` times ``(3,)``: ``(B, 3, H, W)``."""
    return values[:, None] * colour[None, :, None, None]


def _skin(canvas: _Canvas) -> Array:
    """Skin of every tone, with faint furrows."""
    melanin = canvas.uniform(0, 1) ** 2
    furrows = F32(0.012) * canvas.waves(0.3, 3)
    return np.exp(-_channels(F32(0.75) * melanin + furrows, ABSORBED)) * SKIN[None, :, None, None]


def _colour(canvas: _Canvas, skin: Array, measure: dict[str, Array]) -> Array:
    """The pigment of the lesion, in patches, and the two shifts of hue that tell the class."""
    pigment = measure["darkness"] * (1 + F32(0.15) * canvas.waves(1.6, 3))
    image = skin * np.exp(-_channels(canvas.mask * pigment * F32(1.6), ABSORBED))
    patches = np.maximum(measure["variegation"], 0)
    red = measure["redness"] + patches * F32(0.4) * canvas.waves(1.1, 3)
    blue = measure["blueness"] + patches * F32(0.4) * canvas.waves(1.1, 3)
    shift = _channels(canvas.mask * red, RED_GREEN) + _channels(canvas.mask * blue, BLUE_YELLOW)
    return image + shift


def _structures(canvas: _Canvas, image: Array, contrast: dict[str, Array]) -> Array:
    """What a dermatologist looks for; an image without a structure has contrast 0 for it."""
    mask, depth = canvas.mask, canvas.depth
    lines = 1 - np.abs(canvas.mesh(0.50))  # bright where a wave crosses 0: a net of lines
    dots = np.maximum(canvas.mesh(0.55) - F32(0.45), 0) * 2
    rays = np.cos(np.floor(canvas.uniform(9, 15)) * canvas.angle + canvas.uniform(0, 6))
    rim = np.exp(-(((depth - F32(0.9)) / F32(0.2)) ** 2))
    dark = (
        contrast["network"] * mask * (lines - F32(0.6)) * F32(1.3)
        + contrast["globules"] * mask * dots * F32(1.4)
        + contrast["streaks"] * rim * rays
    )
    image = image * np.exp(-_channels(dark, ABSORBED))
    bright = contrast["milia"] * mask * np.maximum(canvas.mesh(0.6) - F32(0.5), 0) * 2
    bright = bright + contrast["scar"] * np.exp(-((depth / F32(0.55)) ** 2))
    image = image + bright[:, None]
    haze = (contrast["veil"] * mask * (canvas.waves(1.3, 2) > F32(0.3)))[:, None]
    image = image * (1 - haze) + haze * HAZE[None, :, None, None]
    curves = np.exp(-((canvas.waves(1.2, 3) / F32(0.25)) ** 2))
    lakes = np.clip(canvas.mesh(0.8) * 2 - F32(0.4), 0, 1)
    blood = F32(0.6) * contrast["vessels"] * mask * curves + contrast["lacunae"] * mask * lakes
    return image + _channels(blood * F32(0.5), BLOOD)


def _camera(canvas: _Canvas, image: Array) -> tuple[Array, np.ndarray]:
    """Lamp, uneven light, dark corners, hairs and noise: all the same for every class.

    Returns the image, and the brightness and warmth of its light, ``(B, 2)``.
    """
    u, v, rng = canvas.u, canvas.v, canvas.rng
    for _ in range(3):
        turn = canvas.uniform(0, np.pi)
        gap = np.cos(turn) * u + np.sin(turn) * v - canvas.uniform(-0.9, 0.9)
        gap = gap + canvas.uniform(-0.3, 0.3) * (np.cos(turn) * v - np.sin(turn) * u) ** 2
        shown = canvas.uniform(0, 1) < F32(0.2)
        hair = shown * canvas.uniform(0.2, 0.6) * np.exp(-((gap / F32(0.04)) ** 2))
        image = image * (1 - hair[:, None])
    light = 1 + canvas.uniform(-0.12, 0.12) * u + canvas.uniform(-0.12, 0.12) * v
    corner = canvas.uniform(0, 1) * np.maximum(np.hypot(u, v) - F32(0.9), 0)
    lamp, warmth = canvas.uniform(0.55, 1.2), canvas.uniform(-0.03, 0.03)  # (B, 1, 1)
    cast = 1 + _channels(warmth, np.array([1.0, 0.0, -1.0], F32))
    image = image * ((light - corner)[:, None] * lamp[:, None]) * cast
    noise = rng.standard_normal(image.shape, F32) * F32(0.012)
    return image + noise, np.concatenate([lamp, warmth], 1)[:, :, 0]
