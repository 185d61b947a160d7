"""Loom, one bit a cycle: 128 filters, 16 windows, 16 lanes; both operands bit by bit, at 1 GHz.

As many products of 16 by 16 bits a cycle as 128 multipliers.

Source: Sharify et al., "Loom", DAC 2018, https://arxiv.org/abs/1706.07853, section 3.
"""

from hw.models.bit_serial import BitSerialArray

TARGET = BitSerialArray(filters=128, windows=16, lanes=16, clock_hz=1e9, serial_weights=True)
