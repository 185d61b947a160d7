"""Intel Xeon Platinum 8380: 40 cores at 2.3 GHz with AVX-512 VNNI, eight channels of DDR4-3200.

A core issues two 512-bit multiply-adds a cycle: 128 products of 8 bits (VPDPBUSD), 64 of 16
(VPDPWSSD), 32 in float. Runtimes store 8-bit weights as bytes; fewer bits gain nothing, so 8 is the
only bitwidth there is. The clock is the base frequency; under AVX-512 it may be lower.

Source: Intel, product specifications of the Xeon Platinum 8380; "Intel 64 and IA-32 Architectures
Optimization Reference Manual", chapter on Intel DL Boost.
"""

from hw.models.roofline import Roofline

_CORES_HZ = 40 * 2.3e9

TARGET = Roofline(
    peaks={8: 128 * _CORES_HZ, 16: 64 * _CORES_HZ, 32: 32 * _CORES_HZ},
    bandwidth=8 * 25.6e9,
    memory=("memory_bytes", 64e9),
    stored_bits=(8, 16, 32),
    act_bits=(8,),
)
