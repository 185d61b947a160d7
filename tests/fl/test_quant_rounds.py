"""Rounds of quantized networks: what is merged, averaged and decided, and what a client does."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fl
from fl.channel import Codecs
from fl.client import answer
from fl.compression import CODES, CompressionConfig
from fl.methods.fedavg import FedAvg
from fl.quant_network import fit_own_scales_, set_act_scales_, set_bits_
from fl.quant_rounds import ACTS, merged_scales
from fl.record import Failure, Record, Reply, Request
from fl.rounds import Rounds
from fl.run import InProcess
from fl.search_rounds import GROUP, SearchRounds, SearchRoundsConfig
from fl.setting import Setting
from fl.state import Route
from fl.store import Store
from fl.tune_rounds import TuneRounds, TuneRoundsConfig
from sdq.calibration import calibrate_
from sdq.config import QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.losses import distillation
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize
from sdq.search_space import SearchSpace

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)
QUANT = QuantConfig(bit_choices=(1, 2, 4, 8), first_last_bits=None)
SAMPLE = torch.zeros(1, 1, 6, 6)


def search_rounds(net: nn.Module, bits: float = 3.0, **config: Any) -> tuple[Setting, SearchRounds]:
    """Return a search by FedAvg of a network, and its setting."""
    qmodel = quantize(net, QUANT, sample=SAMPLE)
    set_act_scales_(qmodel, {})
    space = SearchSpace.of(qmodel)
    constraints = Budget(avg_weight_bits=bits).constraints(space)
    method = SearchRounds(
        SearchRoundsConfig(quant=QUANT, **config), FedAvg(), net, space, constraints
    )
    setting = Setting.of(qmodel, method, QUICK, num_classes=3, image_shape=(1, 6, 6))
    return setting, method


def begun(setting: Setting, clients: list[fl.ClientData]) -> Rounds:
    rounds = Rounds(setting, InProcess(setting, clients, Store()), len(clients))
    assert rounds.begin() == []
    return rounds


def sent(rounds: Rounds, client: int, images: int, bits: dict[str, Any], **model: Any) -> Reply:
    """Return a reply of the server's own model and bits, with some tensors changed."""
    group = rounds.server.memory.tensors.get(GROUP, {}) | bits
    tensors = {"model": {**rounds.server.model, **model}, GROUP: group}
    return Reply(client, Record(tensors, {"num_examples": images}))


# --- what is merged and averaged


def test_scales_of_activations_merge_to_their_geometric_mean_or_the_largest() -> None:
    told = {0: {"a@4": torch.tensor(0.1)}, 1: {"a@4": torch.tensor(0.4)}}
    weights = {0: 1.0, 1: 3.0, 2: 9.0}
    merged = merged_scales(told, weights, "geometric")
    assert float(merged["a@4"]) == pytest.approx(0.1**0.25 * 0.4**0.75)  # 0.2828
    assert float(merged_scales(told, weights, "max")["a@4"]) == pytest.approx(0.4)
    bad = {2: {"a@4": torch.tensor(math.nan)}, 3: {"a@4": torch.tensor(-1.0)}}
    assert merged_scales(told | bad, weights, "geometric") == merged


def test_log_odds_and_prices_are_averaged_by_images(tiny: Make, hospitals: Clients) -> None:
    """10 images say 1 and 30 say -2: (10 - 60) / 40 = -1.25, odds of exp(-1.25)."""
    setting, method = search_rounds(tiny())
    rounds = begun(setting, hospitals())
    before = rounds.server.memory.tensors[GROUP]
    theta = torch.zeros_like(before["theta"])
    one, other = (
        {"theta": theta + value, "log_price": torch.tensor([math.log(price)]),
         "first_usage": torch.ones(1)}
        for value, price in ((1.0, 1e-3), (-2.0, 1e-1))
    )  # fmt: skip
    name = "model.net.hidden.weight"
    weight = rounds.server.model[name]
    found = method.aggregate(rounds.server, [
        sent(rounds, 0, 10, one, **{name: weight + 4}), sent(rounds, 1, 30, other),
    ])  # fmt: skip
    after = rounds.server.memory.tensors[GROUP]
    assert torch.allclose(after["theta"], torch.full_like(theta, -1.25))
    # the weights are the method's, here by images too
    assert torch.allclose(found.model[name], weight + 1)
    assert float(after["log_price"]) == pytest.approx((math.log(1e-3) + 3 * math.log(1e-1)) / 4)
    # -1.25 decides nothing: beta is 0.22
    assert torch.equal(after["level"], before["level"])
    used = rounds.server.memory.values[GROUP][0]
    assert used["bits_and_beta"]["hidden"][1] == pytest.approx(0.2227, abs=1e-4)


@pytest.mark.parametrize(("value", "moved"), [(-3.0, -1), (3.9, 1), (2.0, 0)])
def test_the_server_alone_leaves_a_pair(
    value: float, moved: int, tiny: Make, hospitals: Clients
) -> None:
    """Beta below 0.1 (log-odds -2.2) leaves a pair downwards, above 0.97 (3.48) upwards."""
    setting, method = search_rounds(tiny(), bits=2.0)
    rounds = begun(setting, hospitals())
    before = rounds.server.memory.tensors[GROUP]
    assert before["level"].tolist() == [2, 2, 2]  # 4 or 2 bits: the lowest above the budget
    bits = {"theta": torch.full_like(before["theta"], value), "first_usage": torch.ones(1)}
    method.aggregate(rounds.server, [sent(rounds, 0, 5, bits)])
    assert rounds.server.memory.tensors[GROUP]["level"].tolist() == [2 + moved] * 3
    # whoever is asked next starts from this
    sent_down = method.send(rounds.server, 1).tensors[GROUP]
    assert sent_down["level"].tolist() == [2 + moved] * 3


@pytest.mark.parametrize(
    ("images", "level", "theta"),
    [
        # a mean below the logit of 0.1, -2.197, leaves a pair
        ((30, 10), 3, (30 * 1.0 - 10 * 4.0) / 40),
        ((10, 30), 1, (10 * 3.0 + 30 * 0.5) / 40),
        ((14, 26), 2, (14 * 2.0 - 26 * 4.0) / 40),
        # what few have learned of a pair that is new to the others
        ((0, 40), 1, 0.5),
    ],
)
def test_clients_at_unequal_pairs(
    images: tuple[int, int], level: int, theta: float, tiny: Make, hospitals: Clients
) -> None:
    """One is still at the pair of 8 and 4 bits; the other has left it and the next (-4 each)."""
    setting, method = search_rounds(tiny(), search=SearchConfig(start="highest"))
    rounds = begun(setting, hospitals())
    size = len(rounds.server.memory.tensors[GROUP]["level"])
    of_one, of_other = (
        {"theta": torch.tensor([row] * size), "level": torch.full((size,), at),
         "first_usage": torch.ones(1)}
        for row, at in (((3.0, 2.0, 1.0), 3), ((0.5, -2.3, -2.3), 1))
    )  # fmt: skip
    method.aggregate(rounds.server, [
        sent(rounds, 0, images[0], of_one), sent(rounds, 1, images[1], of_other),
    ])  # fmt: skip
    after = rounds.server.memory.tensors[GROUP]
    assert after["level"].tolist() == [level] * size
    assert after["theta"][:, level - 1].tolist() == pytest.approx([theta] * size)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"theta": torch.zeros(2, 3)}, "'theta' is torch.float32 (2, 3) instead of"),
        ({"level": torch.zeros(3)}, "'level' is torch.float32 (3,) instead of torch.int64 (3,)"),
        ({"more": torch.zeros(1)}, "'more' is unknown"),
        ({"theta": torch.full((3, 3), 1e38)}, "'theta' must be from -1000 to 1000"),
        ({"level": torch.full((3,), 4)}, "'level' must be from 0 to 3"),
        ({"log_price": torch.full((1,), 1e4)}, "'log_price' must be from -9.21034 to 4.60517"),
    ],
)
def test_bits_of_another_search_are_refused(
    change: dict[str, Any], reason: str, tiny: Make, hospitals: Clients
) -> None:
    setting, method = search_rounds(tiny())
    rounds = begun(setting, hospitals())
    assert method.misfit(rounds.server, sent(rounds, 0, 5, {})) is None
    why = method.misfit(rounds.server, sent(rounds, 0, 5, change))
    assert why is not None
    assert reason in why


def test_a_pair_is_entered_with_the_odds_of_its_entry_at_most(
    tiny: Make, hospitals: Clients
) -> None:
    setting, method = search_rounds(tiny(), search=SearchConfig(start="highest", entry_beta=0.6))
    rounds = begun(setting, hospitals())
    size = len(rounds.server.memory.tensors[GROUP]["level"])
    bits = {"theta": torch.tensor([[3.0, 2.0, -3.0]] * size), "first_usage": torch.ones(1)}
    method.aggregate(rounds.server, [sent(rounds, 0, 5, bits)])
    after = rounds.server.memory.tensors[GROUP]
    assert after["level"].tolist() == [2] * size
    assert after["theta"][:, 1].tolist() == pytest.approx([math.log(1.5)] * size)


def test_a_client_leaves_what_is_decided_for_it_and_can_turn_back(
    tiny: Make, hospitals: Clients
) -> None:
    """Three epochs of a step that decides a pair at once: more than one pair in a round."""
    setting, _ = search_rounds(tiny(), search=SearchConfig(start="highest", bitwidth_lr=4.0))
    rounds = begun(setting, hospitals())
    (request,) = rounds.requests("train", [0], None, evaluate=False)
    began = request.record.tensors[GROUP]["level"]
    fell = 0
    for client in range(4):  # of other draws each
        reply, _ = answer(setting, hospitals()[0], replace(request, client=client), None)
        bits = reply.record.tensors[GROUP]
        fell = max(fell, int((began - bits["level"]).max()))
        assert bits["theta"].gather(1, (bits["level"] - 1)[:, None]).abs().max() <= 4.0
    assert fell > 1


def test_only_numbers_leave_a_client_before_the_first_round(tiny: Make, hospitals: Clients) -> None:
    setting, _ = search_rounds(tiny())
    client = hospitals()[0]
    reply, _ = answer(setting, client, Request("counts", 0, 0, Record()), None)
    scales = reply.record.tensors[ACTS]
    assert {t.numel() for t in scales.values()} == {1}
    assert set(reply.record.tensors) == {ACTS}
    # and they are what the engine measures on these images
    alone = quantize(tiny(), QUANT, sample=SAMPLE)
    everything = setting.normalization(client.train.images.take(torch.arange(21)))
    calibrate_(alone, [(everything, client.train.labels)])
    assert set(scales) == {f"{p}@{q.bits}" for p, q in alone.act_quantizers().items()}
    for path, quantizer in alone.act_quantizers().items():
        told = float(scales[f"{path}@{quantizer.bits}"])
        assert told == pytest.approx(float(quantizer.base), rel=0.15)  # other batches, 8 images


class Copies(InProcess):
    """Every client sends what client 0 would."""

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for request in requests:
            found, _ = answer(self.setting, self.clients[0], replace(request, client=0), None)
            yield replace(found, client=request.client)


def test_equal_clients_are_as_one(tiny: Make, hospitals: Clients) -> None:
    ended = []
    for count in (1, 3):
        setting, _ = search_rounds(tiny())
        rounds = Rounds(setting, Copies(setting, hospitals(), Store()), count)
        rounds.begin()
        for _ in range(2):
            rounds.round(evaluate=False)
        ended.append(rounds.server)
    one, three = ended
    for group in ("theta", "level", "log_price"):
        assert torch.equal(one.memory.tensors[GROUP][group], three.memory.tensors[GROUP][group])
    for name, tensor in one.model.items():
        # scales pass through a logarithm, whose last bit may differ
        assert torch.allclose(tensor, three.model[name], rtol=1e-6, atol=0), name


# --- unequal precisions


def policies(qmodel: QuantModel, *hidden: int) -> list[BitwidthPolicy]:
    return [qmodel.policy.with_weight_bits({"hidden": bits}) for bits in hidden]


def tune_rounds(
    net: nn.Module, clients: list[fl.ClientData], *hidden: int, inner: str = "fedavg", **over: Any
) -> tuple[Rounds, TuneRounds]:
    """Return the tuning with these bits in one layer, of the server and of clients 0, 1, ..."""
    qmodel = quantize(net, QUANT, sample=SAMPLE)
    of_all, *own = policies(qmodel, *hidden)
    set_act_scales_(qmodel, {})
    set_bits_(qmodel, of_all)
    config = TuneRoundsConfig(quant=QUANT, policy=of_all.to_json())
    method = TuneRounds(config, fl.method(inner), net, of_all, dict(enumerate(own)))
    changed = QUICK.replaced(geometric=("*tensor_quant*",), **over)
    setting = Setting.of(qmodel, method, changed, num_classes=3, image_shape=(1, 6, 6))
    return begun(setting, clients), method


def test_masters_are_averaged_over_all_and_scales_over_equal_bits(
    tiny: Make, hospitals: Clients
) -> None:
    """Bits 2, 2 and 8: gains 1 and 4 with equal weights give 2; that of 8 bits stays its own."""
    rounds, method = tune_rounds(tiny(), hospitals(), 4, 2, 2, 8)
    server = rounds.server
    weight, gain = "model.net.hidden.weight", "model.net.hidden.weight_quant.tensor_quant.gain"
    base = gain.replace("gain", "base")
    first = server.model[weight]
    replies = [
        sent(rounds, k, 10, {}, **{weight: first + k, gain: torch.full_like(server.model[gain], g)})
        for k, g in enumerate((1.0, 4.0, 0.5))
    ]
    found = method.aggregate(server, replies)
    server.model = found.model
    assert torch.allclose(server.model[weight], first + 1)
    states = [method.state_for(server, k) for k in range(3)]
    for state in states:
        assert torch.equal(state[weight], server.model[weight])
    assert torch.allclose(states[0][gain], torch.full_like(states[0][gain], 2.0))
    assert torch.equal(states[1][gain], states[0][gain])
    assert torch.allclose(states[2][gain], torch.full_like(states[2][gain], 0.5))
    # nobody has the server's 4 bits: its scale is still that of least squares at 4 bits
    qmodel = quantize(tiny(), QUANT, sample=SAMPLE)
    for bits, state in ((4, server.model), (2, states[0]), (8, states[2])):
        expected = qmodel.new_weight_quantizer("hidden", bits).base
        if bits == 4:
            assert torch.equal(state[base], expected)
        assert torch.ones_like(server.model[gain]).equal(server.model[gain])


def test_each_client_quantizes_at_its_own_bits(tiny: Make, hospitals: Clients) -> None:
    clients = hospitals()
    rounds, method = tune_rounds(tiny(), clients, 4, 1, 8)
    network = rounds.setting.network
    levels = {}
    for client in (0, 1, 2):  # the third has none of its own
        (request,) = rounds.requests("train", [client], None, evaluate=False)
        answer(rounds.setting, clients[client], request, None)
        assert isinstance(network.model, QuantModel)
        assert network.model.policy["hidden"].weight_bits == (1, 8, 4)[client]
        quantizer = network.model.settled_quantizer("hidden")
        levels[client] = len(quantizer.codes(network.model.weight("hidden")).unique())
    assert levels[0] == 2
    assert 4 < levels[2] <= 16 < levels[1]
    # what the server's model is measured with is the server's
    next(iter(method.views("server").values()))(network, SAMPLE)
    assert network.model.policy["hidden"].weight_bits == 4


@pytest.mark.parametrize("method", ["fedavg", "ditto"])
def test_messages_have_the_bits_of_the_clients_policy(
    method: str, tiny: Make, hospitals: Clients
) -> None:
    """``hidden`` at 1, 8 and 4 bits; beside a personal model what travels has the common 4."""
    named = CompressionConfig(up=3, down=None, policy_bits=True, tensor_bits={"*.bias": 5})
    rounds, _ = tune_rounds(tiny(), hospitals(), 4, 1, 8, inner=method, compress=named)
    name = "model.net.hidden.weight"
    weight, seen = rounds.server.model[name], {}

    def look(kind: str, reply: Any) -> None:
        if kind == "train":
            seen[reply.client] = len(reply.record.tensors[CODES][name])

    rounds.hear = look
    rounds.round(evaluate=False)
    bits = {0: 1, 1: 8, 2: 4} if method == "fedavg" else dict.fromkeys(range(3), 4)
    assert seen == {k: math.ceil(weight.numel() * b / 8) for k, b in bits.items()}
    codec = Codecs.of(rounds.setting, 1).up
    assert codec is not None
    assert codec.bits["model.net.hidden.bias"] == 5


# --- the parts of a client's round


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_loss_is_the_methods_and_the_teachers(
    share: float, tiny: Make, hospitals: Clients
) -> None:
    net, seen = tiny(), []
    qmodel = quantize(net, QUANT, sample=SAMPLE)
    set_act_scales_(qmodel, {})
    config = TuneRoundsConfig(quant=QUANT, distill=share, bin_weight=0.0)

    class Spied(TuneRounds):
        def client(self, context: Any) -> Any:
            found = super().client(context)
            inner = found.loss

            def loss(outputs: Any, labels: Any) -> Any:
                seen.append((outputs, labels, inner(outputs, labels)))
                return seen[-1][2]

            found.loss = loss
            return found

    method = Spied(config, FedAvg(), net, qmodel.policy, {})
    setting = Setting.of(qmodel, method, QUICK, num_classes=3, image_shape=(1, 6, 6))
    begun(setting, hospitals()).round(evaluate=False)
    outputs, labels, loss = seen[0]
    with torch.no_grad():
        soft = copy.deepcopy(net).eval()(outputs.images)
        hard = F.cross_entropy(outputs.logits, labels)
        expected = (1 - share) * hard + share * distillation(outputs.logits, soft)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_scales_of_what_a_client_keeps_are_fitted_to_its_own(
    tiny: Make, hospitals: Clients
) -> None:
    setting, _ = search_rounds(tiny())
    network = setting.network
    routes = {n: Route.LOCAL if ".head." in n else Route.SHARE for n in setting.routes}
    assert isinstance(network.model, QuantModel)
    before = network.state_dict()["model.net.hidden.weight_quant.tensor_quant.candidates.1.base"]
    before = before.clone()
    with torch.no_grad():
        network.model.weight("head").mul_(7)
        network.model.weight("hidden").mul_(7)
    fit_own_scales_(network, routes, [])
    fresh = network.model.new_weight_quantizer("head", 2)
    found = network.state_dict()
    assert torch.equal(
        found["model.net.head.weight_quant.tensor_quant.candidates.1.base"], fresh.base
    )
    assert torch.equal(
        found["model.net.hidden.weight_quant.tensor_quant.candidates.1.base"], before
    )
