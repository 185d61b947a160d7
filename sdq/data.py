"""Image sets: what a data plugin returns, and how ``--data`` is resolved.

A set is for classification (a class an image) or for segmentation (a mask an image).

A data plugin ``sdq/datasets/NAME.py`` has one function, ``load(options) -> Splits``. Pixels stay
``uint8`` until a batch is made; scaling to [0, 1] and normalisation belong to the batch
(:mod:`sdq.batches`), so that one place defines what the network sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from sdq import plugins
from sdq.errors import RequestError

TaskName = Literal["classification", "segmentation"]


class Images(Protocol):
    """A sequence of images of one shape: an array in memory, or files decoded when asked for."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)``."""
        ...

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices`` (int64, ``(B,)``) as uint8 ``(B, C, H, W)``."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Images in memory: ``pixels`` is uint8 ``(N, C, H, W)``."""

    pixels: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """``(N, C, H, W)``."""
        n, c, h, w = self.pixels.shape
        return n, c, h, w

    def take(self, indices: Tensor) -> Tensor:
        """Return the images at ``indices``, uint8 ``(B, C, H, W)``."""
        return self.pixels[indices]


@dataclass(frozen=True)
class ImageSet:
    """Images with one class each, and perhaps a mask.

    Args:
        images: read when asked for.
        labels: int64 ``(N,)`` in ``[0, num_classes)``; of images with masks those of the splits'
            ``label_names``, or zeros.
        centres: int64 ``(N,)``, which of the splits' ``centre_names`` each image is from, -1 where
            that is not known; None where the set says nothing of centres.
        names: of the images' files, or their places in the set before it was divided; empty where
            the images have no other name than their place here.
        masks: uint8 ``(N, 1, H, W)``, 0 for background, c for the foreground class of that number,
            from 1 on.
    """

    images: Images
    labels: Tensor
    centres: Tensor | None = None
    names: tuple[str, ...] = ()
    masks: Images | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Tensor) -> "ImageSet":
        """Return a view on the images at ``indices`` (int64, ``(M,)``), read when asked for."""
        return ImageSet(
            _Subset(self.images, indices),
            self.labels[indices],
            None if self.centres is None else self.centres[indices],
            tuple(self.names[i] for i in indices.tolist()) if self.names else (),
            None if self.masks is None else _Subset(self.masks, indices),
        )

    def plain(self) -> "ImageSet":
        """Return the images, labels and masks alone, without centres and names."""
        return ImageSet(self.images, self.labels, masks=self.masks)

    @classmethod
    def joined(cls, sets: Sequence["ImageSet"]) -> "ImageSet":
        """Return a view on the images of several sets, one after the other, read when asked for.

        Raises:
            RequestError: their images differ in shape, some have masks and others none, or there
                is no set.
        """
        shapes = {s.images.shape[1:] for s in sets}
        if len(shapes) != 1:
            raise RequestError(
                f"image sets: those that are joined must have one shape, got {sorted(shapes)}; "
                "resize them"
            )
        masks = tuple(s.masks for s in sets if s.masks is not None)
        if masks and len(masks) < len(sets):
            raise RequestError(
                f"image sets: those that are joined must all have masks or none, got {len(masks)} "
                f"with masks of {len(sets)}; leave the others out, or drop the masks"
            )
        return cls(
            _Joined(tuple(s.images for s in sets)),
            torch.cat([s.labels for s in sets]),
            masks=_Joined(masks) if masks else None,
        )


@dataclass(frozen=True)
class _Subset:
    images: Images
    indices: Tensor

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (len(self.indices), *self.images.shape[1:])

    def take(self, indices: Tensor) -> Tensor:
        return self.images.take(self.indices[indices])


@dataclass(frozen=True)
class _Joined:
    parts: tuple[Images, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return (sum(p.shape[0] for p in self.parts), *self.parts[0].shape[1:])

    def take(self, indices: Tensor) -> Tensor:
        found = torch.empty(len(indices), *self.shape[1:], dtype=torch.uint8)
        first = 0
        for part in self.parts:
            here = (indices >= first) & (indices < first + part.shape[0])
            if bool(here.any()):
                found[here] = part.take(indices[here] - first)
            first += part.shape[0]
        return found


@dataclass(frozen=True)
class Splits:
    """What a data plugin returns. ``val`` and ``test`` may be missing; ``train`` never is."""

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    class_names: tuple[str, ...]
    horizontal_flip: bool = True
    """Whether a mirrored image is as good an example as the image (no for text or sides)."""
    vertical_flip: bool = False
    centre_names: tuple[str, ...] = ()
    """The hospitals or devices the images come from; empty where that is not known."""
    task: TaskName = "classification"
    """In segmentation ``class_names`` are those of the foreground."""
    label_names: tuple[str, ...] = ()
    """In segmentation, what ``labels`` mean (a diagnosis, say); empty where they mean nothing."""

    def classifying(self) -> "Splits":
        """Return the same images to be classified by their ``label_names``, without masks."""
        parts = (
            None if p is None else replace(p, masks=None) for p in (self.train, self.val, self.test)
        )
        train, val, test = parts
        assert train is not None
        return replace(
            self, train=train, val=val, test=test, class_names=self.label_names,
            task="classification", label_names=(),
        )  # fmt: skip

    def numbered(self, class_names: tuple[str, ...]) -> "Splits":
        """Return the same images with their classes numbered as in ``class_names``.

        A folder numbers the classes that it happens to have; where one network learns from several
        sets, a class must have one number in all.

        Raises:
            RequestError: a class of the set is not among them; or, of segmentation, they differ.
        """
        unknown = [name for name in self.class_names if name not in class_names]
        masks_differ = self.task == "segmentation" and self.class_names != class_names
        if unknown or masks_differ:
            raise RequestError(
                f"classes: must be {', '.join(class_names):.200}, got "
                f"{', '.join(self.class_names):.200}; name them alike in all sets"
            )
        if self.task == "segmentation":
            return self
        number = torch.tensor([class_names.index(name) for name in self.class_names])
        train, val, test = (
            None if p is None else replace(p, labels=number[p.labels])
            for p in (self.train, self.val, self.test)
        )
        assert train is not None
        return replace(self, train=train, val=val, test=test, class_names=class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        return self.train.images.shape[1:]

    def checked(self, where: str, *, every_class: bool = True) -> "Splits":
        """Return self, or raise RequestError when labels, shapes or classes do not fit.

        Every class must occur in ``train``: a network cannot learn a class it never sees, and
        the per-class figures would be meaningless. ``every_class=False`` lets it be so: what one
        hospital lacks another may have. In segmentation every image has a mask of its size, whose
        values are at most the number of classes.
        """
        segmenting = self.task == "segmentation"
        names = self.label_names or ("",) if segmenting else self.class_names
        for name, part in (("train", self.train), ("val", self.val), ("test", self.test)):
            if part is None:
                continue
            if len(part) == 0:
                raise RequestError(f"{where}: {name} must have at least one image, got none")
            if len(part) != part.images.shape[0]:
                raise RequestError(
                    f"{where}: {name} must have one label an image, got "
                    f"{part.images.shape[0]} images and {len(part)} labels"
                )
            low, high = int(part.labels.min()), int(part.labels.max())
            if low < 0 or high >= len(names):
                raise RequestError(
                    f"{where}: {name} labels must be in 0..{len(names) - 1}, got {low}..{high}; "
                    "number the classes from 0 without gaps, or name all of them"
                )
            if part.images.shape[1:] != self.image_shape:
                raise RequestError(
                    f"{where}: {name} images must be {self.image_shape} (C, H, W) like train's, "
                    f"got {part.images.shape[1:]}"
                )
            if segmenting:
                check_masks(f"{where}: {name}", part, len(self.class_names))
        present = self._classes_in_train()
        if every_class and present is not None and not bool(present.all()):
            empty = [self.class_names[int(c)] for c in (~present).nonzero()]
            raise RequestError(
                f"{where}: every class must have a training image, got none of "
                f"{', '.join(empty):.200}; remove the class or add images"
            )
        return self

    def _classes_in_train(self) -> Tensor | None:
        """Return which classes occur in ``train``; None where that would mean to read all masks."""
        classes = len(self.class_names)
        if self.task == "classification":
            return torch.bincount(self.train.labels, minlength=classes) > 0
        if self.train.masks is None or not _in_memory(self.train.masks):
            return None
        everything = self.train.masks.take(torch.arange(len(self.train)))
        return torch.bincount(everything.flatten(), minlength=classes + 1)[1:] > 0


def check_masks(where: str, part: ImageSet, classes: int) -> None:
    """Raise RequestError unless every image has a mask of its size, with values in 0..classes.

    Masks that are read when asked for have their values checked then.
    """
    if part.masks is None:
        raise RequestError(f"{where} must have a mask an image, got none; add masks")
    wanted = (part.images.shape[0], 1, *part.images.shape[2:])
    if part.masks.shape != wanted:
        raise RequestError(
            f"{where} masks must be {wanted} (N, 1, H, W) like the images, got "
            f"{part.masks.shape}; save both at one size and from one list"
        )
    if not _in_memory(part.masks):
        return
    highest = part.masks.take(torch.arange(len(part))).flatten(1).amax(1)
    if bool((wrong := highest > classes).any()):
        index = int(wrong.nonzero()[0])
        name = f" ({part.names[index]})" if part.names else ""
        raise RequestError(
            f"{where} masks must have values in 0..{classes}, got {int(highest[index])} in mask "
            f"{index}{name}; number the classes from 1, 0 is background"
        )


def _in_memory(images: Images) -> bool:
    while isinstance(images, _Subset):
        images = images.images
    return isinstance(images, ArrayImages)


@dataclass(frozen=True)
class DataOptions:
    """What the caller may say about a data set.

    Args:
        root: folder that holds the data sets read by name.
        seed: for built-in data, and for the division of a set that has no splits.
        image_size: side in pixels to resize to; None keeps the set's own.
        split: shares of train, val and test for a set that has no splits of its own.
    """

    root: Path | None = None
    seed: int = 0
    image_size: int | None = None
    split: tuple[float, float, float] = (0.7, 0.1, 0.2)

    def rooted(self, name: str) -> Path:
        """Return the data root, or raise RequestError that says how to name one."""
        if self.root is None:
            raise RequestError(
                f"data: {name!r} is read from a data root and none was given; "
                "pass --data-root DIR or set SDQ_DATA"
            )
        return self.root


def open_data(reference: str, options: DataOptions, *, every_class: bool = True) -> Splits:
    """Resolve ``--data``: a plugin name, an ``.npz``, a folder, or ``file.py:function``.

    Args:
        reference: which data.
        options: how they are read.
        every_class: whether each class must have a training image; not so for one hospital's own.

    Raises:
        RequestError: nothing of that name, or what is there does not hold together.
    """
    from sdq import image_folder, mask_folder, npz_file  # here: they use the types above

    if plugins.is_file_reference(reference):
        function, _ = plugins.load_function(reference)
        try:
            splits = plugins.call_with_known(function, options=options, seed=options.seed)
        except RequestError:
            raise
        except Exception as error:
            raise RequestError(
                f"{reference}: must return sdq.data.Splits, but: {type(error).__name__}: {error}; "
                "mend the function (it may take `options` and `seed`)"
            ) from error
        if not isinstance(splits, Splits):
            raise RequestError(
                f"{reference}: must return sdq.data.Splits, got {type(splits).__name__}"
            )
    elif reference.endswith(".npz"):
        splits = npz_file.read_npz(Path(reference), options)
    elif Path(reference).is_dir() and mask_folder.is_mask_folder(Path(reference)):
        splits = mask_folder.read_mask_folder(Path(reference), options)
    elif Path(reference).is_dir():
        splits = image_folder.read_folder(Path(reference), options)
    elif "/" in reference or Path(reference).suffix:
        raise RequestError(
            f"data: no file or folder {reference!r}; give a name "
            f"({', '.join(plugins.names('sdq.datasets'))}), an .npz, or a folder with a CSV"
        )
    else:
        splits = plugins.load("sdq.datasets", reference).load(options)
    return splits.checked(reference, every_class=every_class)


def divide(labels: Tensor, shares: Sequence[float], seed: int) -> list[Tensor]:
    """Divide indices into parts, class by class, so that rare classes reach every part.

    Args:
        labels: int64 ``(N,)``.
        shares: one share a part, the first above 0; they are scaled to sum to 1.
        seed: of the shuffle.

    Returns:
        One sorted int64 index tensor a part; together they are 0..N-1, none twice. The first
        part has at least one member of every class, whatever its share.

    Raises:
        RequestError: a share is negative, or the first is 0.

    >>> [part.tolist() for part in divide(torch.tensor([0, 0, 1]), (0.7, 0.3), seed=0)]
    [[0, 2], [1]]
    """
    weights = np.asarray(shares, dtype=np.float64)
    if not (len(weights) and np.isfinite(weights).all() and weights.min() >= 0 < weights[0]):
        raise RequestError(
            f"divide: shares must be at least 0 and the first above 0, got {tuple(shares)}; "
            "pass, for example, --split 0.7,0.1,0.2"
        )
    rng = np.random.default_rng(seed)
    classes = labels.numpy()
    part_of = np.zeros(len(classes), dtype=np.int64)
    for c in np.unique(classes):
        members = rng.permutation(np.flatnonzero(classes == c))
        part_of[members] = np.repeat(np.arange(len(weights)), _sizes(len(members), weights))
    return [torch.from_numpy(np.flatnonzero(part_of == p)) for p in range(len(weights))]


def _sizes(count: int, weights: np.ndarray) -> np.ndarray:
    """Return whole numbers near ``count * weights / sum(weights)`` that sum to ``count``.

    By largest remainders, where an empty part goes first among equals; the first part takes one
    from the largest when it would stay empty, since a class without a training image is lost.
    """
    quotas = count * weights / weights.sum()
    sizes: np.ndarray = np.floor(quotas + 1e-9).astype(np.int64)
    rest = np.round(quotas - sizes, 9)  # rounded: 0.7 * 2 and 0.2 * 2 leave the same remainder
    order = np.lexsort((sizes, -rest))
    sizes[order[: count - sizes.sum()]] += 1
    if sizes[0] == 0:
        sizes[sizes.argmax()] -= 1
        sizes[0] = 1
    return sizes
