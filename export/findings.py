"""What a format, or what reads its files, cannot take: said by layer, with what would mend it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from sdq.errors import RequestError


@dataclass(frozen=True)
class Finding:
    """One thing that stands against an export.

    Args:
        layer: path in the user's network, or the name of an operation in its graph.
        rule: what must be, beginning with "must".
        got: what is there.
        repair: the option or the change of code that would mend it.
    """

    layer: str
    rule: str
    got: str
    repair: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.rule}, got {self.got}; {self.repair}"

    def to_json(self) -> dict[str, str]:
        """Return a document that ``json.dumps`` takes."""
        return asdict(self)


def refuse(name: str, findings: Sequence[Finding]) -> None:
    """Raise RequestError with all findings, if there are any.

    Args:
        name: of the format.
        findings: see :meth:`export.Format.check`.
    """
    if findings:
        things = "one thing" if len(findings) == 1 else f"{len(findings)} things"
        lines = "".join(f"\n  {finding}" for finding in findings)
        raise RequestError(f"export: {name} cannot take this network; {things} must change:{lines}")
