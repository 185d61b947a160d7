"""Bits learned across clients: what is averaged and decided, and that no budget is exceeded."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fl
from fl.bits import ClientBudget, FederatedBits, Learning, PhasesConfig
from fl.client import answer
from fl.evaluation import primary
from fl.methods.fedavg import FedAvg
from fl.quant_network import fit_own_scales_, float_name, set_act_scales_, set_bits_
from fl.quant_rounds import ACTS, merged_scales
from fl.record import Failure, Record, Reply, Request
from fl.rounds import Rounds
from fl.run import InProcess
from fl.search_rounds import GROUP, SearchRounds, SearchRoundsConfig
from fl.setting import Setting
from fl.state import Route
from fl.store import Store
from fl.tune_rounds import TuneRounds, TuneRoundsConfig
from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.calibration import calibrate_
from sdq.config import QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.losses import distillation
from sdq.policy import BitwidthPolicy
from sdq.quant_model import QuantModel, quantize
from sdq.search_space import SearchSpace

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=2, lr=5e-3, batch_size=8, evaluate_every=100)
QUANT = QuantConfig(bit_choices=(1, 2, 4, 8), first_last_bits=None)
PHASES = PhasesConfig(search_rounds=2, tune_rounds=2)
OWN: dict[str, Any] = {"personal": {1: ClientBudget(Budget(avg_weight_bits=2.0))}}
SAMPLE = torch.zeros(1, 1, 6, 6)


def go(net: nn.Module, clients: list[fl.ClientData], **more: Any) -> FederatedBits:
    given = {"config": QUICK, "quant": QUANT, "budget": Budget(avg_weight_bits=3.0),
             "phases": PHASES} | more  # fmt: skip
    found = fl.run(net, clients=clients, num_classes=3, **given)
    assert isinstance(found, FederatedBits)
    return found


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
         "first_usage": torch.ones(1), "level": before["level"] * 0}
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
    # a client has no say in the level, and -1.25 decides nothing: beta is 0.22
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


def test_a_client_moves_no_level_and_stays_where_it_can_turn_back(
    tiny: Make, hospitals: Clients
) -> None:
    setting, _ = search_rounds(tiny(), bits=2.0)
    rounds = begun(setting, hospitals())
    (request,) = rounds.requests("train", [0], None, evaluate=False)
    for client in range(4):  # of other draws each
        reply, _ = answer(setting, hospitals()[0], replace(request, client=client), None)
        bits = reply.record.tensors[GROUP]
        assert torch.equal(bits["level"], request.record.tensors[GROUP]["level"])
        assert not torch.equal(bits["theta"], request.record.tensors[GROUP]["theta"])
        assert bits["theta"].gather(1, (bits["level"] - 1)[:, None]).abs().max() <= 4.0


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
    net: nn.Module, clients: list[fl.ClientData], *hidden: int
) -> tuple[Rounds, TuneRounds]:
    """Return the tuning with these bits in one layer, of the server and of clients 0, 1, ..."""
    qmodel = quantize(net, QUANT, sample=SAMPLE)
    of_all, *own = policies(qmodel, *hidden)
    set_act_scales_(qmodel, {})
    set_bits_(qmodel, of_all)
    config = TuneRoundsConfig(quant=QUANT, policy=of_all.to_json())
    method = TuneRounds(config, FedAvg(), net, of_all, dict(enumerate(own)))
    changed = QUICK.replaced(geometric=("*tensor_quant*",))
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


def test_bin_regularization_acts_after_its_share_of_the_rounds(
    tiny: Make, hospitals: Clients
) -> None:
    losses = {}
    for weight in (0.0, 5.0):
        phases = PHASES.replaced(bin_weight=weight, bin_warmup=0.5)
        found = go(
            tiny(), hospitals()[:1], rounds=0, phases=phases, policy=_four_bits(tiny()), budget=None
        )
        losses[weight] = [r["train_loss"] for r in found.history]
    assert losses[0.0][0] == losses[5.0][0]
    assert losses[5.0][1] > losses[0.0][1]


def _four_bits(net: nn.Module) -> BitwidthPolicy:
    policy = quantize(net, QUANT, sample=SAMPLE).policy
    return policy.with_weight_bits({b.name: 4 for b in policy})


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


def test_what_clients_kept_in_float_they_go_on_with(tiny: Make, hospitals: Clients) -> None:
    learning = Learning(
        tiny(), QUANT, Budget(avg_weight_bits=3.0), fl.method("fedper"), hospitals(), 3, QUICK,
        None, PHASES,
    )  # fmt: skip
    learning._float()
    kept = learning.done["float"].rounds.transport.store[1].model
    network = learning._float()
    qmodel = learning._quantized(network)
    setting = learning._setting(learning._search_method(network, qmodel), qmodel, "search")
    store = Store()
    learning._carry_over_(setting, store)
    name = "model.net.head.weight"
    assert float_name(name, setting.network) == "model.head.weight"
    assert torch.equal(store[1].model[name], kept["model.head.weight"])
    assert torch.equal(store[1].tensors["teacher"]["model.head.weight"], kept["model.head.weight"])
    assert not torch.equal(store[0].model[name], store[1].model[name])


# --- whole federations

QUICKLY = ("fedavg", "fca", "prr")
REFUSED = ("creff", "local")
OTHERS = [n for n in plugins.names("fl.methods") if n not in (*QUICKLY, *REFUSED)]
OF_MASKS = [n for n in OTHERS if fl.method(n).tasks == ("segmentation",)]


@pytest.mark.parametrize(
    "method",
    [
        *QUICKLY,
        *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS if name not in OF_MASKS),
    ],
)
def test_every_method_ends_within_all_budgets(method: str, tiny: Make, hospitals: Clients) -> None:
    personal = {1: ClientBudget(Budget(avg_weight_bits=1.7))} if method != "centralized" else {}
    phases = PHASES.replaced(search_rounds=1, tune_rounds=1)
    found = go(tiny(), hospitals(), method=method, rounds=1, phases=phases, personal=personal)
    assert 2.4 < found.policy.avg_weight_bits <= 3.0
    assert [*found.phases] == ["float", "search", "tune"]
    assert not [f for p in found.phases.values() for r in p.history for f in r["failures"]]
    for client, model in found.personal.items():
        assert client == 1
        assert 1.0 <= model.policy.avg_weight_bits <= 1.7
        assert primary(model.evaluation["test"])["num_examples"] == 9
    qmodel = quantize(tiny(), QUANT, sample=SAMPLE)
    for policy, state in (
        (found.policy, found.state), *((m.policy, m.state) for m in found.personal.values())
    ):  # fmt: skip
        alone = copy.deepcopy(qmodel)
        apply_policy_(alone, policy)
        alone.load_state_dict(state)
        assert alone.eval()(torch.randn(4, 1, 6, 6)).isfinite().all()
    rounds = [r for part in found.phases.values() for r in part.history]
    # before search and tuning each client told a scale, 4 bytes, for each of 3 activations
    clients = 1 if method == "centralized" else 3
    assert found.bytes_up == sum(r["bytes_up"] for r in rounds) + 2 * clients * 3 * 4


@pytest.mark.parametrize(
    "method",
    [
        "fedmix_seg",
        *(pytest.param(n, marks=pytest.mark.slow) for n in OF_MASKS if n != "fedmix_seg"),
    ],
)
def test_segmentation(method: str, tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    phases = PHASES.replaced(search_rounds=1, tune_rounds=1)
    found = go(tiny_maps(), hospitals_with_masks(), method=method, rounds=1, phases=phases)
    assert 2.4 < found.policy.avg_weight_bits <= 3.0
    assert not [f for p in found.phases.values() for r in p.history for f in r["failures"]]
    assert found.generalization is not None
    assert 0 <= found.generalization["dice"] <= 1


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_are_refused(method: str, tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match=f"{method}: bits must be learned with"):
        go(tiny(), hospitals(), method=method)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"budget": None}, "must have a budget or a policy, got neither"),
        ({"budget": Budget(avg_weight_bits=0.5)}, "average weight bits must be at least 1"),
        ({"personal": {3: ClientBudget(Budget(avg_weight_bits=2))}}, "of clients 0 to 2, got 3"),
        ({"personal": {1: ClientBudget(Budget(avg_weight_bits=0.5))}}, "must be at least 1"),
        ({"personal": {1: ClientBudget(Budget(avg_weight_bits=2), lambda s, u: ())}},
         "client 1: unit conv must have bits that its device computes with"),
        (OWN | {"phases": PHASES.replaced(search_method="random")}, "got random ones; use sdq"),
        (OWN | {"phases": PHASES.replaced(search=SearchConfig(granularity="channel"))},
         "must have one bitwidth a layer, got granularity channel"),
        ({"method": "fedper", "quant": QUANT.replaced(batch_norm="fold")},
         "must not be fold where clients keep tensors of their own, as with fedper"),
        ({"quant": None}, "budget, phases must stand with quant="),
    ],
)  # fmt: skip
def test_wrong_requests(more: dict[str, Any], message: str, tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match=message):
        go(tiny(), hospitals(), **more)


def test_a_given_policy_has_no_bits_for_single_clients(tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match="must follow from bits that are learned, got a policy"):
        go(tiny(), hospitals(), policy=_four_bits(tiny()), budget=None, **OWN)


def test_a_device_of_a_clients_own_gets_its_own_bitwidths(tiny: Make, hospitals: Clients) -> None:
    even = ClientBudget(Budget(avg_weight_bits=8), lambda space, unit: (2, 4))
    found = go(
        tiny(), hospitals(), personal={0: even}, phases=PHASES.replaced(personal_bits="own"),
        budget=lambda space: Budget(avg_weight_bits=3.0),
    )  # fmt: skip
    assert {b.weight_bits for b in found.personal[0].policy} == {4}  # the most that is legal


def test_without_data_and_without_rounds_in_float(tiny: Make, hospitals: Clients) -> None:
    net = tiny()
    found = go(
        net, hospitals(), rounds=0, phases=PHASES.replaced(search_method="uniform"),
        personal={2: ClientBudget(Budget(avg_weight_bits=2.5))},
    )  # fmt: skip
    assert {b.weight_bits for b in found.policy} == {2}
    assert {b.weight_bits for b in found.personal[2].policy} == {2}
    assert list(found.phases) == ["tune"]
    assert all(torch.equal(t, found.float_state[n]) for n, t in net.state_dict().items())


class Killed(Exception):
    pass


WHOLE: list[FederatedBits] = []
"""The undisturbed run, once made."""


@pytest.mark.parametrize(
    "at",
    [
        ("search", 0),
        ("tune", 0),
        *(pytest.param(at, marks=pytest.mark.slow) for at in (("float", 1), ("search", 1))),
    ],
)
def test_killed_in_any_phase_it_goes_on(
    at: tuple[str, int], tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    # each client keeps a head of its own; one is not asked in each round
    more = {"method": "fedper", "config": QUICK.replaced(participation=0.6),
            "personal": {1: ClientBudget(Budget(avg_weight_bits=1.7))}}  # fmt: skip

    def kill(summary: dict[str, Any]) -> None:
        if (summary["phase"], summary.get("round")) == at:
            raise Killed

    if not WHOLE:
        WHOLE.append(go(tiny(), hospitals(), **more))
    (whole,) = WHOLE
    with pytest.raises(Killed):
        go(tiny(), hospitals(), folder=tmp_path, watch=kill, **more)
    again = go(tiny(), hospitals(), folder=tmp_path, **more)
    assert again.policy == whole.policy
    assert again.course == whole.course
    assert again.history == whole.history
    assert again.personal[1].policy == whole.personal[1].policy
    pairs = [(again.state, whole.state), (again.personal[1].state, whole.personal[1].state)]
    for one, other in pairs:
        assert all(torch.equal(t, other[n]) for n, t in one.items())
