"""Energy of an operation in 45 nm CMOS at 0.9 V.

An 8-bit multiplication takes 0.2 pJ and a 32-bit one 3.1 pJ: in proportion to the product of the
widths, as is assumed in between. Sums are added up in 32 bits. A figure for comparisons between
policies: a chip has other costs besides, and newer processes take less.

Source: Horowitz, "Computing's Energy Problem (and what we can do about it)", ISSCC 2014, figure
1.1.9.
"""

MULTIPLY_8_J = 0.2e-12
ADD_32_J = 0.1e-12
DRAM_64_J = 1.3e-9
"""The lower end of the 1.3 to 2.6 nJ stated for 64 bits."""


def mac_joules(weight_bits: int, act_bits: int) -> float:
    """Return the energy of one product and its addition.

    >>> round(mac_joules(8, 8) * 1e12, 9), round(mac_joules(32, 32) * 1e12, 9)
    (0.3, 3.3)
    """
    return MULTIPLY_8_J * weight_bits * act_bits / 64 + ADD_32_J


def weight_fetch_joules(total_bits: int) -> float:
    """Return the energy of reading weights once from DRAM."""
    return DRAM_64_J * total_bits / 64
