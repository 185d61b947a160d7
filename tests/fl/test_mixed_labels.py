"""Segmentation with mixed labels: weights, labels that networks make, and masks nobody sees."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fl
from fl.client import _context, answer
from fl.evaluation import evaluate
from fl.method import ClientData, SitsOut, Supervision
from fl.methods import fedmix_seg, fedst
from fl.record import Record, Reply, Request
from fl.setting import Setting
from fl.supervision import parsed, weakened
from sdq.data import ArrayImages, ImageSet
from sdq.segmentation import soft_dice

Clients = Callable[..., list[ClientData]]
Make = Callable[..., nn.Module]
QUICK = fl.FederationConfig(rounds=2, lr=1e-2, batch_size=8, evaluate_every=100)


def levels(clients: list[ClientData], *wanted: Supervision) -> list[ClientData]:
    return [weakened(c, level, 3, 0) for c, level in zip(clients, wanted, strict=True)]


class Threshold(nn.Module):
    """A map for each of two channels: where the pixel is above a threshold that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.threshold) * 20


def squares(*sides: tuple[int, int]) -> Tensor:
    """Return images ``(N, 2, 8, 8)`` with a bright square of that side in each channel."""
    pixels = torch.zeros(len(sides), 2, 8, 8, dtype=torch.uint8)
    for image, pair in zip(pixels, sides, strict=True):
        for channel, side in zip(image, pair, strict=True):
            channel[1 : 1 + side, 1 : 1 + side] = 255
    return pixels


def masks_of(pixels: Tensor) -> Tensor:
    """Return a label map of the channels, of which the second lies above the first."""
    return torch.where(pixels[:, 1:] > 0, 2, (pixels[:, :1] > 0).to(torch.uint8)).to(torch.uint8)


def started(
    data: ClientData, second: float = 0.0, **hyper: Any
) -> tuple[fedmix_seg.FedMixSegClient, Setting]:
    """Return a client of two classes after its labels are made, and its setting.

    Pixels are -1 or 1; the second network's threshold is ``second``.
    """
    method = fl.method("fedmix_seg", **hyper)
    setting = Setting.of(Threshold(), method, QUICK, num_classes=2, image_shape=(2, 8, 8))
    setting.network.extras["second"].threshold.data.fill_(second)
    request = Request("train", 0, 0, Record({}, {"class_counts": [1.0]}))
    client = method.client(_context(setting, data, request, None))
    client.start()
    return client, setting


@pytest.mark.parametrize(
    ("loss_weight", "power", "expected"),
    [
        (10, 1.5, [0.5446, 0.3272, 0.1282]),
        (10, 3, [0.7030, 0.2443, 0.0527]),
        (2, 3, [0.5775, 0.3032, 0.1193]),
        (0, 3, [100 / 430, 200 / 430, 130 / 430]),
    ],
)
def test_adaptive_weights(loss_weight: float, power: float, expected: list[float]) -> None:
    found = fedmix_seg.adaptive_weights([100, 200, 130], [0.3, 0.2, 0.1], loss_weight, power)
    assert found == pytest.approx(expected, abs=5e-5)
    assert sum(found) == pytest.approx(1)


def test_losses_of_zero_leave_the_numbers_of_images() -> None:
    assert fedmix_seg.adaptive_weights([1, 3], [0.0, 0.0], 10, 1.5) == [0.25, 0.75]


def test_agreement_by_hand() -> None:
    """Of 20 pixels 18 in common: Dice 18 * 2 / 38 = 0.947; of 10 pixels 8: 16 / 18 = 0.889."""
    first = torch.zeros(3, 1, 4, 5, dtype=torch.bool)
    second = first.clone()
    first[0], second[0].view(-1)[:18] = True, True
    first[1].view(-1)[:10], second[1].view(-1)[:8] = True, True
    # the third: both found nothing, and agree
    assert soft_dice(first, second).tolist() == pytest.approx([36 / 38, 16 / 18, 1], abs=1e-5)
    assert fedmix_seg.agreeing(first, second, 0.9, None, 0.5).tolist() == [True, False, True]
    boxes = torch.zeros_like(first)
    boxes[0].view(-1)[:6] = True  # 12 / 26 = 0.46 of the first network's 20
    assert fedmix_seg.agreeing(first, second, 0.9, boxes, 0.5).tolist() == [False, False, True]
    boxes[0].view(-1)[:7] = True  # 14 / 27 = 0.52
    assert fedmix_seg.agreeing(first, second, 0.9, boxes, 0.5).tolist() == [True, False, True]


def test_labels_are_refined_by_boxes() -> None:
    pixels = squares((4, 0), (4, 0))
    where = torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    where[0, 0, 2:5, 1:5] = True  # 12 of the square's 16 pixels
    where[1, 0, :, :] = True  # Dice of 16 and 64 is 0.4: the network did not find it
    images = ImageSet(ArrayImages(pixels), torch.zeros(2, dtype=torch.int64))
    client, _ = started(ClientData("a", images, supervision="box", where=where))
    assert client.indices is not None
    assert client.indices.tolist() == [0]
    (found,) = client.found
    assert torch.equal(found[0].bool(), where[0, 0])  # the first network's, of the first class
    assert torch.equal(found[2].bool(), where[0, 0])  # the second's
    assert not found[[1, 3]].any()


def test_labels_are_refined_by_present_classes() -> None:
    pixels = squares((4, 3), (4, 3))
    where = torch.tensor([[True, False], [True, True]])[:, :, None, None]
    images = ImageSet(ArrayImages(pixels), torch.zeros(2, dtype=torch.int64))
    client, _ = started(ClientData("a", images, supervision="image", where=where))
    bright = (pixels > 0).to(torch.uint8)
    expected = torch.cat([bright, bright], 1)
    expected[0, [1, 3]] = 0
    assert torch.equal(client.found, expected)


def test_each_network_learns_from_the_other() -> None:
    """With different labels of one image, each loss is against the other network's."""
    pixels = squares((4, 0))
    images = ImageSet(ArrayImages(pixels), torch.zeros(1, dtype=torch.int64))
    client, setting = started(ClientData("a", images, supervision="none"))
    client.found[0, 0] = 0  # as if the first network had found nothing, and the second the square
    (batch,) = client.batches(0)
    square = (pixels > 0).float()
    with torch.no_grad():
        loss = client.loss(client.forward(batch[0]), batch[1])
        own, other = setting.network(batch[0]), setting.network.extras["second"](batch[0])
    for_first = 1 - soft_dice(own.sigmoid(), square)
    for_second = 1 - soft_dice(other.sigmoid(), torch.zeros_like(square))
    assert float(loss) == pytest.approx(float(for_first + for_second), abs=1e-6)
    assert client.total == pytest.approx(float(for_first), abs=1e-6)
    assert float(for_second) > 0.9 > 0.1 > float(for_first)


def test_networks_that_disagree_sit_out() -> None:
    images = ImageSet(ArrayImages(squares((4, 0))), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(SitsOut, match="agree on the labels of none"):
        started(ClientData("a", images, supervision="none"), second=2.0)


def test_a_client_that_keeps_nothing_does_not_count(
    tiny_maps: Make, hospitals_with_masks: Clients
) -> None:
    """The case in which the released code trains on the true masks."""
    masked = hospitals_with_masks()
    mixed = levels(masked, "pixel", "none", "none")
    method = fl.method("fedmix_seg", agreement=1.0)
    found = fl.run(tiny_maps(), method=method, clients=mixed, num_classes=3, config=QUICK)
    alone = fl.run(tiny_maps(), method=method, clients=mixed[:1], num_classes=3, config=QUICK)
    assert [[f["client"] for f in r["sat_out"]] for r in found.history] == [[1, 2], [1, 2]]
    assert all(torch.equal(t, alone.state[n]) for n, t in found.state.items())
    # measured all the same
    assert found.specialization is not None
    assert set(found.specialization["clients"]) == {"0", "1", "2"}


@pytest.mark.parametrize("name", ["fedmix_seg", "fedst", "fedrgd", "fedavg_labelled"])
def test_masks_do_not_leak(name: str, tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    """Other masks in the same images change nothing, where only the classes are known."""
    masked = hospitals_with_masks()
    assert masked[1].train.masks is not None
    true = masked[1].train.masks.take(torch.arange(len(masked[1].train)))
    for level in ("image", "none"):
        ends = []
        for masks in (true, true.flip(2).roll(1, 3)):
            changed = replace(masked[1].train, masks=ArrayImages(masks))
            clients = [masked[0], replace(masked[1], train=changed)]
            hyper = {"agreement": 0.0} if name == "fedmix_seg" else {}
            ends.append(fl.run(
                tiny_maps(), method=fl.method(name, **hyper), num_classes=3, config=QUICK,
                clients=levels(clients, "pixel", level),
            ))  # fmt: skip
        assert all(torch.equal(t, ends[1].state[n]) for n, t in ends[0].state.items())


def test_weak_clients_have_no_masks(hospitals_with_masks: Clients) -> None:
    client = hospitals_with_masks()[0]
    for level in ("box", "image", "none"):
        weak = weakened(client, level, 3, 0)
        assert weak.train.masks is None
        assert weak.val is None
        assert weak.test is not None
        assert weak.test.masks is not None
    box = weakened(client, "box", 3, 0).where
    assert box is not None
    # images of class 0 have a mask in rows 0 to 2; the box has at most one row more, of 6
    rows = box[0, 0].all(1).tolist()
    assert rows[:3] + rows[4:] == [True, True, True, False, False]
    assert not box[0, 1:].any()
    present = weakened(client, "image", 3, 0).where
    assert present is not None
    assert present[:, :, 0, 0].long().argmax(1).tolist() == client.train.labels.tolist()


@pytest.mark.parametrize(("side", "margins"), [(256, (1, 9)), (64, (0, 2)), (32, (0, 1))])
def test_margins_of_boxes_shrink_with_the_image(side: int, margins: tuple[int, int]) -> None:
    """The paper's margins are 1 to 9 pixels of 256."""
    masks = torch.zeros(200, 1, side, side, dtype=torch.uint8)
    masks[:, :, side // 2, side // 2] = 1
    images = ImageSet(
        ArrayImages(masks), torch.zeros(200, dtype=torch.int64), masks=ArrayImages(masks)
    )
    where = weakened(ClientData("b", images), "box", 1, 0).where
    assert where is not None
    for direction in (1, 2):
        to_the_first = side // 2 - where[:, 0].any(direction).int().argmax(1)
        assert (int(to_the_first.min()), int(to_the_first.max())) == margins


def test_a_weak_client_with_masks_is_refused(
    hospitals_with_masks: Clients, refuses: Callable[..., Any]
) -> None:
    client = hospitals_with_masks()[0]
    with refuses("'h0': training images must come without masks", "'none'"):
        replace(client, supervision="none")
    bare = replace(client.train, masks=None)
    for where in (None, torch.ones(3, 3, 6, 6, dtype=torch.bool)):
        with refuses("where must be", "at supervision 'box'", "give boxes"):
            replace(client, train=bare, supervision="box", where=where)
    with refuses("where must be nothing at supervision 'none'"):
        replace(client, train=bare, supervision="none", where=torch.ones(21, 3, 1, 1) > 0)


def test_who_must_have_masks(
    tiny_maps: Make, hospitals_with_masks: Clients, refuses: Callable[..., Any]
) -> None:
    clients = levels(hospitals_with_masks(), "box", "image", "none")
    for name in ("fedmix_seg", "fedavg_labelled"):
        with refuses("some client must have supervision pixel, got box, image, none"):
            fl.run(tiny_maps(), method=name, clients=clients, num_classes=3, config=QUICK)
    mixed = levels(hospitals_with_masks(), "pixel", "box", "none")
    for name in ("fedavg", "local", "centralized", "fedprox"):
        with refuses(f"{name}: every client must have supervision pixel, got box at 'h1'"):
            fl.run(tiny_maps(), method=name, clients=mixed, num_classes=3, config=QUICK)


def test_levels_as_text(refuses: Callable[..., Any]) -> None:
    assert parsed(" pixel, none", ["a", "b"]) == ("pixel", "none")
    with refuses("--supervision: must be of pixel, box, image, none, got 'boxes'", "'box'"):
        parsed("pixel,boxes", ["a", "b"])
    with refuses("one level for each of 3 clients (a, b, c), got 2"):
        parsed("pixel,box", ["a", "b", "c"])


@pytest.mark.parametrize(
    "mix",
    ["image box pixel", "none none pixel", "image none pixel", "box box pixel",
     "none none pixel none", "box box pixel box"],
)  # fmt: skip
def test_the_mixes_of_the_paper(mix: str, tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    wanted: Any = mix.split()
    clients = hospitals_with_masks(*[(4, 3, 3)] * len(wanted))
    hyper = {"agreement": 0.2, "box_overlap": 0.0}
    found = fl.run(
        tiny_maps(), method=fl.method("fedmix_seg", **hyper), clients=levels(clients, *wanted),
        num_classes=3, config=QUICK.replaced(rounds=3, keep_optimizer=True),
    )  # fmt: skip
    assert found.generalization is not None
    assert found.specialization is not None
    assert set(found.generalization["clients"]) == {str(k) for k in range(len(wanted))}
    assert not any(r["failures"] for r in found.history)
    # all of them learned something by the end
    assert found.history[-1]["replied"] == list(range(len(wanted)))


def test_a_class_that_every_image_shows_tells_nothing(hospitals_with_masks: Clients) -> None:
    """Of one class, shown by all, an image label is no more than no label."""
    clients = []
    for client in hospitals_with_masks()[:3]:
        assert client.train.masks is not None
        masks = client.train.masks.take(torch.arange(len(client.train))) > 0
        assert masks.flatten(1).any(1).all()
        train = replace(client.train, masks=ArrayImages(masks.to(torch.uint8)))
        clients.append(replace(client, train=train, val=None, test=None))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Conv2d(clients[0].train.images.shape[1], 1, 3, padding=1)
    ends = [
        fl.run(
            copy.deepcopy(network), method=fl.method("fedmix_seg", agreement=0.1),
            num_classes=1, config=QUICK,
            clients=[weakened(c, x, 1, 0) for c, x in zip(clients, mix, strict=True)],
        )
        for mix in (("pixel", "box", "image"), ("pixel", "box", "none"), ("pixel", "box", "box"))
    ]  # fmt: skip
    same = [
        all(torch.equal(value, other.state[name]) for name, value in ends[0].state.items())
        for other in ends[1:]
    ]
    assert same == [True, False]
    # the third client trained: what is equal is not that it sat out
    assert all(round["replied"] == [0, 1, 2] for round in ends[1].history)


def test_classification_is_refused(
    tiny: Make, hospitals: Clients, refuses: Callable[..., Any]
) -> None:
    with refuses("fedmix_seg: is for segmentation, got classification"):
        fl.run(tiny(), method="fedmix_seg", clients=hospitals(), num_classes=3, config=QUICK)


@pytest.mark.parametrize("name", ["fca", "fedlc", "creff", "balancefl", "fednpr", "fedrod"])
def test_methods_of_classes_refuse_masks(
    name: str, tiny_maps: Make, hospitals_with_masks: Clients, refuses: Callable[..., Any]
) -> None:
    with refuses(f"{name}: is for classification, got segmentation"):
        fl.run(tiny_maps(), method=name, clients=hospitals_with_masks(), num_classes=3)


def test_losses_of_classes_refuse_masks(
    tiny_maps: Make, hospitals_with_masks: Clients, refuses: Callable[..., Any]
) -> None:
    config = QUICK.replaced(loss=fl.LossConfig(name="balanced_softmax"))
    with refuses("--loss: must be one of dice_bce, dice in segmentation, got 'balanced_softmax'"):
        fl.run(tiny_maps(), clients=hospitals_with_masks(), num_classes=3, config=config)


def test_masks_of_other_values_and_sizes(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    first, *others = hospitals_with_masks()
    ones = torch.ones(len(first.train), 1, 6, 6, dtype=torch.uint8)
    for masks, why in ((4 * ones, "values in 0..3, got 4"), (ones[..., :5], "like the images")):
        broken = replace(first, train=replace(first.train, masks=ArrayImages(masks)))
        found = fl.run(tiny_maps(), clients=[broken, *others], num_classes=3, config=QUICK)
        (failure,) = found.history[0]["failures"]
        assert failure["client"] == 0
        assert why in failure["reason"]


def test_the_second_network_is_drawn_like_the_first(tiny_maps: Make) -> None:
    method = fl.method("fedmix_seg")
    setting = Setting.of(tiny_maps(), method, QUICK, num_classes=3, image_shape=(1, 6, 6))
    network = setting.network
    own = dict(network.extras["second"].named_parameters())
    for name, parameter in network.model.named_parameters():
        assert torch.equal(parameter.flatten().sort()[0], own[name].flatten().sort()[0])
    assert not torch.equal(network.model.get_parameter("conv.weight"), own["conv.weight"])


def test_what_is_sure_by_hand() -> None:
    p = torch.tensor([0.95, 0.85, 0.5, 0.15, 0.05])
    label, sure = fedst.confident(p.logit().view(1, 1, 1, 5), 0.9)
    assert sure.flatten().tolist() == [True, False, False, False, True]
    assert label.flatten()[[0, 4]].tolist() == [1, 0]


def test_gamma_keeps_the_ends() -> None:
    image = torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3).repeat(2, 1, 1, 1)
    found = fedst.with_gamma(image, torch.tensor([2.0, 0.5]))
    assert found[0].flatten().tolist() == pytest.approx([-1, -0.5, 1])
    assert found[1].flatten().tolist() == pytest.approx([-1, 2 * 0.5**0.5 - 1, 1])


@pytest.mark.parametrize(("name", "share"), [("fedst", 0.9), ("fedrgd", 0.5)])
def test_fixed_weights(name: str, share: float, tiny_maps: Make) -> None:
    method = fl.method(name)
    setting = Setting.of(tiny_maps(), method, QUICK, num_classes=3, image_shape=(1, 6, 6))

    def replies(*labelled: bool) -> list[Reply]:
        return [Reply(k, Record({}, {"fedst": has})) for k, has in enumerate(labelled)]

    server: Any = setting  # the weights need nothing of the server
    rest = (1 - share) / 2
    assert method.weights(server, replies(False, False, True)) == pytest.approx([rest, rest, share])
    assert method.weights(server, replies(True, True)) == [1, 1]


def test_self_training_after_the_warm_up(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    clients = levels(hospitals_with_masks(), "pixel", "box", "none")
    config = QUICK.replaced(rounds=4)
    found = fl.run(tiny_maps(), method="fedst", clients=clients, num_classes=3, config=config)
    assert [r["replied"] for r in found.history] == [[0], [0], [0, 1, 2], [0, 1, 2]]
    # until then it is what those with masks learn
    warm = config.replaced(rounds=2)
    half = fl.run(
        tiny_maps(), method=fl.method("fedst", warm_up=1.0), clients=clients, num_classes=3,
        config=warm,
    )  # fmt: skip
    alone = fl.run(
        tiny_maps(), method="fedavg_labelled", clients=clients, num_classes=3, config=warm
    )
    assert all(torch.equal(t, alone.state[n]) for n, t in half.state.items())


def test_a_round_in_which_all_sit_out(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    setting = Setting.of(
        tiny_maps(), fl.method("fedavg_labelled"), QUICK, num_classes=3, image_shape=(1, 6, 6)
    )
    weak = weakened(hospitals_with_masks()[0], "none", 3, 0)
    state = {n: setting.initial[n] for n in setting.names(down=True)}
    request = Request(
        "train", 0, 0, Record({"model": state}, {"class_counts": [21.0], "evaluate": True})
    )
    reply, kept = answer(setting, weak, request, None)
    assert kept is None
    assert reply.model == {}
    assert reply.sits_out is not None
    assert list(reply.record.values["evaluations"]) == ["0"]


def test_figures_of_each_client(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    setting = Setting.of(
        tiny_maps(), fl.method("fedavg"), QUICK, num_classes=3, image_shape=(1, 6, 6)
    )
    batches = {
        k: setting.test_batches(client.test)
        for k, client in enumerate(hospitals_with_masks())
        if client.test is not None
    }
    views, none = setting.method.views("server"), torch.ones(1)
    found = evaluate(setting.network, views, batches, none, by_client=True)["model"]["plain"]
    for k, loader in batches.items():
        alone = evaluate(setting.network, views, {k: loader}, none)["model"]["plain"]
        assert found["clients"][str(k)] == {m: alone[m] for m in ("dice", "iou", "hd95")}
    mean = sum(found["clients"][str(k)]["dice"] for k in batches) / len(batches)
    assert found["client_mean"]["dice"] == pytest.approx(mean)


def test_det_compares_dice_in_segmentation(tiny_maps: Make, hospitals_with_masks: Clients) -> None:
    config = QUICK.replaced(local_epochs=3)
    found = fl.run(
        tiny_maps(), method=fl.method("prr", cpa=None), clients=hospitals_with_masks(),
        num_classes=3, config=config,
    )  # fmt: skip
    assert found.specialization is not None
    assert set(found.specialization["views"]) == {"personal", "deputy"}
