"""What was written for other runtimes, and whether it was shown to compute the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdq.report.tables import Cell, Table, number, scaled, text


@dataclass(frozen=True)
class Exported:
    """A file of an export folder.

    Args:
        record: what ``export.json`` says of it.
        verification: what ``verification.json`` says of it; None: it was not verified.
        folder: as it is named to people.
    """

    record: dict[str, Any]
    verification: dict[str, Any] | None
    folder: str

    @property
    def current(self) -> bool:
        """Whether the verification is of this file, and not of an earlier one."""
        found = self.verification
        return found is not None and found.get("sha256") == self.record.get("sha256")


def export_table(exports: Sequence[Exported]) -> Table | None:
    """Return a row for each file, and one for each stage that it was compared in."""
    rows: list[list[Cell]] = []
    for each in exports:
        rows.append([
            text(f"{each.folder}/{each.record.get('file')}"),
            scaled(each.record.get("file_bytes"), "B"),
            _verdict(each),
            *(_stages(each.verification) if each.current else [text(None)] * 3),
        ])  # fmt: skip
    if not rows:
        return None
    columns = ["file", "size", "verdict", "codes that differ (float64)", "runtimes", "images"]
    note = (
        "Codes are the integers inside the network. A file is verified if every one equals "
        "PyTorch's when both compute in float64, and if in its own runtime nothing differs but by "
        "ties of rounding and what follows from them."
    )
    return Table("Exported files, compared with PyTorch", columns, rows, note)


def _verdict(each: Exported) -> Cell:
    if each.verification is None:
        return Cell("not compared; run sdq export with --verify", None, "unsure")
    if not each.current:
        return Cell("changed since it was compared; export again", None, "unsure")
    good = bool(each.verification.get("verified"))
    reason = "" if good else f": {each.verification.get('reason')}"
    return Cell("verified" if good else f"NOT verified{reason}", None, "good" if good else "bad")


def _stages(found: dict[str, Any] | None) -> list[Cell]:
    assert found is not None
    exact = found.get("exact")
    codes = text(None)
    if exact is not None:
        codes = Cell(f"{exact['different']:,} of {exact['codes']:,}", exact["different"])
    runtimes = "; ".join(
        f"{stage['name']}: {100 * stage['agreement']:.2f} % equal answers"
        for stage in found.get("runtimes", ())
    )
    return [codes, text(runtimes), number(found.get("images"))]
