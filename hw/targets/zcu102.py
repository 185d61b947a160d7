"""ZCU102: a Zynq UltraScale+ ZU9EG with a FINN accelerator at 200 MHz.

274,080 LUTs, 912 memory blocks of 36 kilobits (1,824 of 18), 2,520 DSP48E2 slices, no UltraRAM.
The clock is a choice, within what FINN's examples reach on such chips.

Source: AMD, "Zynq UltraScale+ MPSoC Data Sheet: Overview", DS891, table of EG devices.
"""

from hw.models.fpga_dataflow import DataflowFpga

TARGET = DataflowFpga(
    capacity={"lut": 274_080, "bram_18k": 1_824, "dsp": 2_520, "uram": 0},
    clock_hz=200e6,
    dsp_slice="DSP48E2",
)
