"""What after-training quantization leaves goes into files like any other network."""

import pytest

import export
from sdq.config import PtqConfig
from sdq.ptq import ptq_


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("format", ["onnx", "qonnx"])
def test_files_of_a_rounded_network_are_verified(tmp_path, network, sample, images, format, bits):
    qmodel = network("residual", bits=bits)
    ptq_(qmodel, images, PtqConfig(steps=10))
    export.write(qmodel, tmp_path, format=format, sample=sample)
    assert export.verify(qmodel, tmp_path, format=format, inputs=images).verified
