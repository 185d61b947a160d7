"""The finn format: written, streamlined, converted to hardware layers, executed, codes equal."""

import pytest
from torch import nn

import export
from export.formats import finn

needs_finn = pytest.mark.skipif(bool(finn.environment.missing()), reason="FINN+ is not installed")


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6, 5),
    )  # fmt: skip


@needs_finn
@pytest.mark.parametrize("bits", [None, 1, 2, 8])
def test_a_small_cnn_has_the_same_codes_in_finn(tmp_path, network, sample, images, bits):
    qmodel = network(plain(), bits=bits, act_bits=4, integer_datapath=True)
    export.write(qmodel, tmp_path, format="finn", sample=sample)
    report = export.verify(qmodel, tmp_path, format="finn", inputs=images)
    assert report.verified, report.lines
    assert [stage.name for stage in report.runtimes] == list(finn.RUNTIMES)
    assert all(stage.flipped == 0 for stage in report.runtimes)
