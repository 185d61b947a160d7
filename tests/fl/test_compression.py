"""Codes of a few bits, and both ends of an exchange: what each has of the other stays equal."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Size, Tensor, nn

import fl
from fl.channel import MODEL, RESIDUAL, UPLOADS, ClientEnd
from fl.compression import (
    CODES,
    STEPS,
    Codec,
    CompressionConfig,
    dequantize,
    pack,
    quantize,
    unpack,
)
from fl.method import Client
from fl.methods.fedavg import FedAvg
from fl.record import Failure, Record, Reply, Request
from fl.rounds import Rounds
from fl.run import InProcess
from fl.setting import Setting
from fl.store import Store
from sdq.errors import RequestError, RunError

Clients = Callable[..., list[fl.ClientData]]
Make = Callable[..., nn.Module]
CONFIG = fl.FederationConfig(
    rounds=3, lr=5e-3, batch_size=8, participation=0.6, compress=CompressionConfig(up=3, down=4)
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- codes


@pytest.mark.parametrize(
    ("bits", "error"), [(1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154), (5, 0.003495)]
)
def test_error_of_a_normal_variable(bits: int, error: float) -> None:
    """Max, "Quantizing for minimum distortion", 1960, table II: equally spaced levels."""
    x = normal(400_000)
    found = dequantize(*quantize(x, bits), bits)
    # a few clipping points are tried, not all
    assert float((found - x).square().mean() / x.square().mean()) == pytest.approx(error, rel=0.08)


def test_codes_by_hand() -> None:
    """Two bits: levels of -1.5, -0.5, 0.5 and 1.5 steps."""
    codes, step = quantize(torch.tensor([-3.0, -1.0, 1.0, 3.0]), 2)
    assert codes.tolist() == [0, 1, 2, 3]
    assert float(step) == pytest.approx(2.0)
    assert dequantize(codes, step, 2).tolist() == pytest.approx([-3.0, -1.0, 1.0, 3.0])
    # one bit: the sign, and the mean magnitude
    codes, step = quantize(torch.tensor([-3.0, 0.5, 1.0]), 1)
    assert dequantize(codes, step, 1).tolist() == pytest.approx([-1.5, 1.5, 1.5])


@given(
    st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False), min_size=1, max_size=40
    ).filter(lambda values: max(map(abs, values)) > 1e-30),
    st.integers(1, 8),
)
def test_codes_come_nearer_and_survive_packing(values: list[float], bits: int) -> None:
    x = torch.tensor(values)
    codes, step = quantize(x, bits)
    found = dequantize(codes, step, bits).double()
    # or error feedback would not be paid back
    assert (found - x).square().sum() < x.double().square().sum()
    packed = pack(codes, bits)
    assert len(packed) == -(-len(values) * bits // 8)
    assert torch.equal(unpack(packed, bits, x.shape), codes)


def test_error_feedback_pays_back() -> None:
    """What is sent in T rounds is T times the change, but for what one round leaves over."""
    codec = Codec({"w": Size((2000,))}, {"w": 1})
    change, rest, total = normal(2000), torch.zeros(2000), torch.zeros(2000)
    errors = []
    for count in range(1, 65):
        value = {"w": change + rest}
        sent = codec.decode(codec.encode(value))["w"]
        rest = value["w"] - sent
        total += sent
        errors.append(float((total / count - change).norm() / change.norm()))
    assert errors[0] == pytest.approx(0.6, abs=0.02)  # the root of 0.3634
    assert errors[-1] < 0.12  # without feedback it would stay where it was


def test_a_client_sends_what_it_owes(tiny: Make) -> None:
    """No change of its own, and .25 left over for every number, which one bit says exactly."""
    config = CONFIG.replaced(compress=CompressionConfig(up=1, down=None, tensor_bits={"*": 1}))
    of = Setting.of(tiny(), fl.method("fedavg"), config, num_classes=3, image_shape=(1, 6, 6))
    model = {name: of.initial[name] for name in of.names(down=True)}
    request = Request("train", 0, 0, Record({"model": model}))
    shapes = ClientEnd(of, request, None).codecs.up.shapes
    owed = {name: torch.full_like(of.initial[name], 0.25) for name in shapes}
    end = ClientEnd(of, request, Record({RESIDUAL: owed}))
    groups, keeps = end.sent(model)
    for name, tensor in end.codecs.up.decode(groups).items():
        torch.testing.assert_close(tensor, owed[name])
    assert all(not tensor.any() for tensor in keeps.tensors[RESIDUAL].values())


def test_what_is_zero_is_not_sent() -> None:
    codec = Codec.of({"a": torch.zeros(2000), "b": torch.zeros(3)}, 2, {})
    assert codec.bits == {"a": 2, "b": 8}  # a small tensor
    groups = codec.encode({"a": normal(2000), "b": torch.zeros(3)})
    assert {n: len(t) for n, t in groups[CODES].items()} == {"a": 500}
    assert groups[STEPS]["steps"].shape == (1,)
    assert torch.equal(codec.decode(groups)["b"], torch.zeros(3))


def test_bits_of_single_tensors() -> None:
    tensors = {
        "model.a": torch.zeros(2000),
        "model.b": torch.zeros(5),
        "model.c": torch.zeros(2000),
    }
    codec = Codec.of(tensors, 4, {"*.a": 1, "model.[ab]": 2})
    assert codec.bits == {"model.a": 1, "model.b": 2, "model.c": 4}


def test_what_is_not_finite_is_refused() -> None:
    codec = Codec({"w": Size((3,))}, {"w": 4})
    for wrong in (torch.nan, torch.inf):
        groups = codec.encode({"w": torch.tensor([1.0, wrong, 2.0])})
        with pytest.raises(RunError, match="NaN or infinite"):
            codec.decode(groups)


def test_the_option(refuses: Callable[..., Any]) -> None:
    assert CompressionConfig.parsed("3") == CompressionConfig(up=3, down=3)
    assert CompressionConfig.parsed("down=8") == CompressionConfig(up=None, down=8)
    assert CompressionConfig.parsed("policy") == CompressionConfig(policy_bits=True)
    both = CompressionConfig(up=2, down=None, policy_bits=True)
    assert (
        CompressionConfig.parsed("up=2,policy") == CompressionConfig.parsed("policy,up=2") == both
    )
    for wrong in ("", "0", "9", "up=x", "up=2,left=3", "3.5", "4,", "policy,policy", "4,police"):
        with refuses("--compress: must be BITS", repr(wrong), "try --compress 4"):
            CompressionConfig.parsed(wrong)
    with pytest.raises(RequestError, match=r"CompressionConfig.tensor_bits.x"):
        CompressionConfig(tensor_bits={"x": 9})


# --- federations


def test_bits_of_a_policy_need_one(tiny: Make, hospitals: Clients, refuses: Any) -> None:
    with refuses("compress.policy_bits: must be off where no bits are learned", "--compress 4"):
        prepared(tiny(), hospitals(), "fedavg", compress=CompressionConfig(policy_bits=True))


def prepared(net: nn.Module, data: list[fl.ClientData], method: Any, **over: Any) -> Any:
    chosen = fl.method(method) if isinstance(method, str) else method
    config = CONFIG.replaced(**over)
    setting = Setting.of(net, chosen, config, num_classes=3, image_shape=(1, 6, 6))
    store = Store()
    return Rounds(setting, InProcess(setting, data, store), len(data)), store


class FailsOnce(Client):
    """Client 1 dies in round 2 of training."""

    def start(self) -> None:
        if (self.context.client, self.context.round) == (1, 1):
            raise RunError("it died")


class FailsOnceMethod(FedAvg):
    client_type = FailsOnce


@pytest.mark.parametrize("method", ["fedavg", "fca", "pfa", FailsOnceMethod()])
@pytest.mark.parametrize("participation", [0.6, 1.0])
def test_both_ends_have_the_same(
    method: Any, participation: float, tiny: Make, hospitals: Clients
) -> None:
    rounds, store = prepared(tiny(), hospitals(), method, rounds=6, participation=participation)
    rounds.begin()
    for _ in range(6):
        report = rounds.round(evaluate=False)
        ours = rounds.end.references
        assert set(ours.index) >= set(report.replied)
        assert not set(ours.index) & {f.client for f in report.failures}
        for client in ours.index:
            theirs = store[client].tensors
            for group, of in (("model", MODEL), ("uploads", UPLOADS)):
                assert ours[client].tensors[group].keys() == theirs[of].keys()
                for name, tensor in ours[client].tensors[group].items():
                    assert torch.equal(tensor, theirs[of][name])
            if method == "fca":
                assert any("personal_head" in n for n in theirs[UPLOADS])


def test_bytes_by_hand(tiny: Make, hospitals: Clients) -> None:
    """Every message of the second round: packed codes, a step for each, statistics in float."""
    net = tiny()
    rounds, _ = prepared(net, hospitals(), "fedavg", participation=1.0)
    parameters = [p.numel() for p in net.parameters()]
    assert max(parameters) < 1024  # all have 8 bits
    exact = sum(b.nbytes for b in net.buffers())
    codes = sum(parameters) + 4 * len(parameters)
    rounds.begin()
    first, second = rounds.round(evaluate=False), rounds.round(evaluate=False)
    # in the first nothing comes down that a client does not have
    assert (first.bytes_down, first.bytes_up) == (3 * exact, 3 * (codes + exact))
    assert (second.bytes_down, second.bytes_up) == (3 * (codes + exact), 3 * (codes + exact))


def test_eight_bits_end_where_float_does(tiny: Make, hospitals: Clients) -> None:
    def go(compress: CompressionConfig | None) -> fl.Federated:
        config = CONFIG.replaced(
            rounds=4, participation=1.0, evaluate_every=9, optimizer="sgd", lr=0.1,
            compress=compress,
        )  # fmt: skip
        return fl.run(tiny(), clients=hospitals(), num_classes=3, config=config)

    plain, eight = go(None), go(CompressionConfig(up=8, down=8))
    one = go(CompressionConfig(up=1, down=1, tensor_bits={"*": 1}))

    def way(found: fl.Federated, start: dict[str, Tensor]) -> float:
        names = [n for n, _ in tiny().named_parameters()]
        return float(torch.cat([(found.state[n] - start[n]).flatten() for n in names]).norm())

    assert way(eight, plain.state) < 0.02 * way(plain, tiny().state_dict())
    assert way(eight, plain.state) < 0.2 * way(one, plain.state)
    assert one.history[-1]["train_loss"] < one.history[0]["train_loss"]


@pytest.mark.parametrize("method", ["fedavg", "fca", "scaffold", "prr"])
def test_a_federation_goes_on_where_it_was(
    method: str, tiny: Make, hospitals: Clients, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    trained: list[str] = []

    def kill(kind: str, answer: Reply | Failure) -> None:
        """In the middle of the second round, two clients a round."""
        trained.extend([kind] if kind == "train" else [])
        if len(trained) == 3:
            raise Killed

    def go(**more: Any) -> fl.Federated:
        return fl.run(
            tiny(), method=method, clients=hospitals(), num_classes=3,
            config=CONFIG.replaced(evaluate_every=3), **more,
        )  # fmt: skip

    whole = go()
    assert all(not r["failures"] for r in whole.history)
    with pytest.raises(Killed):
        go(folder=tmp_path, hear=kill)
    again = go(folder=tmp_path)
    assert all(torch.equal(t, whole.state[n]) for n, t in again.state.items())
    assert json.dumps(again.history) == json.dumps(whole.history)


class Spoiling(InProcess):
    """Client 1's replies are changed on their way."""

    spoil: Callable[[Record], Record]

    def ask(self, requests: Iterable[Request]) -> Iterator[Reply | Failure]:
        for answer in super().ask(requests):
            if isinstance(answer, Reply) and answer.client == 1 and answer.record.tensors:
                answer = replace(answer, record=self.spoil(answer.record.copy()))
            yield answer


def short(record: Record) -> Record:
    name = next(iter(record.tensors[CODES]))
    record.tensors[CODES][name] = record.tensors[CODES][name][:-1]
    return record


def unknown(record: Record) -> Record:
    record.tensors[CODES]["model.other"] = torch.zeros(3, dtype=torch.uint8)
    return record


def no_steps(record: Record) -> Record:
    del record.tensors[STEPS]
    return record


def infinite(record: Record) -> Record:
    record.tensors[STEPS]["steps"][0] = torch.inf
    return record


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(short, "instead of torch.uint8"), (unknown, "'model.other' is unknown"),
     (no_steps, "'steps' is missing"), (infinite, "NaN or infinite")],
)  # fmt: skip
def test_wrong_codes_are_named(
    spoil: Callable[[Record], Record], reason: str, tiny: Make, hospitals: Clients
) -> None:
    rounds, store = prepared(tiny(), hospitals(), "fedavg", participation=1.0)
    rounds.transport = Spoiling(rounds.setting, hospitals(), store)
    rounds.transport.spoil = spoil
    rounds.begin()
    for _ in range(2):
        report = rounds.round(evaluate=False)
        assert report.replied == [0, 2]
        assert reason in report.failures[0].reason


def test_a_client_that_lost_its_state_is_caught_up(tiny: Make, hospitals: Clients) -> None:
    rounds, store = prepared(tiny(), hospitals(), "fedavg", participation=1.0)
    rounds.begin()
    rounds.round(evaluate=False)
    store.drop(1)  # its disk is new
    report = rounds.round(evaluate=False)
    assert [f.client for f in report.failures] == [1]
    assert "which it does not have; the next will not be" in report.failures[0].reason
    assert rounds.round(evaluate=False).replied == [0, 1, 2]


@pytest.mark.parametrize("method", ["fedavg", "fca", "scaffold", "prr"])
def test_apps_send_the_same_bytes(method: str, tiny: Make, hospitals: Clients) -> None:
    pytest.importorskip("flwr")
    from fl import apps
    from fl.grid import InProcessGrid, run_apps

    data, done = hospitals(), []

    def setting() -> Setting:
        return Setting.of(
            tiny(), fl.method(method), CONFIG, num_classes=3, image_shape=(1, 6, 6)
        )  # fmt: skip

    test = tuple(c.test for c in data if c.test is not None)
    server = apps.server_app(
        lambda config: apps.Federation(setting(), 3, test), lambda found, config: done.append(found)
    )
    client = apps.client_app(lambda k, run, node: apps.Hospital(setting(), data[k]))
    run_apps(server, InProcessGrid(client, 3), {})
    expected = fl.run(tiny(), method=method, clients=data, num_classes=3, config=CONFIG)
    assert all(torch.equal(done[0].state[n], t) for n, t in expected.state.items())
    assert (done[0].bytes_up, done[0].bytes_down) == (expected.bytes_up, expected.bytes_down)
