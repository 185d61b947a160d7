"""The plots of a run folder, in its ``plots/``: made from what the run has written.

==================  ===========================================================================
``trajectory.png``  expected bits, budget use and price over the search; only of a search by
                    gradient
``bits.png``        the bits and the number of weights of each layer
``error.png``       the relative quantization error of each layer, before and after fine-tuning
``histograms.png``  the largest searched layers' weights among their levels, before and after
==================  ===========================================================================

"Before" are the float weights; where batch normalisation is folded, the folded ones, from which
fine-tuning starts.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdq import weight_levels
from sdq.checkpoint import write_bytes_atomically
from sdq.config import QuantConfig
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.run_folder import RunFolder, read_layers
from sdq.trajectory import trajectory

if TYPE_CHECKING:  # it takes a second: only who draws waits for it
    from matplotlib.figure import Figure

HISTOGRAMS = 12
"""Layers of which the weights are shown."""

DPI = 150
_LOOK = {
    "font.size": 8.0, "axes.titlesize": 8.0, "axes.labelsize": 8.0, "legend.fontsize": 8.0,
    "xtick.labelsize": 8.0, "ytick.labelsize": 8.0, "figure.titlesize": 10.0,
    "figure.labelsize": 8.0, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "hatch.linewidth": 0.5,
}  # fmt: skip


def draw(run_folder: Path) -> tuple[Path, ...]:
    """Draw the plots of a run of ``sdq quantize`` or ``sdq search``, in place of earlier ones.

    The same run gives the same bytes with the same matplotlib, whatever its user has configured.

    Args:
        run_folder: with a policy.

    Returns:
        The files, PNG, in ``run_folder/plots``.

    Raises:
        RequestError: not such a run folder, or one that is damaged.
        RunError: the log does not fit the policy.
        OSError: the files cannot be written.
    """
    import matplotlib

    run = RunFolder.open(run_folder)
    # what is configured for matplotlib on this machine must not change the plots
    default = matplotlib.rcParamsDefault
    look: dict[Any, Any] = {k: v for k, v in default.items() if not k.startswith("backend")}
    written = []
    with matplotlib.rc_context(look | _LOOK):
        for name, figure in _figures(run):
            content = io.BytesIO()
            # without metadata: matplotlib would write its version
            figure.savefig(content, format="png", dpi=DPI, metadata={"Software": None})
            path = run.path / "plots" / f"{name}.png"
            write_bytes_atomically(path, content.getvalue())
            written.append(path)
    return tuple(written)


def _figures(run: RunFolder) -> Iterator[tuple[str, "Figure"]]:
    """Yield the figures that can be made of a run, by name."""
    from sdq import figures, trajectory_figure, weight_figures

    policy = BitwidthPolicy.load(run.path / "policy.json")
    yield "bits", figures.bits_figure(policy)
    course = trajectory(run.read_log(), policy)
    if course is not None:
        yield "trajectory", trajectory_figure.trajectory_figure(course, len(policy))
    before, after = quantized_weights(run, policy)
    if before:
        errors = [{k: q.relative_error() for k, q in part.items()} for part in (before, after)]
        yield "error", weight_figures.error_figure(*errors)
    searched = [b for b in policy if b.searched and b.name in before]
    largest = sorted(searched, key=lambda b: -b.num_weights)[:HISTOGRAMS]
    if largest:
        found = [
            weight_levels.histogram(b, before[b.name], after.get(b.name))
            for b in policy
            if b in largest
        ]
        yield "histograms", weight_figures.histogram_figure(found)


def quantized_weights(
    run: RunFolder, policy: BitwidthPolicy
) -> tuple[dict[str, weight_levels.Quantized], dict[str, weight_levels.Quantized]]:
    """Return the quantized layers' weights before and after fine-tuning, with their quantizers.

    Args:
        run: of ``sdq quantize``; of ``sdq search``, which does not fine-tune, the second is empty.
        policy: of the run.

    Raises:
        RequestError: the run quantized nothing, or its files do not go together.
    """
    quant = run.read_json("run.json").get("quant")
    if quant is None:
        raise RequestError(
            f"{run.path}: must be a run of `sdq quantize` or `sdq search`, got another; "
            "give the --out of one"
        )
    config = QuantConfig(**quant)
    layers = read_layers(run.path / "layers.json")
    if [x.name for x in layers] != [x.name for x in policy]:
        raise RequestError(
            f"{run.path}: layers.json must be of policy.json's layers, got others; "
            "copy the run anew"
        )
    start = "folded.safetensors" if config.batch_norm == "fold" else "float.safetensors"
    before = weight_levels.before(run.read_tensors(start), policy, config, layers)
    after: dict[str, weight_levels.Quantized] = {}
    if (run.path / "model.safetensors").exists():
        after = weight_levels.after(run.read_tensors("model.safetensors"), policy, config, layers)
    return before, after
