"""Which clients have masks, boxes, image labels or nothing, and clients that know less than all.

What a client does not know its :class:`fl.method.ClientData` does not have: a method cannot train
on masks that are not there.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fl.method import LEVELS, ClientData, Method, Supervision
from sdq.batches import generator
from sdq.data import ImageSet
from sdq.errors import RequestError, nearest
from sdq.weak_labels import box_masks, classes_present

BOX_MARGINS = (1 / 256, 9 / 256)
"""Least and most that a simulated box is wider than the mask, as shares of the image's side.

Each of the box's four sides is drawn alone.

Source: Wicaksana et al., FedMix, https://arxiv.org/abs/2205.01840: 1 to 9 pixels of 256.
"""


def parsed(text: str, clients: Sequence[str]) -> tuple[Supervision, ...]:
    """Read ``pixel,box,image,none``: one for each client, in their order.

    Raises:
        RequestError: another word, or another number than clients.

    >>> parsed("pixel,none", ["a", "b"])
    ('pixel', 'none')
    """
    words = [word.strip() for word in text.split(",")]
    known = {str(level): level for level in LEVELS}
    for word in words:
        if word not in known:
            raise RequestError(
                f"--supervision: must be of {', '.join(LEVELS)}, got {word!r}; "
                f"{nearest(word, LEVELS)}"
            )
    if len(words) != len(clients):
        raise RequestError(
            f"--supervision: must name one level for each of {len(clients)} clients "
            f"({', '.join(clients)}), got {len(words)}; a client that knows nothing has none"
        )
    return tuple(known[word] for word in words)


def weakened(client: ClientData, level: Supervision, classes: int, seed: int) -> ClientData:
    """Return a client that knows less: its training images without masks.

    Its validation images are dropped, for who has no masks cannot choose a round by them. The masks
    of the test images stay: they measure what the client has learned.

    Args:
        client: with masks.
        level: what it is to know. ``box``: of each class, a box around all of the image's pixels
            of it, wider than the mask by random margins of :data:`BOX_MARGINS`.
        classes: number of foreground classes.
        seed: of the margins.
    """
    if level == "pixel":
        return client
    return replace(
        client,
        train=replace(client.train, masks=None),
        val=None,
        supervision=level,
        where=_where(client.train, level, classes, generator(seed, f"boxes of {client.name}")),
    )


def _where(
    images: ImageSet, level: Supervision, classes: int, rng: torch.Generator
) -> Tensor | None:
    """Return what is known of where each class is, from masks."""
    if level == "none":
        return None
    assert images.masks is not None
    masks = images.masks.take(torch.arange(len(images)))
    if level == "image":
        return classes_present(masks, classes)[:, :, None, None]
    least, greatest = (round(margin * masks.shape[-1]) for margin in BOX_MARGINS)
    return box_masks(masks, rng, (least, max(1, greatest)), classes=classes).bool()


def check_client(method: Method, client: ClientData) -> None:
    """Raise RequestError where a method cannot use what a client knows."""
    if client.supervision not in method.supervision:
        raise RequestError(
            f"{method.name}: every client must have supervision {' or '.join(method.supervision)}, "
            f"got {client.supervision} at {client.name!r}; use a method for mixed labels, such as "
            "fedmix_seg, or fedavg_labelled"
        )


def check_federation(method: Method, clients: Sequence[ClientData]) -> None:
    """Raise RequestError where a method cannot use what clients know, or none has masks."""
    for client in clients:
        check_client(method, client)
    if all(client.supervision != "pixel" for client in clients):
        known = ", ".join(client.supervision for client in clients)
        raise RequestError(
            f"{method.name}: some client must have supervision pixel, got {known}; without any "
            "mask nothing says what is to be found"
        )
