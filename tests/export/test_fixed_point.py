"""Fixed-point types, and constants that keep every code."""

import numpy as np
import pytest

from export.hls4ml_flow.fixed_point import (
    FixedType,
    Sums,
    TooFine,
    borders,
    holding,
    same_codes,
    step_of,
)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 3, 1), "ap_ufixed<2,2>"), ((-4, 3, 1), "ap_fixed<3,3>"), ((-4, 4, 1), "ap_fixed<4,4>"),
        ((-0.5, 0.25, 0.25), "ap_fixed<2,0>"), ((0, 48, 16), "ap_ufixed<2,6>"),
        ((0, 0, 1), "ap_ufixed<1,1>"),
    ],
)  # fmt: skip
def test_the_shortest_type(values, expected):
    assert str(holding(*values)) == expected


def test_a_quantizers_type_rounds_and_saturates():
    kind = FixedType(4, 1, True).quantizer()
    assert str(kind) == "ap_fixed<4,1,AP_RND_CONV,AP_SAT>"
    assert kind.step == 0.125


def test_the_step_of_values():
    assert step_of(np.array([0.0, 0.75, -3.0])) == 0.25
    assert step_of(np.array([12.0])) == 4.0
    assert step_of(np.zeros(3)) == 1.0
    assert step_of(np.array([np.float32(0.1)])) == 2.0**-27


def every_code(factor, offset, sums: Sums, scale: float, low: int, high: int) -> np.ndarray:
    count = round(float(sums.most.max() - sums.least.min()) / sums.step)
    values = sums.least.min() + np.arange(count + 1) * sums.step
    return np.rint((factor[:, None] * values + offset[:, None]) / scale).clip(low, high)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_short_constants_keep_every_code(bits, seed):
    rng = np.random.default_rng(seed)
    factor = rng.uniform(0.2, 2, 12) * rng.choice([1, 1, -1], 12) / 100
    factor[0] = 0
    offset = rng.normal(0, 1, 12)
    sums = Sums(np.full(12, -500.0), np.full(12, 500.0), 0.25)
    low, high, scale = (
        (0, 2**bits - 1, 0.11) if seed % 2 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 0.25)
    )
    short, shift = same_codes(factor, offset, sums, borders(low, high, scale))
    expected = every_code(factor, offset, sums, scale, low, high)
    assert np.array_equal(every_code(short, shift, sums, scale, low, high), expected)
    assert holding(short.min(), short.max(), step_of(short)).width <= 18 + bits
    assert holding(shift.min(), shift.max(), step_of(shift)).width <= 18 + bits


def test_ties_stay_ties():
    """Sums that fall on a border are rounded to even, whatever the offset is made of."""
    factor, offset = np.ones(3), np.array([0.0, 0.5, 1 / 3])
    sums = Sums(np.full(3, -8.0), np.full(3, 8.0), 0.5)
    _, shift = same_codes(factor, offset, sums, borders(-4, 3, 1.0))
    assert shift[:2].tolist() == [0.0, 0.5]
    expected = every_code(factor, offset, sums, 1.0, -4, 3)
    assert np.array_equal(every_code(factor, shift, sums, 1.0, -4, 3), expected)
    assert step_of(shift) >= 0.125


def test_a_channel_far_below_the_others_is_refused():
    factor = np.array([1.0, 2.0**-60])
    sums = Sums(np.full(2, -(2.0**61)), np.full(2, 2.0**61), 1.0)
    with pytest.raises(TooFine, match="no factor of 52 bits keeps all codes"):
        same_codes(factor, np.zeros(2), sums, borders(0, 3, 0.7))
