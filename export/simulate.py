"""Single layers of what a format's compiler generated, simulated as hardware.

The last stage that open tools can carry: :func:`export.verify` compares a file, and what its
compiler makes of it, with PyTorch; this compares generated hardware with both.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from export.format import load_format
from export.reference import Reference
from export.verify import preparation
from sdq import plugins
from sdq.errors import RequestError
from sdq.quant_model import QuantModel


@dataclass(frozen=True)
class SimulatedLayer:
    """A layer in simulation, against the compiler's Python and against PyTorch.

    Args:
        layer: its name in the build.
        kind: the compiler's name for what it is.
        quantizer: the activation quantizer it computes; None if it computes none.
        images: how many were passed through.
        values: how many came out.
        different: how many of them are not those of the compiler's Python.
        from_pytorch: how many codes are not those of PyTorch in float64; None without a quantizer.
        cycles: clock cycles an image.
        estimated_cycles: the compiler's estimate of the same.
    """

    layer: str
    kind: str
    quantizer: str | None
    images: int
    values: int
    different: int
    from_pytorch: int | None
    cycles: float
    estimated_cycles: int

    @property
    def line(self) -> str:
        """One line for people."""
        text = f"{self.layer} in Verilator: {self.different} of {self.values:,} values differ"
        if self.from_pytorch is not None:
            text += f", {self.from_pytorch:,} from PyTorch's codes of {self.quantizer}"
        return f"{text}; {self.cycles:,.0f} cycles an image, {self.estimated_cycles:,} estimated"

    def to_json(self) -> dict[str, Any]:
        """Return a document that ``json.dumps`` takes."""
        return asdict(self)


def simulate_layers(
    qmodel: QuantModel,
    folder: str | Path,
    *,
    inputs: Tensor,
    layer: str = "first",
    format: str = "finn",
) -> tuple[SimulatedLayer, ...]:
    """Simulate layers of a build with Verilator, and compare their values.

    A layer gets the values that reach it in the compiler's Python, once at full speed and once with
    pauses at random on both sides, and what it gives is compared with what Python gives there and,
    if it computes an activation quantizer, with PyTorch's codes in float64.

    Args:
        qmodel: the network that was written; left as it is.
        folder: as given to :func:`export.write`, with the build that ``--build`` makes.
        inputs: as :func:`export.verify` takes them. Some ten will do: every clock cycle is
            simulated.
        layer: a name in the build (``Thresholding_rtl_1``); the activation quantizer that it
            computes; ``first``, the first thresholds of integers; or ``all`` that can be simulated.
        format: a plugin name whose compiler writes Verilog.

    Raises:
        ToolMissing: Verilator, a compiler, or the format's own is not installed.
        RequestError: a format without such sources, no build or an older one, no such layer.
        RunError: Verilator cannot compile a layer, or it stalls.
    """
    name, plugin = load_format(format)
    if not hasattr(plugin, "simulate"):
        known = [
            other
            for other in plugins.names("export.formats")
            if hasattr(plugins.load("export.formats", other), "simulate")
        ]
        raise RequestError(
            f"simulate: format must be one of {', '.join(known)}, got {name!r}; "
            "others have no generated hardware"
        )
    path = Path(folder) / plugin.FILE
    images, feed = preparation(path, plugin.metadata(path), inputs)(inputs)
    simulated = plugin.simulate(Path(folder), layer, feed)
    codes = Reference(qmodel).float64(images).codes
    return tuple(
        report
        if hardware is None or report.quantizer is None
        else replace(report, from_pytorch=int((hardware != codes[report.quantizer]).sum()))
        for report, hardware in simulated
    )
