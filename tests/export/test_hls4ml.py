"""The format hls4ml: the folder it writes, and the C simulation."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

import export
from export.format import ToolMissing
from export.formats import hls4ml
from export.hls4ml_flow import project, simulation
from sdq.batches import Normalization
from sdq.errors import RequestError, RunError
from sdq.quant_model import QuantModel

SHIFTS = {
    "weight_scale": "per_tensor", "restrict_scale": "power_of_two", "integer_datapath": True,
}  # fmt: skip
SCALES = {"weight_scale": "per_channel", "restrict_scale": "float", "integer_datapath": True}

needs_hls4ml = pytest.mark.skipif(not project.installed(), reason="hls4ml is not installed")
needs_compiler = pytest.mark.skipif(
    not project.installed() or shutil.which("g++") is None, reason="no hls4ml, or no g++"
)


@needs_hls4ml
def test_the_folder(tmp_path, network, sample):
    qmodel = network("perceptron", **SHIFTS)
    result = export.write(qmodel, tmp_path, format="hls4ml", sample=sample)
    assert result.path.name == "model_hls4ml.onnx"
    assert result.others == ("hls4ml",)
    assert result.weight_bits == {x.name: x.weight_bits for x in qmodel.policy}
    found = {path.name for path in (tmp_path / "hls4ml").iterdir()}
    assert found == {"network.onnx", "config.json", "simulation.json", "project", "README.md"}
    configuration = json.loads((tmp_path / "hls4ml" / "config.json").read_text())
    assert configuration["IOType"] == "io_parallel"
    assert configuration["Part"] == "xc7z020clg400-1"
    layer = configuration["HLSConfig"]["LayerName"]["layer_1"]
    assert layer["Precision"]["weight"].startswith("ap_fixed<8,")
    for path in (tmp_path / "hls4ml").rglob("*"):  # no path of this machine
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), path
    readme = (tmp_path / "hls4ml" / "README.md").read_text()
    assert "Every integer code is the network's." in readme
    assert "hls4ml convert -c config.json" in readme
    script = tmp_path / "hls4ml" / "project" / "build_prj.tcl"
    assert script.is_file()
    assert f"vitis-run --mode hls --tcl {script.name}" in readme
    assert "- io_type: io_parallel\n" in readme


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reuse_factor": 0}, "reuse_factor must be a whole number of at least 1, got 0"),
        ({"reuse_factor": 2.5}, "reuse_factor must be a whole number"),
        ({"parallel_products": 0}, "parallel_products must be a whole number"),
        ({"clock_ns": -1}, "clock_ns must be a positive number of nanoseconds, got -1"),
        ({"io_type": "io_foo"}, "io_type must be io_parallel, io_stream or None, got 'io_foo'"),
        ({"part": ""}, "part must be a name, got ''"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(RequestError, match=words):
        hls4ml.Options(**options)


@needs_hls4ml
def test_options(tmp_path, network, sample):
    options = hls4ml.Options(
        part="xczu3eg-sbva484-1-e", clock_ns=4.0, io_type="io_stream", reuse_factor=4
    )
    qmodel = network("perceptron", **SHIFTS)
    chosen = hls4ml.configured(options)
    result = export.write(qmodel, tmp_path, format=chosen, sample=sample)
    assert result.format == "hls4ml"
    configuration = json.loads((tmp_path / "hls4ml" / "config.json").read_text())
    assert configuration["Part"] == options.part
    assert configuration["ClockPeriod"] == 4.0
    assert configuration["IOType"] == "io_stream"
    layers = configuration["HLSConfig"]["LayerName"]
    assert layers["layer_1"]["ReuseFactor"] == 4
    assert layers["layer_1"]["Strategy"] == "Resource"


def test_overlapping_windows_want_whole_tensors(network, sample):
    qmodel = network("overlapping", **SHIFTS)
    (finding,) = hls4ml.check(qmodel, sample)
    assert "io_parallel" in finding.repair
    chosen = hls4ml.configured(hls4ml.Options(io_type="io_parallel"))
    assert chosen.check(qmodel, sample) == ()


def test_without_hls4ml_all_but_the_project_is_written(
    tmp_path, network, sample, images, monkeypatch
):
    monkeypatch.setattr(project, "installed", lambda: False)
    qmodel = network("perceptron", **SHIFTS)
    with pytest.warns(UserWarning, match=r"hls4ml is not installed: .*pip install 'sdq\[hls4ml\]'"):
        result = export.write(qmodel, tmp_path, format="hls4ml", sample=sample)
    found = {path.name for path in (tmp_path / "hls4ml").iterdir()}
    assert found == {"network.onnx", "config.json", "README.md"}
    with pytest.raises(ToolMissing, match="there is no project"):
        hls4ml.open_runtime(result.path, hls4ml.SIMULATION, taps=False)
    report = export.verify(qmodel, tmp_path, format="hls4ml", inputs=images)
    assert report.verified
    assert report.runtimes == ()
    assert report.warnings[0].startswith("hls4ml C simulation: not run: hls4ml was not installed")


def project_of(folder: Path, script: str = "exit 0") -> Path:
    """Make a folder that looks like an export, with a build script of one's own."""
    (folder / "hls4ml" / "project" / "firmware").mkdir(parents=True)
    (folder / "hls4ml" / "project" / "build_lib.sh").write_text(script)
    spec = {
        "function": "network_double", "input": {"shape": [1, 1, 1], "unit": 1.0},
        "output": {"shape": [1], "flat": True, "unit": 1.0}, "traced": {}, "taps": {},
    }  # fmt: skip
    (folder / "hls4ml" / "simulation.json").write_text(json.dumps(spec))
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], []))
    onnx.helper.set_model_props(model, {"schema": "sdq.export/1"})
    onnx.save(model, folder / hls4ml.FILE)
    return folder / hls4ml.FILE


def test_without_a_compiler(tmp_path, monkeypatch):
    path = project_of(tmp_path)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(ToolMissing, match=r"g\+\+ compiles the C simulation and is not installed"):
        hls4ml.open_runtime(path, hls4ml.SIMULATION, taps=False)


def test_a_project_that_does_not_compile(tmp_path):
    path = project_of(tmp_path, "echo 'net.cpp:3: error: no such thing' >&2; exit 1")
    with pytest.raises(RunError, match=r"does not compile: net\.cpp:3: error: no such thing"):
        hls4ml.open_runtime(path, hls4ml.SIMULATION, taps=False)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("__builtin_trap();", "was ended by SIG(ILL|TRAP)"),
        ("abort();", "was ended by SIGABRT"),
        ("exit(3);", "the C simulation failed"),
        ("y[0] = 2 * x[0];", None),
    ],
)
def test_a_crash_is_no_crash_of_ours(tmp_path, body, said):
    source = (
        f'#include <cstdlib>\nextern "C" void network_double(double *x, double *y) {{ {body} }}'
    )
    (tmp_path / "net.cpp").write_text(source)
    script = f"g++ -shared -fPIC '{tmp_path / 'net.cpp'}' -o firmware/net.so"
    run = hls4ml.open_runtime(project_of(tmp_path, script), hls4ml.SIMULATION, taps=False)
    images = torch.tensor([1.5, -2.0]).reshape(2, 1, 1, 1)
    if said is None:
        assert run(images).output.tolist() == [[3.0], [-4.0]]
    else:
        with pytest.raises(RunError, match=said):
            run(images)


# the C simulation


def verified(qmodel: QuantModel, folder: Path, images: torch.Tensor, **write) -> None:
    sample = torch.zeros(1, 3, 8, 8)
    chosen = write.pop("format", "hls4ml")
    export.write(qmodel, folder, format=chosen, sample=sample, **write)
    report = export.verify(qmodel, folder, format=chosen, inputs=images)
    assert report.verified, report.lines
    (stage,) = report.runtimes
    assert stage.name == hls4ml.SIMULATION
    assert stage.agreement == 1.0
    assert stage.flipped == 0
    # PyTorch adds the last bias, which is no multiple of a step, in float32
    assert stage.relative_difference < 1e-6


@needs_compiler
def test_c_simulation_of_a_perceptron_on_pixels(tmp_path, network):
    qmodel = network("perceptron", **SHIFTS, batch_norm="fold", act_bits=6)
    pixels = torch.randint(256, (200, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    normalization = Normalization((0.5,) * 3, (0.25,) * 3)
    verified(qmodel, tmp_path, pixels.to(torch.uint8), preprocessing=normalization)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "config", "options"),
    [
        ("everything", SHIFTS, {}),
        ("everything", SHIFTS | {"batch_norm": "fold", "act_bits": 8}, {}),
        ("everything", SCALES, {"parallel_products": 6}),
        ("normalized first", SHIFTS, {}),
        ("convolutions", SHIFTS | {"weight_quantizer": "entropy"}, {}),
        ("overlapping", SHIFTS, {"io_type": "io_parallel"}),
    ],
)
def test_c_simulation(tmp_path, network, net, config, options):
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    chosen = hls4ml.configured(hls4ml.Options(**options))
    verified(network(net, **config), tmp_path, images, format=chosen)


@needs_compiler
@pytest.mark.slow
def test_a_project_of_other_weights_is_not_verified(tmp_path, network, sample, images):
    """The first layer that differs is named, from the simulation's own codes."""
    qmodel = network("perceptron", **SHIFTS)
    export.write(qmodel, tmp_path, format="hls4ml", sample=sample)
    weights = sorted((tmp_path / "hls4ml" / "project" / "firmware" / "weights").glob("w*.txt"))
    largest = max(weights, key=lambda path: path.stat().st_size)
    values = largest.read_text().split(",")
    largest.write_text(", ".join(str(-float(value)) for value in values))
    report = export.verify(qmodel, tmp_path, format="hls4ml", inputs=images)
    assert not report.verified
    assert report.exact.different == 0
    assert report.runtimes[0].flipped > 0.5


def test_the_simulation_needs_numpy_alone():
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "print({'torch', 'onnx'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(simulation.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
