"""The finn format: written, streamlined, converted to hardware layers, executed, codes equal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import export
import hw
from export import finn_folder, graph
from export.finn_flow import environment
from export.finn_flow.graph_edits import attribute
from export.finn_runtime import Executor
from export.formats import finn
from sdq.batches import Normalization
from sdq.errors import RequestError, RunError

needs_finn = pytest.mark.skipif(bool(environment.missing()), reason="FINN+ is not installed")


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip


class Separable(nn.Module):
    """Depthwise-separable convolutions, a linear bottleneck that is added, ReLU6, a global mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6))
        self.body = nn.Sequential(
            nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6),
        )  # fmt: skip
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.pool(x + self.body(x)).flatten(1))


def to_one_pixel() -> nn.Module:
    """Padded 3x3 convolutions on a single pixel, dense, depthwise and strided."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 4), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1), nn.Flatten(),
    )  # fmt: skip


def to_one_row() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, (8, 1)), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 2, dilation=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


class PooledResidual(nn.Module):
    """A max pooling that a convolution and an addition read, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.project = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False), nn.BatchNorm2d(8))
        self.last = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.first(x)))
        x = torch.relu(x + self.body(x))
        x = torch.relu(self.last(x) + self.project(x))
        return self.head(x.mean((2, 3)))


SHIFTS = {"weight_scale": "per_tensor", "restrict_scale": "power_of_two"}
CASES = {
    "mixed bits": (plain, {}),
    "one bit": (plain, {"bits": 1}),
    "shifts": (plain, SHIFTS),
    "option A shortcut": ("residual", {}),
    "pooling before a shortcut": (PooledResidual, {}),
    "averages": ("plain", {}),
    "separable": (Separable, {"bits": 4}),
    "perceptron": ("perceptron", {}),
    "map of one pixel": (to_one_pixel, {}),
    "map of one row": (to_one_row, {}),
}


def exported(folder, network, sample, net, preprocessing=None, **config):
    config = {"act_bits": 4, "integer_datapath": True} | config
    qmodel = network(net if isinstance(net, str) else net(), **config)
    return qmodel, export.write(
        qmodel, folder, format="finn", sample=sample, preprocessing=preprocessing
    )


@needs_finn
@pytest.mark.parametrize("case", CASES)
def test_codes_are_pytorchs_after_streamlining_and_in_hardware(
    tmp_path, network, sample, images, case, capfd
):
    net, config = CASES[case]
    before = dict(os.environ), Path.cwd(), list(sys.path)
    qmodel, _ = exported(tmp_path, network, sample, net, **config)
    report = export.verify(qmodel, tmp_path, format="finn", inputs=images, batch_size=8)
    assert report.verified, report.lines
    assert [stage.name for stage in report.runtimes] == list(finn.RUNTIMES)
    for name in finn.RUNTIMES:
        trace = finn.open_runtime(tmp_path / finn.FILE, name, taps=True)(images[:3])
        assert set(trace.codes) == set(qmodel.act_quantizers())
    assert (dict(os.environ), Path.cwd(), list(sys.path)) == before
    assert capfd.readouterr().out == ""


@needs_finn
def test_pixels_go_in_where_the_file_has_the_preprocessing(tmp_path, network, sample):
    normalization = Normalization((0.5, 0.4, 0.6), (0.2, 0.25, 0.22))
    qmodel, _ = exported(tmp_path, network, sample, plain, normalization)
    pixels = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8)
    report = export.verify(qmodel, tmp_path, format="finn", inputs=pixels)
    assert report.verified, report.lines
    path = tmp_path / finn.FILE
    model = finn._front_end(path, graph.load(path), finn.CONVERTED)
    assert model.graph.node[0].op_type == "Thresholding"  # nothing is left for the host
    assert str(model.get_tensor_datatype(model.graph.input[0].name)) == "UINT8"


@needs_finn
@pytest.mark.parametrize("net", ["residual", Separable, to_one_pixel])
def test_several_images_at_a_time_are_one_by_one(tmp_path, network, sample, images, net):
    _, result = exported(tmp_path, network, sample, net)
    run = finn._Compiled(result.path, graph.load(result.path), finn.CONVERTED, taps=True)
    together, alone = run(images[:5]), [run(image[None]) for image in images[:5]]
    assert run.executor.batches  # no layer was given what it does not take
    for name, codes in together.codes.items():
        assert torch.equal(codes, torch.cat([trace.codes[name] for trace in alone])), name
    torch.testing.assert_close(together.output, torch.cat([trace.output for trace in alone]))


@needs_finn
def test_one_bit_stays_one_bit(tmp_path, network, sample, images):
    exported(tmp_path, network, sample, plain, bits=1)
    path = tmp_path / finn.FILE
    model = finn._front_end(path, graph.load(path), finn.CONVERTED)

    def types(model):
        units = [node for node in model.graph.node if node.op_type in ("MVAU", "VVAU")]
        return [attribute(node, "weightDataType", b"").decode() for node in units]

    with environment.finn_environment() as folder:
        from finn.builder import build_dataflow_steps
        from finn.builder.build_dataflow_config import DataflowBuildConfig

        from export.finn_flow import steps

        settings = DataflowBuildConfig(output_dir=str(folder), generate_outputs=[])
        widened = build_dataflow_steps.step_minimize_bit_width_initial(model, settings)
        before = types(widened)
        found = steps.step_sdq_bipolar_weights(widened, settings)
        outputs = [
            Executor(x.model, [x.graph.output[0].name])(images[:3].numpy()) for x in (model, found)
        ]
    assert before == ["INT8", "INT2", "INT8"]
    assert types(found) == ["INT8", "BIPOLAR", "INT8"]
    np.testing.assert_array_equal(*(next(iter(values.values())) for values in outputs))


@needs_finn
def test_what_has_no_hardware_is_named_by_layer(tmp_path, network, sample, images, monkeypatch):
    monkeypatch.setattr(finn, "check", lambda qmodel, sample: ())  # which would refuse it at once
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.LeakyReLU(), nn.Conv2d(4, 5, 4),
        nn.Flatten(),
    )  # fmt: skip
    exported(tmp_path, network, sample, lambda: net)
    with pytest.raises(RunError) as caught:
        finn.run(tmp_path / finn.FILE, images[:2])
    assert "no hardware for a part of layer '2'" in str(caught.value)
    assert "LeakyRelu" in str(caught.value)


def test_without_finn_the_file_is_still_compared(tmp_path, network, sample, images, monkeypatch):
    monkeypatch.setattr(environment, "missing", lambda: ["finn", "mip"])
    qmodel, result = exported(tmp_path, network, sample, plain)
    report = export.verify(qmodel, tmp_path, format="finn", inputs=images)
    assert report.exact.different == 0
    assert report.runtimes == ()
    assert all("not installed (finn, mip); run make finn" in text for text in report.warnings)
    assert set(result.others) == {"README.md", "build.py", "finn_flow", "folding.json"}
    with pytest.raises(RunError, match="run make finn"):
        finn_folder.build(tmp_path)


def test_importing_export_imports_no_finn():
    code = "import export, sys; sys.exit(any(n.split('.')[0] == 'finn' for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("metadata", "message"),
    [({"target": "pynq"}, "must be one of pynq_z2"), ({"fps": "0"}, "fps must be a whole number")],
)
def test_a_wrong_target_is_refused(tmp_path, network, sample, metadata, message):
    qmodel = network(plain(), integer_datapath=True)
    with pytest.raises(RequestError, match=message):
        export.write(qmodel, tmp_path / "a", format="finn", sample=sample, metadata=metadata)
    assert not (tmp_path / "a").exists()


@needs_finn
@pytest.mark.slow
def test_the_folder_builds_estimates_and_sources_by_itself(tmp_path, network, sample):
    exported(tmp_path, network, sample, "residual")
    found = finn_folder.build(tmp_path)
    assert found["resources"]["LUT"] > 0
    assert found["performance"]["estimated_throughput_fps"] >= finn_folder.DEFAULT_FPS
    folding = json.loads((tmp_path / "build/report/auto_folding_config.json").read_text())
    assert any(name.startswith("MVAU") for name in folding)
    sources = {path.suffix for path in (tmp_path / "build/work").rglob("*")}
    assert {".cpp", ".v"} <= sources


UNITS = {
    "thresholds": "Thresholding", "padding": "FMPadding", "matrix": "MVAU",
    "window": "ConvolutionInputGenerator",
}  # fmt: skip


@needs_finn
@pytest.mark.slow
def test_finn_folds_as_our_model_does(tmp_path, network, sample):
    fps = 150_000
    qmodel = network(plain(), act_bits=4, integer_datapath=True, bits=1)
    rate = {"target": "pynq_z2", "fps": str(fps)}
    export.write(qmodel, tmp_path, format="finn", sample=sample, metadata=rate)
    finn_folder.build(tmp_path)
    folding = json.loads((tmp_path / "build/report/auto_folding_config.json").read_text())
    bits = [(layer.weight_bits, layer.act_bits) for layer in qmodel.policy]
    choices = [((weights,), (acts,)) for weights, acts in bits]
    device = hw.target("pynq_z2").under(qmodel.layers, hw.Demand(fps), choices)
    ours = [
        unit
        for spec, of in zip(qmodel.layers, bits, strict=True)
        for unit in device.units(spec, *of)
    ]
    for kind, name in UNITS.items():
        theirs = [unit for key, unit in folding.items() if key.startswith(name)]
        for field in ("PE", "SIMD"):
            found = [unit[field] for unit in theirs if field in unit]
            assert found in ([], [getattr(u, field.lower()) for u in ours if u.kind == kind]), kind
        assert len(theirs) == sum(unit.kind == kind for unit in ours)
    assert max(unit.pe * unit.simd for unit in ours) > 1  # folded at all
