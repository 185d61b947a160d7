"""Arm Cortex-M7 as in the STM32H743: 480 MHz, 2 megabytes of flash.

A core multiplies two pairs of 16 bits a cycle (SMLAD); operands of 8 bits and fewer are widened to
16 first, so that they compute no faster. Weights are stored packed, with 2, 4 or 8 bits (CMix-NN),
which saves flash and its reading: 32 bytes in 5 cycles of 240 MHz, at 4 wait states.

Source: STMicroelectronics, "STM32H743xI data sheet", DS12110, and reference manual RM0433, section
4.3.8; Lai et al., "CMSIS-NN", 2018, https://arxiv.org/abs/1801.06601; Capotondi et al.,
"CMix-NN", IEEE TCAS-II 2020.
"""

from hw.models.roofline import Roofline

TARGET = Roofline(
    peaks={16: 2 * 480e6, 32: 480e6},
    bandwidth=32 / 5 * 240e6,
    memory=("flash_bytes", 2 * 1024 * 1024),
    stored_bits=(2, 4, 8, 16, 32),
    act_bits=(2, 4, 8, 16),
)
