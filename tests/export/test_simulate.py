"""Generated layers of a FINN build in Verilator, against FINN's Python and PyTorch."""

import os
import shutil
from pathlib import Path

import pytest
from torch import nn

import export
from export import finn_folder, verilator
from export.finn_flow import environment
from sdq.errors import RequestError

needs_tools = pytest.mark.skipif(
    bool(environment.missing()) or any(shutil.which(x) is None for x in verilator.PROGRAMS),
    reason="FINN+ or Verilator is not installed",
)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.fixture
def written(tmp_path, network, sample):
    qmodel = network(net(), act_bits=4, integer_datapath=True)
    fast = {"fps": "500000"}  # several values a word, a whole window at a time
    export.write(qmodel, tmp_path, format="finn", sample=sample, metadata=fast)
    return qmodel, tmp_path


@needs_tools
@pytest.mark.slow
def test_generated_layers_give_the_integers_of_pytorch(written, images):
    """Thresholds, padding and windows, plain and one channel after the other."""
    qmodel, folder = written
    finn_folder.build(folder)
    found = export.simulate_layers(qmodel, folder, inputs=images[:6], layer="all")
    kinds = [layer.kind for layer in found]
    assert kinds.count("Thresholding_rtl") == 3
    assert {"FMPadding_rtl", "ConvolutionInputGenerator_rtl"} <= set(kinds)
    assert {x.quantizer for x in found if x.quantizer} == set(qmodel.act_quantizers())
    for layer in found:
        assert (layer.different, layer.from_pytorch or 0) == (0, 0), layer.line
        # a pipeline of 2 x 8 + 3 stages, once in 6 images; a window's estimate is a bound
        assert layer.cycles <= layer.estimated_cycles + 4, layer.line
        if "Input" not in layer.kind:
            assert layer.cycles >= layer.estimated_cycles, layer.line
    (first,) = export.simulate_layers(qmodel, folder, inputs=images[:2])
    assert (first.layer, first.values) == ("Thresholding_rtl_1", 2 * 4 * 8 * 8)

    with pytest.raises(RequestError, match="layer must be one of first, all, Thresholding_rtl_0,"):
        export.simulate_layers(qmodel, folder, inputs=images[:2], layer="MVAU_hls_0")
    _change_a_threshold_(folder)
    (wrong,) = export.simulate_layers(qmodel, folder, inputs=images[:6])
    assert wrong.different > 0
    assert wrong.from_pytorch == wrong.different
    os.utime(folder / "model_finn.onnx")
    with pytest.raises(RequestError, match="got an older one; build again"):
        export.simulate_layers(qmodel, folder, inputs=images[:2])


def _change_a_threshold_(folder: Path) -> None:
    """Swap the first channel's middle threshold with the second one's."""
    (memory,) = folder.glob("build/work/*/Thresholding_rtl_1_threshs_0_0.dat")
    first, second, *rest = memory.read_text().split()
    assert first != second
    memory.write_text("\n".join([second, first, *rest]) + "\n")


@needs_tools
def test_without_a_build_nothing_is_simulated(written, images):
    with pytest.raises(RequestError, match=r"must hold a build with sources.*--build"):
        export.simulate_layers(*written, inputs=images[:2])


def test_other_formats_have_no_hardware(tmp_path, network, images):
    with pytest.raises(RequestError, match="format must be one of finn, got 'onnx'"):
        export.simulate_layers(network("plain"), tmp_path, inputs=images, format="onnx")
