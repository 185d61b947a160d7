"""What a phase begins with, beside what server and clients agreed on before the first one.

A client needs three things to take part in a phase: its name, the float model that it starts from
and is taught by, and in tuning the policies. In one process they are at hand; over a grid the
server tells each node of them before it asks anything else (:mod:`fl.grid_transport`).
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
    """

    phase: Phase
    network: Tensors = field(default_factory=dict)
    policy: BitwidthPolicy | None = None
    own: Mapping[int, BitwidthPolicy] = field(default_factory=dict)

    def values(self) -> dict[str, Any]:
        """Return it as JSON has it, with a digest in place of the network."""
        return {
            "phase": self.phase,
            "network": digest(self.network) if self.network else "",
            "policy": None if self.policy is None else self.policy.to_json(),
            "own": policies_as_json(self.own),
        }

    @classmethod
    def of(cls, values: Mapping[str, Any], network: Tensors) -> "Opening":
        """Return what :meth:`values` told of, with the network.

        Raises:
            RequestError: a policy is damaged.
        """
        policy = values["policy"]
        return cls(
            values["phase"],
            network,
            None if policy is None else BitwidthPolicy.from_json(policy),
            {int(k): BitwidthPolicy.from_json(text) for k, text in values["own"].items()},
        )


def data_of(client: ClientData, phase: Phase) -> ClientData:
    """Return the images that a client uses in a phase.

    Nothing is chosen by what the network is worth while its bits are drawn.
    """
    return replace(client, val=None, test=None, pooled=()) if phase == "search" else client


def carried(kept: Record | None, setting: Setting) -> Record | None:
    """Return what a client starts a phase from, of what it kept in the float one.

    Args:
        kept: in the float phase.
        setting: of the phase.
    """
    known = {} if kept is None else kept.model
    if not known:
        return None
    names = {n: float_name(n, setting.network) for n in setting.names(down=False)}
    own = {n: known.get(f, setting.initial[n]) for n, f in names.items()}
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
