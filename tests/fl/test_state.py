"""Routes under each batch-norm policy, means of tensors, and the store."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import fl
from fl.record import Record, load, misfit, not_finite, save
from fl.setting import Setting
from fl.state import Route, weighted_mean
from fl.store import Store
from sdq.errors import RequestError, RunError

AFFINE = ["model.bn.weight", "model.bn.bias"]
STATISTICS = ["model.bn.running_mean", "model.bn.running_var", "model.bn.num_batches_tracked"]


@pytest.mark.parametrize(
    ("policy", "affine", "statistics"),
    [
        ("share_all", Route.SHARE, Route.SHARE),
        ("share_affine", Route.SHARE, Route.UPLOAD),
        ("local_stats", Route.SHARE, Route.LOCAL),
        ("local_all", Route.LOCAL, Route.LOCAL),
    ],
)
def test_batch_norm_policy(
    policy: str, affine: Route, statistics: Route, tiny: Callable[..., nn.Module]
) -> None:
    config = fl.FederationConfig(batch_norm=policy)  # type: ignore[arg-type]
    of = Setting.of(tiny(), fl.method("fedper"), config, num_classes=3, image_shape=(1, 6, 6))
    assert {of.routes[n] for n in AFFINE} == {affine}
    assert {of.routes[n] for n in STATISTICS} == {statistics}
    assert of.routes["model.head.weight"] is Route.LOCAL
    assert of.routes["model.conv.weight"] is Route.SHARE


def test_methods_own_policy_and_the_federations(tiny: Callable[..., nn.Module]) -> None:
    for config, route in (
        (fl.FederationConfig(), Route.LOCAL),
        (fl.FederationConfig(batch_norm="share_all"), Route.SHARE),
    ):
        of = Setting.of(tiny(), fl.method("pfa"), config, num_classes=3, image_shape=(1, 6, 6))
        assert of.routes["model.bn.weight"] is route
        assert of.routes["model.conv.weight"] is Route.HIGH_FREQUENCY_LOCAL
        assert of.routes["model.conv.bias"] is Route.SHARE


def test_weighted_mean() -> None:
    one = {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(7), "s": torch.tensor(1.0)}
    two = {"w": torch.tensor([4.0, 8.0]), "n": torch.tensor(10), "s": torch.tensor(8.0)}
    mean = weighted_mean([one, two], [1.0, 2.0], geometric=("s*",))
    torch.testing.assert_close(mean["w"], torch.tensor([3.0, 6.0]))
    # a count is that of the greater weight: no mean of integers exists
    assert mean["n"].dtype == torch.int64
    assert int(mean["n"]) == 10
    assert float(mean["s"]) == pytest.approx(4.0)  # (1 * 8 * 8) ** (1 / 3)


def test_mean_of_half_precision_keeps_its_dtype() -> None:
    states = [{"w": torch.full((3,), v, dtype=torch.bfloat16)} for v in (1.0, 2.0)]
    assert weighted_mean(states, [1, 1])["w"].dtype == torch.bfloat16


def test_record_in_a_file(tmp_path: Path) -> None:
    record = Record(
        {"model": {"a/b.c": torch.arange(3)}, "empty": {}}, {"n": 3, "nested": {"x": [1.5, None]}}
    )
    save(tmp_path / "r.safetensors", record)
    back = load(tmp_path / "r.safetensors")
    assert back.values == record.values
    assert back.tensors.keys() == record.tensors.keys()
    assert torch.equal(back.model["a/b.c"], torch.arange(3))
    with pytest.raises(RunError, match="JSON"):
        save(tmp_path / "r.safetensors", Record({}, {"x": float("nan")}))


def test_what_is_not_finite_or_does_not_fit() -> None:
    good = {"a": torch.zeros(2), "n": torch.tensor(3)}
    assert not_finite(Record({"model": good}, {"x": 1.0})) is None
    assert not_finite(Record({"g": {"a": torch.tensor([1.0, torch.inf])}})) == "g/a"
    # 3e38 twice has no sum in float32, and is finite all the same
    assert not_finite(Record({"g": {"a": torch.full((2,), 3e38)}})) is None
    assert not_finite(Record({}, {"x": {"y": [float("nan")]}})) == "values"
    assert misfit(good, good) is None
    assert "'n' is missing" in str(misfit({"a": good["a"]}, good))
    assert "'z' is unknown" in str(misfit({**good, "z": good["a"]}, good))
    assert "(3,)" in str(misfit({**good, "a": torch.zeros(3)}, good))
    assert "float64" in str(misfit({**good, "a": torch.zeros(2).double()}, good))


@pytest.mark.parametrize("on_disk", [False, True])
def test_store(on_disk: bool, tmp_path: Path) -> None:
    store = Store(tmp_path if on_disk else None)
    assert store.get(3) is None
    store.put(3, Record({"model": {"w": torch.ones(2)}}), 0)
    before = dict(store.index)
    store[3].model["w"].add_(1)  # what a client that crashes did to its state is not kept
    assert float(store[3].model["w"][0]) == 1.0
    store.put(3, Record({"model": {"w": torch.zeros(2)}}), 1)
    assert float(store[3].model["w"][0]) == 0.0
    if on_disk:
        # the round was not concluded: who goes on from the old index finds the old state
        assert float(Store(tmp_path, before)[3].model["w"][0]) == 1.0
        store.forget_old_()
        with pytest.raises(RequestError, match="client 3"):
            Store(tmp_path, before)


def test_a_record_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    tensors = {"model": {"w": torch.ones(2, 3).half(), "n": torch.tensor(7)},
               "none": {"x": torch.zeros(0, 3)}, "empty": {}}  # fmt: skip
    save(path, Record(tensors, {"round": 3, "name": "é"}))
    found = load(path)
    assert found.values == {"round": 3, "name": "é"}
    assert list(found.tensors) == ["model", "none", "empty"]
    assert torch.equal(found.tensors["model"]["w"], tensors["model"]["w"])
    data = path.read_bytes()
    for before, after in (
        (b'round\\": 3', b'round\\": 4'), (b'"sha256"', b'"sha25 "'), (data[-2:], b"\x12\x34"),
        (b'model/n"', b'model/m"'), (b'\\"none\\"', b'\\"more\\"'),
    ):  # fmt: skip
        assert before in data
        path.write_bytes(after.join(data.rsplit(before, 1)))
        with pytest.raises(RequestError, match=r"state\.safetensors: must be a record as it was"):
            load(path)
