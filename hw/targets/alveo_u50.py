"""Alveo U50: an UltraScale+ XCU50 with a FINN accelerator at 200 MHz.

872,000 LUTs, 1,344 memory blocks of 36 kilobits (2,688 of 18), 640 UltraRAM blocks, 5,952 DSP48E2
slices: the whole card, of which its shell takes a part. The clock is a choice, within what FINN's
examples reach on such cards.

Source: AMD, "Alveo U50 Data Center Accelerator Card Data Sheet", DS965, table 1.
"""

from hw.models.fpga_dataflow import DataflowFpga

TARGET = DataflowFpga(
    capacity={"lut": 872_000, "bram_18k": 2_688, "dsp": 5_952, "uram": 640},
    clock_hz=200e6,
    dsp_slice="DSP48E2",
)
