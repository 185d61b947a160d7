"""Runs FINN+'s builder on the network of an export folder."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import environment

MODEL = "model_finn.onnx"
FOLDING = "folding.json"
RESULTS = "build"
WORK = "work"

ESTIMATES = (
    "step_minimize_bit_width_initial",
    "step_sdq_bipolar_weights",
    "step_create_dataflow_partition",
    "step_specialize_layers",
    "step_target_fps_parallelization",
    "step_apply_folding_config",
    "step_minimize_bit_width",
    "step_sdq_bipolar_weights",
    "step_transpose_decomposition",
    "step_generate_estimate_reports",
)
"""From hardware layers to estimates of cycles and resources: needs no vendor tool. FINN+'s own
steps, and one of :mod:`steps`."""

SOURCES = ("step_hw_codegen",)
"""Writes HDL and HLS sources of every layer: needs no vendor tool either."""

BITSTREAM = (
    "step_assign_ddr_weight_offsets",
    "step_generate_hardware",
    "step_create_stitched_ip",
    "step_measure_rtlsim_performance",
    "step_out_of_context_synthesis",
    "step_prepare_synthesis",
    "step_synthesize_bitfile",
    "step_make_driver",
    "step_deployment_package",
)
"""From the sources, which it writes too, to a bitstream and its driver: Vivado and Vitis HLS."""


def main(folder: Path, settings: Mapping[str, Any]) -> int:
    """Build with the settings, changed by the command line; return the exit code.

    Args:
        folder: the export folder; results go to ``build`` in it.
        settings: ``board`` or ``part``, ``clock_ns`` and ``target_fps``.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--board", default=settings["board"], help="FINN's name of a board")
    parser.add_argument(
        "--part", default=settings["part"], help="AMD's name of a part, if no board"
    )
    parser.add_argument("--clock-ns", type=float, default=settings["clock_ns"])
    parser.add_argument("--fps", type=int, default=settings["target_fps"], help="frames a second")
    parser.add_argument(
        "--estimates-only", action="store_true", help="stop before sources are written"
    )
    arguments = parser.parse_args()
    missing = environment.missing()
    if missing:
        print(f"FINN+ needs {', '.join(missing)}: {environment.INSTALL}", file=sys.stderr)
        return 2
    results = folder / RESULTS
    work = results / WORK
    work.mkdir(parents=True, exist_ok=True)
    environment.set_up(work)
    return _build(folder, results, arguments)


def _build(folder: Path, results: Path, arguments: argparse.Namespace) -> int:
    from finn.builder.build_dataflow import build_dataflow_cfg
    from finn.builder.build_dataflow_config import (
        DataflowBuildConfig,
        DataflowOutputType,
        ShellFlowType,
    )
    from finn.util.basic import alveo_part_map

    from . import lookup, steps

    vendor = environment.has_vendor_tools() and not arguments.estimates_only
    tail: tuple[str, ...] = () if arguments.estimates_only else BITSTREAM if vendor else SOURCES
    shell = ShellFlowType.VIVADO_ZYNQ
    if arguments.board in alveo_part_map:
        shell = ShellFlowType.VITIS_ALVEO
    outputs = list(DataflowOutputType) if vendor else [DataflowOutputType.ESTIMATE_REPORTS]
    folding = folder / FOLDING
    config = DataflowBuildConfig(
        output_dir=str(results),
        steps=[*steps.FRONT_END, *(getattr(steps, name, name) for name in ESTIMATES), *tail],
        generate_outputs=outputs,
        board=arguments.board,
        shell_flow_type=shell if arguments.board else None,
        fpga_part=None if arguments.board else arguments.part,
        synth_clk_period_ns=arguments.clock_ns,
        target_fps=arguments.fps,
        folding_config_file=folding if json.loads(folding.read_text()) else None,
        standalone_thresholds=True,
    )
    with lookup.indexed():
        code = int(build_dataflow_cfg(str(folder / MODEL), config))
    if not vendor and not arguments.estimates_only:
        print("vivado and vitis_hls are not installed: estimates and sources, no bitstream")
    return code
