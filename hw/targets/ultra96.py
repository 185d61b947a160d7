"""Ultra96: a Zynq UltraScale+ ZU3EG with a FINN accelerator at 200 MHz.

70,560 LUTs, 216 memory blocks of 36 kilobits (432 of 18), 360 DSP48E2 slices, no UltraRAM. The
clock is a choice, within what FINN's examples reach on such chips.

Source: AMD, "Zynq UltraScale+ MPSoC Data Sheet: Overview", DS891, table of EG devices.
"""

from hw.models.fpga_dataflow import DataflowFpga

TARGET = DataflowFpga(
    capacity={"lut": 70_560, "bram_18k": 432, "dsp": 360, "uram": 0},
    clock_hz=200e6,
    dsp_slice="DSP48E2",
)
