"""What no format can take, found in the quantized network itself."""

import torch.nn.functional as F
from torch import nn

from export.findings import Finding
from sdq.quant_model import QuantModel

_DIVISOR_AT = 6
"""Where ``avg_pool2d`` and ``avg_pool3d`` take ``divisor_override``."""


def check(qmodel: QuantModel) -> tuple[Finding, ...]:
    """Return average pooling with a divisor of its own, which ONNX's has not.

    Torch's exporter leaves it out without a word.

    Args:
        qmodel: need not be calibrated.
    """
    found = {
        name: module.divisor_override
        for name, module in qmodel.net.named_modules()
        if isinstance(module, nn.AvgPool2d | nn.AvgPool3d)
    }
    for node in qmodel.net.graph.nodes:
        if node.target in (F.avg_pool2d, F.avg_pool3d):
            given = dict(enumerate(node.args))
            divisor = node.kwargs.get("divisor_override", given.get(_DIVISOR_AT))
            owner = next(reversed(node.meta.get("nn_module_stack") or {}), "")
            found[f"{owner} ({node.name})" if owner else node.name] = divisor
    return tuple(
        Finding(
            name, "must divide by the size of its windows, as average pooling in ONNX does",
            f"divisor_override={divisor}",
            "leave it out, and multiply by the size of a window over it",
        )
        for name, divisor in found.items()
        if divisor is not None
    )  # fmt: skip
