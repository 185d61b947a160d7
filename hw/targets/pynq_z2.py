"""PYNQ-Z2: a Zynq-7020 with a FINN accelerator at 100 MHz.

53,200 LUTs, 140 memory blocks of 36 kilobits (280 of 18), 220 DSP48E1 slices.

Source: AMD, "Zynq-7000 SoC Data Sheet: Overview", DS190, table 1 (XC7Z020). The clock is that of
FINN's examples for this board.
"""

from hw.models.fpga_dataflow import DataflowFpga

TARGET = DataflowFpga(
    capacity={"lut": 53_200, "bram_18k": 280, "dsp": 220, "uram": 0},
    clock_hz=100e6,
    dsp_slice="DSP48E1",
)
