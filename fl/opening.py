"""What a phase begins with, beside what server and clients agreed on before the first one.

To take part in a phase a client needs its name, the float model that it starts from and is taught
by, and in tuning the policies, and the search's weights if it goes on from those. In one process
they are at hand; over a grid the server tells each node of them before it asks anything else
(:mod:`fl.grid_transport`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fl.method import ClientData
from fl.quant_network import float_name
from fl.quant_rounds import TEACHER
from fl.record import Record, Tensors, digest
from fl.setting import Setting
from fl.tune_rounds import policies_as_json
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy

Phase = Literal["float", "search", "tune"]


@dataclass(frozen=True)
class Opening:
    """The beginning of a phase.

    Args:
        phase: its name.
        network: the float model's state; none: it is the first weights, which all have.
        policy: of tuning: the bits of the server's model.
        own: of tuning: those of clients with bits of their own, by number.
        start: of tuning: a state of the float model that it starts from; none: ``network``.
    """

    phase: Phase
    network: Tensors = field(default_factory=dict)
    policy: BitwidthPolicy | None = None
    own: Mapping[int, BitwidthPolicy] = field(default_factory=dict)
    start: Tensors = field(default_factory=dict)

    @property
    def models(self) -> dict[str, Tensors]:
        """Return the models that a client needs to have, by name."""
        found = {"network": self.network, "start": self.start}
        return {name: state for name, state in found.items() if state}

    def values(self) -> dict[str, Any]:
        """Return it as JSON has it, with a digest in place of each model."""
        return {
            "phase": self.phase,
            "models": {name: digest(state) for name, state in self.models.items()},
            "policy": None if self.policy is None else self.policy.to_json(),
            "own": policies_as_json(self.own),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any], models: Mapping[str, Tensors]) -> "Opening":
        """Return what :meth:`values` told of, with the models.

        Raises:
            RequestError: a policy is damaged.
        """
        policy = values["policy"]
        return cls(
            values["phase"],
            models.get("network", {}),
            None if policy is None else BitwidthPolicy.from_json(policy),
            {int(k): BitwidthPolicy.from_json(text) for k, text in values["own"].items()},
            models.get("start", {}),
        )


def data_of(client: ClientData, phase: Phase) -> ClientData:
    """Return the images that a client uses in a phase.

    Nothing is chosen by what the network is worth while its bits are drawn.
    """
    return replace(client, val=None, test=None, pooled=()) if phase == "search" else client


def carried(kept: Record | None, setting: Setting, searched: Record | None = None) -> Record | None:
    """Return what a client starts a phase from, of what it kept in those before.

    Args:
        kept: in the float phase.
        setting: of the phase.
        searched: kept in the search, if tuning goes on from there.
    """
    known, newer = ({} if record is None else record.model for record in (kept, searched))
    if not known and not newer:
        return None
    names = {n: float_name(n, setting.network) for n in setting.names(down=False)}
    own = {n: newer.get(n, known.get(f, setting.initial[n])) for n, f in names.items()}
    teacher = {n: t for n, t in known.items() if n.startswith("model.")}
    return Record({"model": own, TEACHER: teacher})


def check_masks_known(client: ClientData) -> None:
    """Raise RequestError if a client knows less of its images than learning bits takes."""
    if client.supervision != "pixel":
        raise RequestError(
            f"client {client.name!r}: supervision must be pixel where bits are learned, "
            f"got {client.supervision!r}; train the float model first, and quantize it "
            "with masks (sdq quantize --from)"
        )
