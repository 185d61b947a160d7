"""Networks and data at the edge of what makes sense, through search and fine-tuning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.checkpoint import Checkpoint
from sdq.config import QuantConfig, SearchConfig, TrainConfig
from sdq.cost import Budget
from sdq.errors import RequestError, RunError
from sdq.finetune import finetune_
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize
from sdq.search import search

Batch = tuple[Tensor, Tensor]
QUICK = SearchConfig(epochs=2, lr=3e-3)


def whole_path(
    net: nn.Module, loader: list[Batch], config: QuantConfig, budget: Budget
) -> tuple[QuantModel, BitwidthPolicy]:
    """Search, fine-tune, and see that everything is finite."""
    qmodel = quantize(net, config, sample=loader[0][0][:1])
    policy = search(qmodel, loader, budget=budget, teacher=net, config=QUICK)
    apply_policy_(qmodel, policy)
    if not qmodel.calibrated:
        calibrate_(qmodel, loader)
    finetune_(qmodel, loader, teacher=net, config=TrainConfig(epochs=2))
    assert all(t.isfinite().all() for t in qmodel.state_dict().values() if t.is_floating_point())
    assert qmodel.eval()(loader[0][0]).isfinite().all()
    return qmodel, policy


def bits(policy: BitwidthPolicy) -> dict[str, int]:
    return {b.name: b.weight_bits for b in policy}


def test_one_candidate(toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]) -> None:
    config = QuantConfig(bit_choices=(3,))
    _, policy = whole_path(toy(), batches(), config, Budget(avg_weight_bits=3.0))
    assert {b.weight_bits for b in policy if b.searched} == {3}


def test_all_layers_pinned(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    config = QuantConfig(pins=(("*", 4),))
    _, policy = whole_path(toy(), batches(), config, Budget(weight_bytes=1e6))
    assert set(bits(policy).values()) == {4}
    assert not any(b.searched for b in policy)
    qmodel = quantize(toy(), config, sample=batches()[0][0][:1])
    with pytest.raises(RequestError, match="weight bytes must be at least"):
        search(qmodel, batches(), budget=Budget(weight_bytes=1.0), config=QUICK)


def test_one_bit_only(toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]) -> None:
    config = QuantConfig(bit_choices=(1,), first_last_bits=None, act_bits=2)
    qmodel, policy = whole_path(toy(), batches(), config, Budget(avg_weight_bits=1.0))
    assert set(bits(policy).values()) == {1}
    for name in bits(policy):
        codes = qmodel.weight_quantizer(name).codes(qmodel.weight(name))
        assert set(codes.unique().tolist()) <= {-1.0, 1.0}


@pytest.mark.parametrize("kind", ["lsq", "dorefa", "entropy"])
def test_dead_layers_and_channels(
    kind: str, toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net = toy()
    with torch.no_grad():
        net.deep.weight.zero_()
        net.wide.weight[0].zero_()
    config = QuantConfig(bit_choices=(1, 2, 4), weight_quantizer=kind)
    whole_path(net, batches(), config, Budget(avg_weight_bits=2.0))


def test_a_dead_channel_of_one_bit_says_nothing() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3),
                        nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).eval()  # fmt: skip
    with torch.no_grad():
        net[3].weight[1], net[3].bias[1] = 0, 0
        net[4].running_var[1] = 1e-6  # as training leaves it
    x = torch.randn(8, 3, 8, 8)
    qmodel = quantize(net, QuantConfig(act_bits=8, bit_choices=(1,)), sample=x[:1]).eval()
    calibrate_(qmodel, [(x, x)])
    seen: list[Tensor] = []
    qmodel.net.get_submodule("4").register_forward_hook(lambda m, args, y: seen.append(y))
    with torch.no_grad():
        qmodel(x)
    assert seen[0][:, 1].abs().max() < 1e-2  # it was 1,000 with weights of one


def test_constant_inputs(toy: Callable[..., nn.Module]) -> None:
    loader = [(torch.full((8, 1, 8, 8), 0.3), torch.arange(8) % 3) for _ in range(3)]
    whole_path(toy(), loader, QuantConfig(), Budget(avg_weight_bits=2.0))
    loader = [(torch.zeros(8, 1, 8, 8), torch.arange(8) % 3) for _ in range(3)]
    whole_path(toy(), loader, QuantConfig(), Budget(avg_weight_bits=2.0))


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("kind", ["lsq", "dorefa", "entropy"])
def test_single_element_channels(kind: str, granularity: Any) -> None:
    class Net(nn.Module):
        """A depthwise 1 x 1 convolution has one weight a channel."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3)
            self.scale = nn.Conv2d(4, 4, 1, groups=4)
            self.mix = nn.Conv2d(4, 4, 3)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.scale(self.first(x).relu())
            return self.last(self.mix(x.relu()).relu().mean((2, 3)))

    rng = torch.Generator().manual_seed(0)
    loader = [(torch.randn(8, 1, 8, 8, generator=rng), torch.arange(8) % 3) for _ in range(3)]
    config = QuantConfig(bit_choices=(1, 2, 4), weight_quantizer=kind)
    net = Net()
    qmodel = quantize(net, config, sample=loader[0][0][:1])
    searching = QUICK.replaced(granularity=granularity)
    policy = search(qmodel, loader, budget=Budget(avg_weight_bits=2.5), config=searching)
    apply_policy_(qmodel, policy)
    calibrate_(qmodel, loader)
    finetune_(qmodel, loader, teacher=net, config=TrainConfig(epochs=2))
    assert qmodel.eval()(loader[0][0]).isfinite().all()


def test_a_layer_that_the_forward_pass_never_uses(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]]
) -> None:
    net = toy()
    net.unused = nn.Conv2d(3, 3, 3)
    _, policy = whole_path(net, batches(), QuantConfig(), Budget(avg_weight_bits=2.0))
    assert "unused" not in bits(policy)


def test_a_layer_called_twice_has_one_bitwidth(batches: Callable[..., list[Batch]]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 4, 3, padding=1)
            self.again = nn.Conv2d(4, 4, 3, padding=1)
            self.other = nn.Conv2d(4, 4, 1)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.again(self.first(x).relu()).relu()
            x = self.other(self.again(x).relu()).relu()
            return self.last(x.mean((2, 3)))

    qmodel, policy = whole_path(Net(), batches(), QuantConfig(), Budget(avg_weight_bits=2.0))
    assert list(bits(policy)) == ["first", "again", "other", "last"]
    (again,) = (s for s in qmodel.layers if s.name == "again")
    assert again.macs == 2 * 4 * 4 * 9 * 64  # both calls


def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_good_state(
    toy: Callable[..., nn.Module], batches: Callable[..., list[Batch]], tmp_path: Any
) -> None:
    good = batches(count=3)

    class Turning:
        """From its second epoch on, one image has a NaN."""

        epoch = 0

        def __len__(self) -> int:
            return len(good)

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __iter__(self) -> Any:
            for step, (images, labels) in enumerate(good):
                bad = self.epoch >= 1 and step == 2
                yield (images * float("nan") if bad else images), labels

    net = toy()
    qmodel = quantize(net, sample=good[0][0][:1])
    calibrate_(qmodel, good)
    checkpoint = Checkpoint(tmp_path / "search.safetensors")
    config = SearchConfig(epochs=3, lr=3e-3)
    with pytest.raises(RunError, match="search: loss must be finite, got nan in epoch 2, step 3"):
        search(
            qmodel, Turning(), budget=Budget(avg_weight_bits=2.0), config=config,
            checkpoint=checkpoint,
        )  # fmt: skip
    # the state after the first epoch goes on with mended data
    epochs: set[int] = set()
    search(
        qmodel, good, budget=Budget(avg_weight_bits=2.0), config=config, checkpoint=checkpoint,
        watch=lambda r: epochs.add(r.epoch),
    )  # fmt: skip
    assert epochs == {1, 2}
