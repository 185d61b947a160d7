"""How the head and the features of a network are found."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.network import Network
from fl.setting import Setting
from sdq import plugins
from sdq.errors import RequestError


class Reordered(nn.Module):
    """The head is made first and called last."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(5, 3)
        self.body = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x.flatten(1)).relu())


class Softmaxed(Reordered):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(1)


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(1, 5, 3, padding=1)
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)).flatten(1)


SAMPLE = torch.zeros(1, 1, 2, 2)


def test_the_last_linear_layer_that_is_called() -> None:
    network = Network(Reordered(), SAMPLE)
    assert network.head_name == "classifier"
    assert network.is_head("model.classifier.bias")
    assert not network.is_head("model.body.bias")
    images = torch.randn(2, 1, 2, 2)
    found = network.outputs(images)
    assert found.features is not None
    torch.testing.assert_close(network.head(found.features), found.logits)
    torch.testing.assert_close(network.model(images), found.logits)


def test_features_are_of_the_copy_that_is_asked() -> None:
    network = Network(Reordered(), SAMPLE)
    copy = network.frozen_copy()
    with torch.no_grad():
        network.model.body.weight.zero_()
        network.model.body.bias.fill_(2)
    images = torch.randn(2, 1, 2, 2)
    assert torch.equal(network.outputs(images).known_features, torch.full((2, 5), 2.0))
    assert not torch.equal(network.outputs(images, copy).known_features, torch.full((2, 5), 2.0))
    assert not any(m._forward_pre_hooks for m in network.modules())


def test_a_convolution_can_be_the_head() -> None:
    assert Network(Convolved(), SAMPLE).head_name == "head"


def test_no_head_is_an_error_for_those_who_need_one() -> None:
    network = Network(Softmaxed(), SAMPLE)
    assert not network.has_head
    with pytest.raises(RequestError, match="head="):
        _ = network.head_name
    assert Network(Softmaxed(), SAMPLE, head="classifier").head_name == "classifier"
    with pytest.raises(RequestError, match="did you mean 'classifier'"):
        Network(Softmaxed(), SAMPLE, head="clasifier")
    config = fl.FederationConfig()
    with pytest.raises(RequestError, match="fedper: needs the network's head"):
        Setting.of(Softmaxed(), fl.method("fedper"), config, num_classes=3, image_shape=(1, 2, 2))
    Setting.of(Softmaxed(), fl.method("fedavg"), config, num_classes=3, image_shape=(1, 2, 2))


@pytest.mark.parametrize("name", ["mlp", "resnet20", "mobilenet_v2", "vgg16_slim"])
def test_every_classifier_of_ours_has_one(name: str) -> None:
    build: Callable[..., nn.Module] = plugins.load("sdq.models", name).build
    model = plugins.call_with_known(build, num_classes=7, in_channels=3, image_size=32)
    network = Network(model, torch.zeros(1, 3, 32, 32))
    assert isinstance(network.head, nn.Linear)
    assert network.head.out_features == 7


def test_a_new_head_has_numbers_of_its_own() -> None:
    network = Network(Reordered(), SAMPLE)
    one, two, other = (network.new_head(torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one.weight, two.weight)
    assert not torch.equal(one.weight, other.weight)
    assert float(one.weight.detach().abs().max()) <= 5**-0.5
