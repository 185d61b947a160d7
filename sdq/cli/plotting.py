"""The plots at the end of a run, without which it is no less finished."""

import sys

from sdq import plots
from sdq.errors import RequestError, RunError
from sdq.run_folder import RunFolder


def draw_plots(run: RunFolder, *, wanted: bool) -> None:
    """Draw a finished run's plots; say on standard error if that is not possible.

    Args:
        run: that has written all it has to say.
        wanted: whether to draw at all; of several processes only the first one should.
    """
    if not wanted:
        return
    try:
        plots.draw(run.path)
    # a full disk; a matplotlib that cannot be loaded, or drawn with; a log of another network
    except (OSError, ImportError, ValueError, RuntimeError, RequestError, RunError) as error:
        print(f"warning: {run.path}: the run is done, but without plots: {error}", file=sys.stderr)
