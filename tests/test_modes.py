"""A network trains and evaluates as before, whatever its modules do with their mode."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import NoisyNorm
from torch import Tensor, nn

import sdq
from sdq.calibration import in_float
from sdq.quant_model import QuantModel

Compute = Callable[[Any, Tensor], Any]


class DropPath(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        noise = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.p)
        return x.div(1 - self.p) * noise


class BatchNormAct(nn.BatchNorm2d):
    """Activation included, as in timm; and torch's check of the number of dimensions."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias,
            self.training or not self.track_running_stats, self.momentum, self.eps,
        )  # fmt: skip
        return self.act(x)


MODES: dict[str, Callable[[Callable[..., nn.Module]], nn.Module]] = {
    "drop path": lambda between: between(
        lambda net, x: F.relu(x + net.drop(net.b(x))), drop=DropPath()
    ),
    "dropout": lambda between: between(lambda net, x: F.dropout(F.relu(x), 0.5, net.training)),
    "dropout2d by keyword": lambda between: between(
        lambda net, x: F.dropout2d(input=F.relu(x), p=0.5, training=net.training)
    ),
    "dropout in place": lambda between: between(
        lambda net, x: F.dropout(F.relu(x), 0.5, net.training, inplace=True)
    ),
    "alpha dropout": lambda between: between(lambda net, x: F.alpha_dropout(x, 0.5, net.training)),
    "batch norm with activation": lambda between: between(
        lambda net, x: net.bn(x), bn=BatchNormAct(8)
    ),
    "batch norm": lambda between: between(lambda net, x: F.relu(net.bn(x)), bn=nn.BatchNorm2d(8)),
    "noise": lambda between: between(lambda net, x: F.relu(net.noisy(x)), noisy=NoisyNorm()),
    "randomized relu": lambda between: between(lambda net, x: net.act(x), act=nn.RReLU()),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODES)
def test_training_and_evaluation_stay_what_they_were(
    name: str, training: bool, images: Callable[[], Tensor], between: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    net = MODES[name](between).train(training)
    qmodel = quantized(net).train(training)
    outputs = []
    for network in (net, qmodel):
        torch.manual_seed(3)
        with in_float(qmodel):
            outputs.append(network(images()))
    assert torch.equal(*outputs)  # the same random numbers, and the same operations
    state = qmodel.net.state_dict()
    moved = [key for key in net.state_dict() if "running" in key or "tracked" in key]
    assert all(torch.equal(state[key], net.state_dict()[key]) for key in moved)
    with in_float(qmodel):  # and in the other mode
        outputs = [network.train(not training) for network in (net, qmodel)]
        torch.manual_seed(3)
        expected = net(images())
        torch.manual_seed(3)
        assert torch.equal(qmodel(images()), expected)


def test_the_mode_is_that_of_the_network(
    between: Callable[..., nn.Module], quantized: Callable[..., QuantModel]
) -> None:
    qmodel = quantized(between(lambda net, x: F.relu(x)).eval())
    assert (qmodel.training, qmodel.net.training) == (False, False)


class FunctionalNorm(nn.Module):
    def __init__(self, head: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        bn, x = self.bn, self.conv(x)
        x = F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training, 0.1)
        return self.head(F.relu(x))


@pytest.mark.xfail(
    reason="a module with layers is traced in evaluation, and so is what it does with its mode",
    strict=True,
)
def test_a_functional_batch_norm_beside_layers_goes_on_learning(
    images: Callable[[], Tensor], seeded: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel], head: Callable[[], nn.Module],
) -> None:  # fmt: skip
    qmodel = quantized(seeded(lambda: FunctionalNorm(head))).train()
    before = qmodel.net.state_dict()["bn.running_mean"].clone()
    qmodel(images())
    assert not torch.equal(qmodel.net.state_dict()["bn.running_mean"], before)


@pytest.mark.xfail(reason="torch.fx does not see torch.no_grad in forward", strict=True)
def test_what_computes_without_gradient_does_not_learn(
    images: Callable[[], Tensor], between: Callable[..., nn.Module],
    quantized: Callable[..., QuantModel],
) -> None:  # fmt: skip
    def frozen(net: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = net.stem(x)
        return F.relu(x)

    qmodel = quantized(between(frozen, stem=nn.Conv2d(8, 8, 1)))
    qmodel(images()).sum().backward()
    assert qmodel.weight("stem").grad is None


def test_what_is_kept_whole_for_its_mode_has_its_sign(
    between: Callable[..., nn.Module], quantized: Callable[..., QuantModel]
) -> None:
    qmodel = quantized(MODES["batch norm with activation"](between))
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, False, True]
    qmodel = quantized(between(lambda net, x: net.drop(F.relu(x)), drop=DropPath()))
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, False, True]
    qmodel = quantized(between(lambda net, x: net.drop(x), drop=DropPath()))
    assert [q.signed for q in qmodel.act_quantizers().values()] == [True, True, True]


def test_batch_norm_with_activation_keeps_it_when_frozen(
    exact: Callable[..., Any], images: Callable[[], Tensor], seeded: Callable[..., nn.Module],
    head: Callable[[], nn.Module],
) -> None:  # fmt: skip
    layers = nn.Conv2d(3, 8, 3), BatchNormAct(8), nn.Conv2d(8, 8, 1), nn.ReLU()
    net = seeded(lambda: nn.Sequential(*layers, nn.Conv2d(8, 8, 1), head()))
    for how in ("freeze", "fold"):
        qmodel = exact(net, images(), batch_norm=how, formats=how == "fold")
        assert [q.signed for q in qmodel.act_quantizers().values()] == [True, False, False, True]
        assert qmodel.net.get_submodule("1").state_dict().keys() == net[1].state_dict().keys()
        double = copy.deepcopy(qmodel).double()  # its statistics go along
        assert double(images().double()).dtype == torch.float64


def test_a_frozen_normalisation_stays_frozen() -> None:
    """Whoever looks at a network in evaluation mode gives each module its own mode back."""

    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError

    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 2))
    network.train()[1].eval()
    batches = [(torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 0, 1]))]
    sdq.evaluate(network, batches)
    quantized = sdq.quantize(network, sample=batches[0][0][:1])
    sdq.calibrate_(quantized, batches)
    assert [m.training for m in network] == [True, False, True, True]
    broken = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), Raises())
    broken[1].eval()
    with pytest.raises(ArithmeticError):
        sdq.evaluate(broken, [(torch.zeros(1, 2), torch.zeros(1).long())])
    assert [m.training for m in broken] == [True, False, True]
