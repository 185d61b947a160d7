"""SDQ: learn a bitwidth for each layer of a trained network, and fine-tune it quantized.

>>> import torch, sdq
>>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(),
...                           torch.nn.Linear(144, 2))
>>> qmodel = sdq.quantize(net, sdq.QuantConfig(act_bits=4), sample=torch.zeros(1, 1, 8, 8))
>>> qmodel.policy.avg_weight_bits_all
8.0
"""

import warnings

from sdq._guard import foreign_module
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import PtqConfig, QuantConfig, SearchConfig, TrainConfig
from sdq.cost import Budget
from sdq.errors import RequestError, RunError
from sdq.finetune import finetune_
from sdq.layers import LayerSpec
from sdq.metrics import evaluate
from sdq.outcome import Trained
from sdq.parallel import open_fabric
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.ptq import ptq_
from sdq.quant_model import QuantModel, quantize
from sdq.search import search, uniform_policy
from sdq.train import train_

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
