"""Activations of 16 bits: calibrated, fine-tuned, and exported where the format has them."""

import pytest
import torch

import export
from export.format import load_format
from export.reference import Reference
from sdq.calibration import calibrate_
from sdq.config import QuantConfig, TrainConfig
from sdq.errors import RequestError
from sdq.finetune import finetune_
from sdq.models import vgg_like
from sdq.quant_model import quantize

WIDE = {"act_bits": 16, "input_bits": 16}


@pytest.mark.parametrize("net", ["plain", "residual", "perceptron"])
def test_qonnx_has_them(tmp_path, network, sample, images, net):
    qmodel = network(net, **WIDE)
    result = export.write(qmodel, tmp_path, format="qonnx", sample=sample)
    assert 16 in result.act_bits.values()
    report = export.verify(qmodel, tmp_path, format="qonnx", inputs=images, batch_size=10)
    assert report.verified, report.lines
    assert report.exact.different == 0
    codes = load_format("qonnx")[1].open_exact(result.path)(images).codes
    wide = {name: c for name, c in codes.items() if qmodel.act_quantizers()[name].bits == 16}
    unsigned = [c for name, c in wide.items() if not qmodel.act_quantizers()[name].signed]
    assert max(int(c.max()) for c in unsigned) > 32767  # they do not fit 16 signed bits
    assert all(int(c.min()) >= 0 for c in unsigned)


def test_sixteen_bits_are_nearly_float(network, images):
    qmodel, narrow = network("residual", 8, **WIDE), network("residual", 8, act_bits=32)
    narrow.eval(), qmodel.eval()
    gap = (qmodel(images) - narrow(images)).abs().max().detach()
    # a step is 2^-16 of the range; images beyond those it was calibrated on are clipped
    assert gap < 2e-2 * narrow(images).abs().max().detach()


def test_onnx_refuses_them_by_name(tmp_path, network, sample):
    qmodel = network("plain", act_bits=16)
    with pytest.raises(RequestError, match="4_input: must have at most 8 bits in onnx"):
        export.write(qmodel, tmp_path / "out", format="onnx", sample=sample)
    assert not (tmp_path / "out").exists()


def test_they_are_fine_tuned(network, images):
    qmodel = network("plain", 4, **WIDE)
    before = {name: q.scale.detach().clone() for name, q in qmodel.act_quantizers().items()}
    batches = [(images, torch.arange(24) % 5)] * 3
    finetune_(qmodel, batches, config=TrainConfig(epochs=2, distill=False))
    after = {name: q.scale.detach() for name, q in qmodel.act_quantizers().items()}
    assert all(torch.isfinite(x) and x > 0 for x in after.values())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    trace = Reference(qmodel).float64(images)
    assert max(int(c.max()) for c in trace.codes.values()) > 32767


def test_a_deeper_network_has_more_ties_the_wider_its_codes_are(tmp_path):
    """A code of 16 bits is 256 times as near to the next as one of 8."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, images = vgg_like.build(7), torch.randn(64, 3, 28, 28)
    qmodel = quantize(net, QuantConfig(act_bits=16), sample=images[:1])
    calibrate_(qmodel, [(images, images)])
    export.write(qmodel, tmp_path, format="qonnx", sample=images[:1])
    report = export.verify(qmodel, tmp_path, format="qonnx", inputs=images)
    assert report.verified, report.lines
