"""PRR, personalized retrogress-resilient federation: CPA around DET around PFA.

The released code's ways are
``cpa={"exchange": "epoch", "reset": True, "min_std": 1.0}`` and ``det={"augmented": True}``. The
papers define no model of the server's; ours is the mean of the deputies.

Source: Chen et al., "Personalized Retrogress-Resilient Framework for Real-World Medical Federated
Learning", MICCAI 2021, https://arxiv.org/abs/2110.00394; and "Personalized Retrogress-Resilient
Federated Learning Toward Imbalanced Medical Data", IEEE TMI 41(12), 2022.
"""

from typing import Any

from fl.config import FederationConfig
from fl.wrapper import Wrapper
from sdq.config import Config

PAPER = FederationConfig(
    rounds=50, local_epochs=5, batch_size=16, optimizer="sgd", lr=1e-2, weight_decay=1e-6,
    lr_decay=0.5, lr_decay_every=5,
)  # fmt: skip
"""The paper's federation, for classification."""

PAPER_MASKS = PAPER.replaced(rounds=20, batch_size=8, lr=1e-3)
"""And for segmentation."""


class PRRConfig(Config):
    """Hyper-parameters of the three parts, as their files name them; the defaults are the paper's.

    Args:
        pfa: of the aggregation.
        det: of the transfer; None leaves it out.
        cpa: of the loss; None leaves it out.
    """

    pfa: dict[str, Any] = {}  # noqa: RUF012 - pydantic copies defaults
    det: dict[str, Any] | None = {}  # noqa: RUF012
    cpa: dict[str, Any] | None = {}  # noqa: RUF012

    @property
    def around(self) -> str:
        """Return the outermost part."""
        return "cpa" if self.cpa is not None else "det" if self.det is not None else "pfa"

    @property
    def inner(self) -> dict[str, Any]:
        """Return its hyper-parameters, with those of what is inside."""
        found = ("pfa", dict(self.pfa))
        for name, hyper in (("det", self.det), ("cpa", self.cpa)):
            if hyper is not None:
                found = (name, {"around": found[0], "inner": found[1], **hyper})
        return found[1]


class PRR(Wrapper):
    """The three together."""

    config_type = PRRConfig
