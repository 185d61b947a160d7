"""Bits learned across clients, whole federations: no budget is exceeded, phases follow."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fl
import sdq
from fl.bits import ClientBudget, FederatedBits, PhasesConfig
from fl.compression import CompressionConfig
from fl.evaluation import primary
from fl.opening import Opening
from fl.phases import Learning, learning
from fl.quant_network import float_name
from fl.setting import centred
from fl.tune_rounds import TuneRounds
from sdq import plugins
from sdq.apply_policy import apply_policy_
from sdq.batches import Batches
from sdq.config import QuantConfig, SearchConfig
from sdq.cost import Budget
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy
from sdq.quant_model import quantize

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


def learner(net: nn.Module, clients: list[fl.ClientData], **more: Any) -> Learning:
    """Return a federation whose clients keep heads of their own."""
    return learning(
        net, quant=QUANT, budget=Budget(avg_weight_bits=3.0), method="fedper", clients=clients,
        num_classes=3, config=QUICK, **{"phases": PHASES, **more},
    )  # fmt: skip


def _four_bits(net: nn.Module) -> BitwidthPolicy:
    policy = quantize(net, QUANT, sample=SAMPLE).policy
    return policy.with_weight_bits({b.name: 4 for b in policy})


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


@pytest.mark.parametrize("method", ["fca", "fedper"])
def test_a_client_s_own_model_is_what_was_measured(
    method: str, tiny: Make, hospitals: Clients
) -> None:
    """With a head at the client's own bits, not at everyone's."""
    clients = hospitals((9, 8, 8), (9, 8, 8), (9, 8, 8))
    found = go(
        tiny(), clients, method=method, rounds=1, budget=Budget(avg_weight_bits=8.0),
        phases=PHASES.replaced(search_rounds=1, tune_rounds=2),
        personal={1: ClientBudget(Budget(avg_weight_bits=1.5))},
    )  # fmt: skip
    own = found.personal[1]
    alone = quantize(tiny(), QUANT, sample=SAMPLE)
    apply_policy_(alone, own.policy)
    alone.load_state_dict(own.state)
    heads = [b.weight_bits for b in own.policy if b.name == "head"]
    assert heads[0] < 8
    metrics = sdq.evaluate(alone, Batches(clients[1].test, centred(1)))
    told = primary(own.evaluation["test"])
    assert {k: metrics[k] for k in ("accuracy", "auc", "ece")} == pytest.approx(
        {k: told[k] for k in ("accuracy", "auc", "ece")}
    )


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
        ({"quant": QUANT.replaced(batch_norm="fold"),
          "phases": PHASES.replaced(tune_from="search")},
         "must not be fold where tuning starts from the search's weights"),
        ({"quant": None}, "budget, phases must stand with quant="),
    ],
)  # fmt: skip
def test_wrong_requests(more: dict[str, Any], message: str, tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match=message):
        go(tiny(), hospitals(), **more)


def test_a_given_policy_has_no_bits_for_single_clients(tiny: Make, hospitals: Clients) -> None:
    with pytest.raises(RequestError, match="must follow from bits that are learned, got a policy"):
        go(tiny(), hospitals(), policy=_four_bits(tiny()), budget=None, **OWN)


def test_bits_of_the_policy_count_once_there_is_one(tiny: Make, hospitals: Clients) -> None:
    """Eight bits in all three phases, and in the third the policy's: at most two for a weight."""
    eight = CompressionConfig(up=8, down=8)
    sizes = {}
    for policy in (False, True):
        config = QUICK.replaced(compress=eight.replaced(policy_bits=policy))
        found = go(tiny(), hospitals(), config=config, budget=Budget(avg_weight_bits=2.0))
        sizes[policy] = {n: (r.bytes_up, r.bytes_down) for n, r in found.phases.items()}
    assert sizes[True]["float"] == sizes[False]["float"]
    assert sizes[True]["search"] == sizes[False]["search"]
    weights = sum(b.num_weights for b in found.policy)
    saved = [a - b for a, b in zip(sizes[False]["tune"], sizes[True]["tune"], strict=True)]
    # three clients, two rounds up; down one, since the first model is the phase's own
    assert saved[0] >= 6 * (0.75 * weights - len(found.policy.layers))
    assert saved[1] >= 3 * (0.75 * weights - len(found.policy.layers))


def test_decays_of_the_float_phase_are_its_own(tiny: Make, hospitals: Clients) -> None:
    """Tuned for eight rounds the rate falls at the fourth and the sixth, to 0.3 and 0.09."""
    config = QUICK.replaced(lr=1.0, lr_decay=0.5, lr_decay_rounds=(1,), lr_decay_every=3)
    found = learning(
        tiny(), quant=QUANT, budget=Budget(avg_weight_bits=3.0), clients=hospitals(),
        num_classes=3, config=config, rounds=4, phases=PHASES.replaced(tune_rounds=8),
    )  # fmt: skip
    rates = {n: [s.config.lr_in(r) for r in range(8)] for n, s in found.check().items()}
    assert rates["float"][:4] == [1.0, 0.5, 0.5, 0.25]
    assert set(rates["search"]) == {1.0}
    assert rates["tune"] == pytest.approx([1.0] * 4 + [0.3] * 2 + [0.09] * 2)


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


def test_no_search_starts_where_all_images_would_be_needed() -> None:
    with pytest.raises(RequestError, match="must be budget or highest in a federation"):
        PHASES.replaced(search=SearchConfig(start="hessian"))


def test_nothing_to_search(hospitals: Clients) -> None:
    """Both layers are first and last, with bits that are given: there are no rounds of search."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    found = go(net, hospitals(), quant=QuantConfig(), budget=Budget(avg_weight_bits=8.0))
    assert [b.weight_bits for b in found.policy] == [8, 8]
    assert set(found.phases) == {"float", "tune"}


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


def test_what_clients_kept_in_float_they_go_on_with(tiny: Make, hospitals: Clients) -> None:
    going = learner(tiny(), hospitals())
    network = going._float()
    kept = going.done["float"].rounds.transport.store[1].model
    opening = Opening("search", network)
    setting = going.settings.setting(opening)
    store = going.sites.open(opening, setting, None).store
    name = "model.net.head.weight"
    assert float_name(name, setting.network) == "model.head.weight"
    assert torch.equal(store[1].model[name], kept["model.head.weight"])
    assert torch.equal(store[1].tensors["teacher"]["model.head.weight"], kept["model.head.weight"])
    assert not torch.equal(store[0].model[name], store[1].model[name])


def test_tuning_goes_on_from_the_search(tiny: Make, hospitals: Clients) -> None:
    """The server's weights and a client's own head are the search's; the teacher is in float."""
    going = learner(tiny(), hospitals(), phases=PHASES.replaced(tune_from="search"))
    done = going.go()
    tune, search = going.done["tune"], done.phases["search"].state
    before = learner(tiny(), hospitals()).go()
    assert done.course == before.course
    name = "net.conv.weight"
    assert torch.equal(tune.setting.initial[f"model.{name}"], search[name])
    assert not torch.equal(search[name], done.float_state["conv.weight"])
    method = tune.setting.method
    assert isinstance(method, TuneRounds)
    assert torch.equal(method._first["conv.weight"], done.float_state["conv.weight"])
    searched = going.done["search"].rounds.transport.store[1].model["model.net.head.weight"]
    opening = Opening(
        "tune", done.float_state, done.policy, start=going._searched(done.float_state)
    )
    store = going.sites.open(opening, tune.setting, None).store
    assert torch.equal(store[1].model["model.net.head.weight"], searched)
    # the weights of the search are sent to each client once, as the float model is
    size = sum(t.nbytes for t in done.float_state.values())
    assert done.bytes_down == before.bytes_down + 3 * size


def test_heads_of_the_search_are_kept_without_a_float_phase(tiny: Make, hospitals: Clients) -> None:
    going = learner(tiny(), hospitals(), rounds=0, phases=PHASES.replaced(tune_from="search"))
    done = going.go()
    name = "model.net.head.weight"
    searched = going.done["search"].rounds.transport.store[1].model[name]
    opening = Opening(
        "tune", done.float_state, done.policy, start=going._searched(done.float_state)
    )
    store = going.sites.open(opening, going.done["tune"].setting, None).store
    assert torch.equal(store[1].model[name], searched)
    assert not torch.equal(store[0].model[name], searched)


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


def test_clients_have_models_of_their_own_where_no_layer_is_searched(hospitals: Clients) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
    quant = QuantConfig(bit_choices=(2, 4), first_last_bits=8)
    enough = Budget(avg_weight_bits=8.0)
    found = go(
        net, hospitals(), quant=quant, rounds=1, phases=PHASES.replaced(tune_rounds=1),
        budget=enough, personal={1: ClientBudget(enough)},
    )  # fmt: skip
    assert list(found.personal) == [1]
    assert found.personal[1].policy == found.policy
