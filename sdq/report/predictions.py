"""What the networks of a run say of each test image, kept with the run in one file.

A report is then made without the data, and without running a network again.
"""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdq.checkpoint import load_tensors
from sdq.errors import RequestError
from sdq.run_folder import RunFolder

FILE = "predictions.safetensors"
MOST_BYTES = 64_000_000
"""Of a file: with ten classes a million images, with a thousand classes eight thousand."""


@dataclass(frozen=True, eq=False)
class Predictions:
    """Logits on the images that a run is measured on, in their order.

    Args:
        labels: int64 ``(N,)``.
        before: logits of the float network, ``(N, classes)``.
        after: of the quantized one, or None where there is none.
    """

    labels: Tensor
    before: Tensor
    after: Tensor | None = None

    @property
    def num_classes(self) -> int:
        """How many classes the networks tell apart."""
        return self.before.shape[1]

    def save(self, run: RunFolder) -> None:
        """Write them into a run's folder; not if they are large, or not one class an image."""
        tensors = {"labels": self.labels, "float": self.before, "quantized": self.after}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        one_class = self.labels.dim() == 1 and self.before.dim() == 2
        if one_class and sum(t.nbytes for t in kept.values()) <= MOST_BYTES:
            run.write_tensors(FILE, kept)

    @classmethod
    def load(cls, run: Path) -> "Predictions | None":
        """Read them from a run's folder; None where a run has none.

        Raises:
            RequestError: the file is damaged, or its tensors do not fit together.
        """
        if not (run / FILE).is_file():
            return None
        tensors, _ = load_tensors(run / FILE)
        labels, before = tensors.get("labels"), tensors.get("float")
        if labels is None or before is None or not _fit(labels, before, tensors.get("quantized")):
            raise RequestError(
                f"{run / FILE}: must hold a label and logits for each image; remove the file, and "
                "they are computed anew"
            )
        return cls(labels, before, tensors.get("quantized"))


def _fit(labels: Tensor, before: Tensor, after: Tensor | None) -> bool:
    if labels.dim() != 1 or labels.is_floating_point() or before.dim() != 2 or not len(labels):
        return False
    if after is not None and after.shape != before.shape:
        return False
    inside = int(labels.min()) >= 0 and int(labels.max()) < before.shape[1]
    return len(before) == len(labels) and inside
