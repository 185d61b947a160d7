"""Learning-rate schedules: a linear rise, then one of four ways on."""

import math

from sdq.config import Schedule

DROPS_AT = (0.5, 0.75)
"""Shares of the steps after the rise at which ``step`` divides the rate by ten.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
"""


def learning_rate(schedule: Schedule, done: float, warmup: float) -> float:
    """Return the learning rate as a share of its peak.

    Args:
        schedule: ``cosine`` (half a period, to zero), ``linear`` (to zero), ``step`` (divided by
            ten at half and at three quarters) or ``constant``.
        done: share of all steps that are behind, in [0, 1].
        warmup: share of all steps in which the rate rises linearly from zero.

    >>> [learning_rate("linear", done, 0.2) for done in (0.1, 0.2, 0.6)]
    [0.5, 1.0, 0.5]
    """
    if done < warmup:
        return max(done / warmup, 1e-3)
    share = min((done - warmup) / (1 - warmup), 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "linear":
        return 1.0 - share
    if schedule == "step":
        # rounding must not put off a drop by a step
        return float(0.1 ** sum(share >= drop - 1e-9 for drop in DROPS_AT))
    return 1.0
