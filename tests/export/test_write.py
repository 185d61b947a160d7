"""Writing: what is refused, what is left behind, what the folder holds."""

import json
import subprocess
import sys
from types import SimpleNamespace

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import export
from export.format import load_format, read_record
from sdq import plugins
from sdq.batches import Normalization
from sdq.config import QuantConfig
from sdq.errors import RequestError, RunError
from sdq.policy import BitwidthPolicy
from sdq.quant_model import quantize


class NoOnnx(nn.Module):
    """Runs in PyTorch, but no exporter knows lgamma."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.lgamma(self.conv(x).abs() + 1).mean((2, 3)))


def test_importing_the_package_imports_no_onnx():
    code = "import sys, export; print({'onnx', 'onnxruntime', 'qonnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("format", ["onnx", "qonnx"])
def test_a_failed_export_leaves_everything_usable(tmp_path, network, sample, images, format):
    broken = network(NoOnnx())
    broken.train()
    before = {name: tensor.clone() for name, tensor in broken.state_dict().items()}
    expected = broken(images).detach()
    with pytest.raises(RunError, match=r"the exporter failed: .*lgamma"):
        export.write(broken, tmp_path / "out", format=format, sample=sample)
    assert not (tmp_path / "out").exists()
    assert broken.training
    assert torch.equal(broken(images).detach(), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in broken.state_dict().items())
    # and the exporter's own class-level state is clean
    export.write(network("plain"), tmp_path, format=format, sample=sample)


@pytest.mark.parametrize("format", ["onnx", "onnx-packed", "qonnx", "hls4ml"])
def test_what_the_exporter_cannot_write_is_found_quietly(tmp_path, network, sample, capfd, format):
    """Torch prints its whole graph where it fails, past Python's standard output."""
    broken = network(NoOnnx())
    for quantizer in broken.act_quantizers().values():
        quantizer.calibrated.fill_(False)
    (finding,) = export.rehearse(broken, format=format, sample=sample)
    assert finding.layer == "aten::lgamma"
    assert "Exporting the operator 'aten::lgamma' to ONNX opset version 17 is" in finding.got
    assert export.rehearse(network("plain"), format="onnx", sample=sample) == ()
    (out, _), logs = capfd.readouterr(), torch._C._jit_is_onnx_log_enabled()
    assert (out, logs) == ("", False)
    assert not broken.calibrated


def test_stale_exporter_state_does_not_matter(tmp_path, network, sample, monkeypatch):
    from brevitas import config

    monkeypatch.setattr(config, "_ONGOING_EXPORT", "brevitas")
    export.write(network("plain"), tmp_path, format="onnx", sample=sample)
    assert config._ONGOING_EXPORT is None


def test_export_leaves_the_network_as_it_is(tmp_path, network, sample, images):
    qmodel = network("twice", bits=1)
    qmodel.train()
    before = {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}
    names = [name for name, _ in qmodel.named_modules()]
    for format in ("onnx", "qonnx"):
        export.write(qmodel, tmp_path, format=format, sample=sample)
        export.verify(qmodel, tmp_path, format=format, inputs=images)
    assert qmodel.training
    assert [name for name, _ in qmodel.named_modules()] == names
    assert all(torch.equal(tensor, before[name]) for name, tensor in qmodel.state_dict().items())
    qmodel(images).sum().backward()  # still trains


def test_the_folder_holds_the_file_and_the_record(tmp_path, network, sample):
    qmodel = network("plain")
    first = export.write(qmodel, tmp_path / "a" / "b", format="onnx", sample=sample)
    second = export.write(qmodel, tmp_path / "a" / "b", format="qonnx", sample=sample)
    found = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert found == ["export.json", "model.onnx", "model_qonnx.onnx"]
    record = read_record(tmp_path / "a" / "b")
    assert record["onnx"]["sha256"] == first.sha256
    assert record["onnx"]["file_bytes"] == first.path.stat().st_size
    assert record["qonnx"]["file"] == second.path.name
    policy = BitwidthPolicy.from_json(json.dumps(record["onnx"]["policy"]))
    assert policy == qmodel.policy


def test_metadata_is_in_the_file(tmp_path, network, sample):
    qmodel = network("plain")
    result = export.write(
        qmodel, tmp_path, format="onnx", sample=sample,
        metadata={"class_names": ["naevus", "melanoma"], "licence": "MIT"},
    )  # fmt: skip
    metadata = load_format("onnx")[1].metadata(result.path)
    assert metadata["schema"] == "sdq.export/1"
    assert json.loads(metadata["class_names"]) == ["naevus", "melanoma"]
    assert metadata["licence"] == "MIT"
    assert BitwidthPolicy.from_json(metadata["policy"]) == qmodel.policy


def test_reserved_metadata_is_refused(tmp_path, network, sample):
    with pytest.raises(RequestError, match="must not have the key 'policy'"):
        export.write(
            network("plain"), tmp_path, format="onnx", sample=sample, metadata={"policy": "x"}
        )


def test_an_existing_file_is_kept_unless_overwritten(tmp_path, network, sample):
    first = export.write(network("plain"), tmp_path, format="onnx", sample=sample)
    other = network("plain", seed=1)
    with pytest.raises(RequestError, match="must not exist yet; choose another folder, or "):
        export.write(other, tmp_path, format="onnx", sample=sample)
    assert first.path.stat().st_size == first.file_bytes
    second = export.write(other, tmp_path, format="onnx", sample=sample, overwrite=True)
    assert second.sha256 != first.sha256
    assert read_record(tmp_path)["onnx"]["sha256"] == second.sha256


def test_other_files_in_the_folder_do_not_matter(tmp_path, network, sample):
    (tmp_path / "notes.txt").write_text("mine")
    export.write(network("plain"), tmp_path, format="onnx", sample=sample)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_foreign_record_is_refused(tmp_path, network, sample):
    (tmp_path / "export.json").write_text("[1, 2]")
    with pytest.raises(RequestError, match=r"must be of schema 'sdq\.export/1'"):
        export.write(network("plain"), tmp_path, format="onnx", sample=sample)
    assert [path.name for path in tmp_path.iterdir()] == ["export.json"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, network, sample, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    (tmp_path / "there").mkdir()
    for folder in ("there", "new"):
        with pytest.raises(OSError, match="No space left"):
            export.write(network("plain"), tmp_path / folder, format="onnx", sample=sample)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_bits_that_are_not_the_policys_are_not_written(tmp_path, network, sample):
    plugin = load_format("onnx")[1]
    lying = SimpleNamespace(**{**vars(plugin), "bits": lambda path: {"0": 3}})
    with pytest.raises(RunError, match="0: bits in the file must be 8, as in the policy, got 3"):
        export.write(network("plain"), tmp_path / "out", format=lying, sample=sample)
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_the_file_is_written_and_replaced_with_it(tmp_path, network, sample):
    plugin = load_format("qonnx")[1]

    def write(qmodel, folder, **options):
        plugin.write(qmodel, folder, **options)
        (folder / "notes.txt").write_text("how to build")
        (folder / "project").mkdir()
        (folder / "project" / "part.cpp").touch()

    project = SimpleNamespace(**{**vars(plugin), "write": write})
    result = export.write(network("plain"), tmp_path, format=project, sample=sample)
    assert result.others == ("notes.txt", "project")
    (tmp_path / "project" / "old.cpp").touch()
    export.write(network("plain"), tmp_path, format=project, sample=sample, overwrite=True)
    assert [path.name for path in (tmp_path / "project").iterdir()] == ["part.cpp"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"export.json", plugin.FILE, "notes.txt", "project"}


def test_a_module_serves_as_format(tmp_path, network, sample):
    result = export.write(network("plain"), tmp_path, format=load_format("qonnx")[1], sample=sample)
    assert result.format == "qonnx"


def test_unknown_formats_are_refused_with_the_nearest(tmp_path, network, sample):
    with pytest.raises(RequestError, match="did you mean 'qonnx'"):
        export.write(network("plain"), tmp_path, format="qonx", sample=sample)


def test_a_network_without_scales_is_refused(tmp_path, sample):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    qmodel = quantize(net, QuantConfig(), sample=sample)
    with pytest.raises(RequestError, match=r"call sdq\.calibrate_"):
        export.write(qmodel, tmp_path, format="onnx", sample=sample)


def test_a_network_in_search_is_refused(tmp_path, network, sample):
    qmodel = network("plain")
    qmodel.set_weight_quantizer_("4", nn.Identity())
    with pytest.raises(RequestError, match="layer 4: bits must be settled, got a Identity"):
        export.write(qmodel, tmp_path, format="onnx", sample=sample)


def test_a_sample_that_does_not_fit_is_refused(tmp_path, network):
    with pytest.raises(RequestError, match=r"must fit the network, got shape \(1, 1, 8, 8\)"):
        export.write(network("plain"), tmp_path, format="onnx", sample=torch.zeros(1, 1, 8, 8))


@pytest.mark.parametrize("format", ["onnx", "qonnx"])
def test_preprocessing_is_exact(tmp_path, network, sample, format):
    """Every value of every channel, to the last bit, as sdq.batches.Normalization has it."""
    qmodel = network("residual")
    normalization = Normalization((0.7635, 0.5461, 0.5705), (0.1409, 0.1526, 0.1697))
    result = export.write(
        qmodel, tmp_path, format=format, sample=sample, preprocessing=normalization
    )
    graph = onnx.load(result.path).graph
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [
        "N", 8, 8, 3,
    ]  # fmt: skip
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(4, 3, 8, 8)
    import onnxruntime

    head = onnx.load(result.path)
    nodes = [node for node in head.graph.node if node.name.startswith("sdq_preprocessing")]
    del head.graph.node[:], head.graph.output[:]
    head.graph.node.extend(nodes)
    head.graph.output.append(onnx.helper.make_tensor_value_info("images", 1, None))
    session = onnxruntime.InferenceSession(
        head.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (images,) = session.run(None, {"pixels": pixels.permute(0, 2, 3, 1).numpy()})
    assert torch.equal(torch.from_numpy(images), normalization(pixels))
    report = export.verify(qmodel, tmp_path, format=format, inputs=pixels)
    assert report.verified, report.lines


def test_preprocessing_of_other_channels_is_refused(tmp_path, network, sample):
    with pytest.raises(RequestError, match=r"one value a channel \(3\), got 1"):
        export.write(
            network("plain"), tmp_path, format="onnx", sample=sample,
            preprocessing=Normalization((0.5,), (0.5,)),
        )  # fmt: skip


class Divided(nn.Module):
    """Average pooling with a divisor of its own, in a function."""

    def __init__(self, **arguments) -> None:
        super().__init__()
        self.first, self.head, self.arguments = nn.Conv2d(3, 4, 1), nn.Linear(64, 5), arguments

    def forward(self, x):
        return self.head(F.avg_pool2d(F.relu(self.first(x)), 2, **self.arguments).flatten(1))


@pytest.mark.parametrize("format", plugins.names("export.formats"))
@pytest.mark.parametrize(
    ("net", "where"),
    [
        (lambda: Divided(divisor_override=3), "avg_pool2d"),
        (
            lambda: nn.Sequential(
                nn.Conv2d(3, 4, 1), nn.ReLU(), nn.AvgPool2d(2, divisor_override=3), nn.Flatten(),
                nn.Linear(64, 5),
            ),
            "2",
        ),
    ],
)  # fmt: skip
def test_a_divisor_that_the_exporter_drops_is_refused(
    tmp_path, network, sample, refuses, format, net, where
):
    qmodel = network(net(), integer_datapath=True)
    findings = export.check(qmodel, format=format, sample=sample)
    assert (findings[0].layer, findings[0].got) == (where, "divisor_override=3")
    with refuses(f"{where}: must divide by the size of its windows"):
        export.write(qmodel, tmp_path, format=format, sample=sample)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["onnx", "finn"])
def test_pooling_without_a_divisor_is_taken(network, sample, format):
    qmodel = network(Divided(divisor_override=None), integer_datapath=True)
    assert export.check(qmodel, format=format, sample=sample) == ()
