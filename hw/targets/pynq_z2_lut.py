"""PYNQ-Z2 with every multiplication in LUTs: FINN's HLS units throughout.

FINN multiplies in DSP slices from 4 bits on, and then counts no LUTs for it; fewer bits, in LUTs,
look dearer than more. Where LUTs are what is searched for, this is the model: FINN builds it with
``preferred_impl_style`` ``hls`` for its matrix-vector units.

Source: see :mod:`hw.targets.pynq_z2`.
"""

from dataclasses import replace

from hw.targets import pynq_z2

TARGET = replace(pynq_z2.TARGET, multiply_in_lut=True)
