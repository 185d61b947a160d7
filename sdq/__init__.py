"""SDQ: learn a bitwidth for each layer of a trained network, and fine-tune it quantized.

>>> import torch, sdq
>>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
...                           torch.nn.Linear(144, 2))
>>> qmodel = sdq.quantize(net, sdq.QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
>>> qmodel.policy.avg_weight_bits_all
8.0
"""

import importlib
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sdq._guard import foreign_module

if TYPE_CHECKING:
    from sdq.apply_policy import apply_policy_
    from sdq.calibration import calibrate_
    from sdq.config import PtqConfig, QuantConfig, SearchConfig, TrainConfig
    from sdq.cost import Budget
    from sdq.errors import RequestError, RunError
    from sdq.finetune import finetune_
    from sdq.layers import LayerSpec
    from sdq.outcome import Trained
    from sdq.parallel import open_fabric
    from sdq.policy import BitwidthPolicy, LayerBits
    from sdq.ptq import ptq_
    from sdq.quant_model import QuantModel, quantize
    from sdq.search import search, uniform_policy
    from sdq.task import evaluate
    from sdq.train import train_

_HOMES = {
    "apply_policy": ("apply_policy_",),
    "calibration": ("calibrate_",),
    "config": ("PtqConfig", "QuantConfig", "SearchConfig", "TrainConfig"),
    "cost": ("Budget",),
    "errors": ("RequestError", "RunError"),
    "finetune": ("finetune_",),
    "layers": ("LayerSpec",),
    "outcome": ("Trained",),
    "parallel": ("open_fabric",),
    "policy": ("BitwidthPolicy", "LayerBits"),
    "ptq": ("ptq_",),
    "quant_model": ("QuantModel", "quantize"),
    "search": ("search", "uniform_policy"),
    "task": ("evaluate",),
    "train": ("train_",),
}
"""Module -> what of it is ``sdq.NAME``. Each is imported when it is first asked for: torch takes
seconds, and ``sdq --help`` does not need it."""


class _Package(ModuleType):
    """This package: its names are found in its modules, and ``sdq.search`` is the function.

    Importing the module ``sdq.search`` would put the module in the function's place.
    """

    def __getattr__(self, name: str) -> Any:
        for module, names in _HOMES.items():
            if name in names:
                return getattr(importlib.import_module(f"sdq.{module}"), name)
        raise AttributeError(f"module 'sdq' has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        if not (name == "search" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package

if _hidden := foreign_module():
    warnings.warn(_hidden, UserWarning, stacklevel=2)

__all__ = [
    "BitwidthPolicy",
    "Budget",
    "LayerBits",
    "LayerSpec",
    "PtqConfig",
    "QuantConfig",
    "QuantModel",
    "RequestError",
    "RunError",
    "SearchConfig",
    "TrainConfig",
    "Trained",
    "apply_policy_",
    "calibrate_",
    "evaluate",
    "finetune_",
    "open_fabric",
    "ptq_",
    "quantize",
    "search",
    "train_",
    "uniform_policy",
]
