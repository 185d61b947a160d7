"""FedRGD, with clients without masks weighing as much as those with them: FedST otherwise.

Source: Zhang et al., "Improving Semi-supervised Federated Learning by Reducing the Gradient
Diversity of Models", 2020, https://arxiv.org/abs/2008.11364, in the form in which the authors of
FedMix compare with it for segmentation, which is FedST with weights of one half for either kind.
The paper's averaging in groups of clients is not in that form, nor here.
"""

from typing import Annotated

from pydantic import Field

from fl.methods.fedst import FedST, FedSTConfig


class FedRGDConfig(FedSTConfig):
    """Hyper-parameters of FedST, with another default of the weight."""

    labelled_weight: Annotated[float, Field(gt=0, le=1)] = 0.5


class FedRGD(FedST):
    """FedST with other weights."""

    config_type = FedRGDConfig
