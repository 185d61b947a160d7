"""Bit Fusion: 16 x 32 fusion units at 500 MHz, compute cycles only.

Source: Sharma et al., "Bit Fusion", ISCA 2018, Table III, https://arxiv.org/abs/1712.01507.
"""

from hw.models.systolic import FusibleArray

TARGET = FusibleArray(rows=16, columns=32, clock_hz=500e6)
