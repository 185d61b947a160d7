"""Stripes: 16 tiles of 16 filters, 16 windows, 16 lanes; activations bit by bit, at 980 MHz.

Source: Judd et al., "Stripes: Bit-Serial Deep Neural Network Computing", MICRO 2016, sections IV
and V.
"""

from hw.models.bit_serial import BitSerialArray

TARGET = BitSerialArray(filters=256, windows=16, lanes=16, clock_hz=980e6, serial_weights=False)
