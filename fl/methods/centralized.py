"""Centralized training: all images in one place, as hospitals cannot have it. A bound.

Rounds are cuts through one training: with ``keep_optimizer`` nothing but the evaluation happens
between them. Specialization is the one model's on each hospital's own test images.
"""

from collections.abc import Sequence

from fl.composition import refusals
from fl.method import ClientData, Method
from sdq.data import ImageSet


class Centralized(Method):
    """FedAvg with one client, which has everything."""

    refuses = refusals(aggregation="there is one client", noise="all images are in one place")

    def arrange(self, clients: Sequence[ClientData]) -> Sequence[ClientData]:
        """Return one client with everyone's images, read when asked for."""
        return [
            ClientData(
                "all",
                ImageSet.joined([c.train for c in clients]),
                _joined([c.val for c in clients]),
                _joined([c.test for c in clients]),
                pooled=tuple(clients),
            )
        ]


def _joined(sets: Sequence[ImageSet | None]) -> ImageSet | None:
    known = [s for s in sets if s is not None]
    return ImageSet.joined(known) if known else None
