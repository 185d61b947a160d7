"""What holds for any value: quantizers, packed codes, option texts, divisions."""

import contextlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fl import count_tables
from fl.clients import Partition
from fl.partition import by_shares, dirichlet_with_shares
from sdq.data import ArrayImages, ImageSet, Splits, divide
from sdq.errors import RequestError
from sdq.policy import BitwidthPolicy, LayerBits
from sdq.quantizers import code_range
from sdq.split_file import apply_split_file

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # typer uses names that click deprecates
    from sdq.cli import options
    from sdq.cli.clients import ClientRequest
    from sdq.cli.device import DeviceRequest

FEW = settings(max_examples=60)
TEXTS = st.text(max_size=30) | st.from_regex(r"[a-z.*]{0,6}[=:][-0-9.,einfa]{0,8}", fullmatch=True)

# -------------------------------------------------------------------------------------- policies


@st.composite
def layers(draw: st.DrawFn) -> LayerBits:
    """Any layer that may be, with bits of single channels or without."""
    channels = draw(st.none() | st.lists(st.integers(1, 8), min_size=1, max_size=6))
    each = draw(st.integers(1, 50))
    return LayerBits(
        draw(st.text(min_size=1, max_size=8)),
        max(channels) if channels else draw(st.sampled_from([*range(1, 9), 32])),
        draw(st.sampled_from([*range(2, 9), 16, 32])),
        draw(st.booleans()),
        each * len(channels or [1]),
        tuple(channels) if channels else None,
    )


policies = st.lists(layers(), max_size=5, unique_by=lambda x: x.name).map(
    lambda found: BitwidthPolicy(tuple(found))
)


@FEW
@given(policies)
def test_any_legal_policy_survives_its_file(policy: BitwidthPolicy) -> None:
    again = BitwidthPolicy.from_json(policy.to_json())
    assert again == policy
    assert again.weight_bytes * 8 == sum(x.total_weight_bits for x in policy)
    low = min((min(x.channel_bits or (x.weight_bits,)) for x in policy), default=0)
    high = max((x.weight_bits for x in policy), default=0)
    assert low <= policy.avg_weight_bits_all <= high


@FEW
@given(policies, st.data())
def test_changed_bits_change_these_layers_alone(
    policy: BitwidthPolicy, data: st.DataObject
) -> None:
    names = [x.name for x in policy]
    some = st.lists(st.sampled_from(names), unique=True) if names else st.just([])
    chosen = {name: data.draw(st.integers(1, 8)) for name in data.draw(some)}
    changed = policy.with_weight_bits(chosen)
    assert [x.name for x in changed] == names
    for before, after in zip(policy, changed, strict=True):
        if before.name in chosen:
            assert (after.weight_bits, after.channel_bits) == (chosen[before.name], None)
            assert (after.act_bits, after.searched) == (before.act_bits, before.searched)
        else:
            assert after == before
    assert policy.with_weight_bits({}) == policy


@FEW
@given(st.integers(-2, 40), st.integers(-2, 40), st.integers(-2, 10))
def test_a_layer_is_legal_or_refused(weight: int, act: int, count: int) -> None:
    legal = weight in (*range(1, 9), 32) and act in (*range(2, 9), 16, 32) and count > 0
    with contextlib.nullcontext() if legal else pytest.raises(RequestError):
        LayerBits("a", weight, act, True, count)


# ---------------------------------------------------------------------------------- packed codes


@FEW
@given(st.sampled_from([2, 4]), st.data())
def test_packed_codes_unpack_to_themselves(bits: int, data: st.DataObject) -> None:
    onnx = pytest.importorskip("onnx")
    from export import graph, packed

    low, high = code_range(bits, True)
    shape = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = int(np.prod(shape))
    codes = np.array(data.draw(st.lists(st.integers(low, high), min_size=count, max_size=count)))
    kind = {v: k for k, v in graph.PACKED.items()}[bits]
    proto = packed._packed(codes.reshape(shape), kind, "x")
    assert len(proto.raw_data) == graph.tensor_bytes(proto) == -(-count * bits // 8)
    # onnx's own reader is the reference
    found = onnx.numpy_helper.to_array(proto).astype(np.int8)
    assert found.tolist() == codes.reshape(shape).tolist()


# ------------------------------------------------------------------------------------ option texts


def refusal(read: Callable[[], object]) -> str | None:
    """Return what is refused; None if nothing is."""
    try:
        read()
    except RequestError as error:
        return str(error)
    return None


@settings(max_examples=200)
@given(TEXTS)
def test_option_texts_are_read_or_refused_by_name(text: str) -> None:
    """Nothing but a RequestError that names the option, whatever was typed."""
    readers = {
        "--split": lambda: options.numbers(text, "--split"),
        "--choices": lambda: options.integers(text, "--choices"),
        "--pin": lambda: options.rules([text], "--pin"),
        "--budget": lambda: DeviceRequest.of("pynq_z2", None, None, [text]),
        "--partition": lambda: Partition.parsed(text),
        "--clients": lambda: ClientRequest.of(text or "x", None),
    }
    for option, read in readers.items():
        message = refusal(read)
        # of costs that a device has not, the device says so
        assert message is None or option in message or option == "--budget"


@FEW
@given(st.lists(st.integers(-99, 99), min_size=1), st.lists(st.floats(-1e9, 1e9), min_size=1))
def test_numbers_read_back_as_they_were_written(whole: list[int], real: list[float]) -> None:
    assert options.integers(",".join(map(str, whole)), "--x") == tuple(whole)
    assert options.numbers(",".join(map(repr, real)), "--x") == tuple(real)


@FEW
@given(st.floats(0.01, 100))
def test_dirichlet_is_read_back(alpha: float) -> None:
    assert Partition.parsed(f"dirichlet:{alpha!r}") == Partition("dirichlet", alpha=alpha)


# ---------------------------------------------------------------------------------------- divisions


@FEW
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 99),
    st.tuples(st.floats(0.1, 1), st.floats(0, 1), st.floats(0, 1)),
)  # fmt: skip
def test_a_division_has_every_image_once(
    labels: list[int], seed: int, shares: tuple[float, float, float]
) -> None:
    y = torch.tensor(labels)
    parts = divide(y, shares, seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    assert set(y[parts[0]].tolist()) == set(labels)  # no class is lost to training


@FEW
@given(st.sampled_from(sorted(count_tables.TABLES)), st.integers(1, 8), st.integers(0, 99))
def test_a_published_table_divides_every_class_whole(name: str, classes: int, seed: int) -> None:
    y = torch.arange(120) % classes
    shares = count_tables.shares(name, y)
    assert shares.shape == (classes, len(count_tables.TABLES[name]))
    np.testing.assert_allclose(shares.sum(1), 1)
    parts = by_shares(y, shares, seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(120))
    counts = sum(torch.bincount(y[p], minlength=classes) for p in parts)
    assert torch.equal(counts, torch.bincount(y))


@FEW
@given(st.integers(2, 5), st.floats(0.5, 10), st.integers(0, 99))
def test_the_shares_of_a_draw_divide_another_set_alike(
    clients: int, alpha: float, seed: int
) -> None:
    y = torch.arange(300) % 3
    parts, shares = dirichlet_with_shares(y, clients, alpha, seed)
    again = by_shares(torch.arange(30) % 3, shares, seed)
    assert torch.cat(again).sort().values.tolist() == list(range(30))
    for k, (part, small) in enumerate(zip(parts, again, strict=True)):
        for c in range(3):  # each cut is rounded once
            assert abs(int((y[part] == c).sum()) - 100 * shares[c, k]) <= 1
            assert abs(int(((torch.arange(30) % 3)[small] == c).sum()) - 10 * shares[c, k]) <= 1


@FEW
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=9, max_size=9))
def test_a_split_file_gives_each_image_to_whom_it_says(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]]
) -> None:
    rows[0] = (rows[0][0], 0)  # somebody trains
    pixels = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1)
    splits = Splits(ImageSet(ArrayImages(pixels), torch.arange(9) % 2), None, None, ("a", "b"))
    path = Path(tmp_path_factory.mktemp("s")) / "SPLIT.csv"
    text = io.StringIO("index,client,split\n")
    text.seek(0, io.SEEK_END)
    names = ("train", "val", "test")
    text.writelines(f"{i},h{c},{names[p]}\n" for i, (c, p) in enumerate(rows))
    path.write_text(text.getvalue())
    found = apply_split_file(path, splits)
    for part in names:
        expected = {(i, f"h{c}") for i, (c, p) in enumerate(rows) if names[p] == part}
        images = getattr(found, part)
        got = set()
        if images is not None:
            places = images.images.take(torch.arange(len(images))).flatten().tolist()
            got = {(i, found.centre_names[c]) for i, c in zip(places, images.centres, strict=True)}
        assert got == expected
