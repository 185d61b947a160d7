"""Every network under a mixed policy, a little trained, exported in every format, and verified."""

import importlib.util
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import QuantConfig
from sdq.outcome import reestimate_statistics_
from sdq.quant_model import QuantModel, quantize

if importlib.util.find_spec("onnx") is None:
    pytest.skip("sdq[export] is not installed", allow_module_level=True)

import export

SIDE, CLASSES = 32, 4
FPGA = {"finn", "hls4ml"}
"""Take fewer networks, and compile for minutes: they have tests of their own."""
DEEP = {"resnet50", "efficientnet_b0", "densenet121"}
"""Half a minute each."""


def images(count: int = 12) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def trained(name: str) -> QuantModel:
    """Return the network with random bits and two steps of training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net: nn.Module = plugins.call_with_known(
            plugins.load("sdq.models", name).build,
            num_classes=CLASSES, in_channels=3, image_size=SIDE, width=8,
        )  # fmt: skip
        qmodel = quantize(net, QuantConfig(), sample=images(1))
        draw = random.Random(name)
        bits = {b.name: draw.choice((1, 2, 3, 4, 6, 8)) for b in qmodel.policy if b.searched}
        apply_policy_(qmodel, qmodel.policy.with_weight_bits(bits))
        labels = torch.arange(12) % CLASSES
        for quantizer in qmodel.act_quantizers().values():
            quantizer.observing = True
        reestimate_statistics_(qmodel, [(images(), labels)], 1)  # fresh weights have none
        calibrate_(qmodel, [(images(), labels)])
        qmodel.train()
        optimizer = torch.optim.AdamW(qmodel.parameters(), lr=1e-3)
        for _ in range(2):
            output = qmodel(images())
            loss = F.cross_entropy(output if output.dim() == 2 else output.mean((2, 3)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return qmodel.eval()


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n
        for n in plugins.names("sdq.models")
    ],
)
def test_every_format_is_verified(name: str, tmp_path: Path) -> None:
    qmodel = trained(name)
    for format_ in sorted(set(plugins.names("export.formats")) - FPGA):
        export.write(qmodel, tmp_path, format=format_, sample=images(1))
        report = export.verify(qmodel, tmp_path, format=format_, inputs=images())
        assert report.verified, f"{format_}: {report.reason}"
        assert report.exact is not None
        assert report.exact.different == 0
