"""The figures behind a report: intervals, classes, verdicts, charts."""

import base64
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import binomtest

from sdq.data import ArrayImages, ImageSet
from sdq.errors import RequestError
from sdq.report.charts import Series, chart, nice_ticks
from sdq.report.classes import class_rows, confusion, level_of, paired, reliability
from sdq.report.intervals import Paired, mean_loss, wilson
from sdq.report.predictions import FILE, MOST_BYTES, Predictions
from sdq.report.tables import NBSP, scaled, signed
from sdq.report.thumbnails import changed_images, data_uri
from sdq.report.verdict import quantized_verdict
from sdq.run_folder import RunFolder


@given(st.integers(1, 400), st.integers(0, 400), st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_is_scipys(images, right, level):
    right = min(right, images)
    theirs = binomtest(right, images).proportion_ci(level, method="wilson")
    ours = wilson(right, images, level)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_newcombes_example():
    """Of 50 patients 36 and 2 had the symptom at both and at the later visit alone: table III."""
    found = Paired(36, 12, 2, 0).interval()
    assert (found.low, found.high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_without_images_nothing_is_known():
    assert Paired(0, 0, 0, 0).interval().low == -1.0
    assert (wilson(0, 0).low, wilson(0, 0).high) == (0.0, 1.0)


@pytest.mark.parametrize("images", [20, 200])
def test_intervals_hold_what_they_say(images):
    """Drawn a thousand times, the true loss lies in 95 % of the intervals; 3 sigma are 2 %."""
    rng = np.random.default_rng(0)
    shares, truth = [0.6, 0.15, 0.05, 0.2], 0.15 - 0.05
    inside = 0
    for cells in rng.multinomial(images, shares, size=1000):
        found = Paired(*map(int, cells)).interval()
        inside += found.low <= truth <= found.high
    assert inside >= 930


def test_the_mean_loss_of_one_class_is_its_own():
    pair = Paired(36, 12, 2, 0)
    mean, interval = mean_loss([pair])
    assert mean == pair.loss
    assert interval.low == pytest.approx(pair.interval().low)
    two, narrower = mean_loss([pair, pair])
    assert two == mean
    # independent halves of equal weight: the half-widths shrink by the root of two
    assert mean - narrower.low == pytest.approx((mean - interval.low) / 2**0.5)


def answers(*rows):
    """Return predictions from ``(label, float's answer, quantized's answer, how often)``."""
    found = torch.tensor([row[:3] for row in rows for _ in range(row[3])])
    logits = [torch.eye(3)[found[:, k]] * 4 for k in (1, 2)]
    return Predictions(found[:, 0], *logits)


def test_a_class_that_lost_more_is_named():
    # class 2 loses 30 of 60, the others none of 100
    found = answers((0, 0, 0, 100), (1, 1, 1, 100), (2, 2, 2, 20), (2, 2, 0, 30), (2, 0, 0, 10))
    rows = class_rows(found, ["a", "b", "c"], [500, 10, 50])
    assert [(r.name, r.train_images, r.images) for r in rows] == [
        ("b", 10, 100), ("c", 50, 60), ("a", 500, 100)
    ]  # fmt: skip
    assert [r.level for r in rows] == ["", "warning", ""]
    assert (rows[1].before, rows[1].after) == (50, 20)
    verdict = quantized_verdict({}, found, rows)
    assert verdict.mood == "bad"
    assert "cost c more" in verdict.text
    assert "50 of 60 right before, 20 after" in verdict.warnings[0]
    assert "50.0 points lost" in verdict.warnings[0]
    assert "16.7 on average" in verdict.warnings[0]  # 30 of 60, 0 and 0, over three


def test_few_images_are_not_shouted_about():
    found = answers((0, 0, 0, 300), (1, 1, 1, 300), (2, 2, 2, 3), (2, 2, 0, 2))
    rows = class_rows(found, ["a", "b", "c"])
    assert rows[0].name == "c"
    assert rows[0].level == "unsure"
    verdict = quantized_verdict({}, found, rows)
    assert not verdict.warnings
    assert "may be chance" in verdict.notes[0]


def test_chance_alone_hardly_ever_warns():
    """Ten classes of 30 images that lose a tenth and gain a tenth: a warning in 1 of 40 runs."""
    rng = np.random.default_rng(1)
    warned = 0
    for _ in range(200):
        cells = rng.multinomial(30, [0.6, 0.1, 0.1, 0.2], size=10)
        pairs = [Paired(*map(int, c)) for c in cells]
        average, _ = mean_loss(pairs)
        warned += any(level_of(p, average, 10) == "warning" for p in pairs)
    assert warned <= 12  # 5 expected; 3 sigma above


@pytest.mark.parametrize(
    ("rows", "text", "mood"),
    [
        ([(0, 0, 0, 900), (1, 1, 1, 900), (0, 0, 1, 3), (1, 0, 1, 3)], "No loss beyond", "good"),
        ([(0, 0, 0, 900), (1, 1, 1, 900), (0, 0, 1, 3), (1, 1, 0, 3)], "hardly worse", "good"),
        ([(0, 0, 0, 10), (1, 1, 1, 10)], "Too few images", "unsure"),
        ([(0, 0, 0, 800), (1, 1, 1, 800), (0, 0, 1, 40), (1, 1, 0, 40)], "worse", "unsure"),
        ([(0, 0, 0, 500), (1, 1, 1, 500), (0, 0, 1, 90), (1, 1, 0, 90)], "worse", "bad"),
    ],
)
def test_verdicts(rows, text, mood):
    found = answers(*rows)
    verdict = quantized_verdict({}, found, class_rows(found, ["a", "b", "c"]))
    assert text in verdict.text
    assert verdict.mood == mood


def test_a_loss_of_rare_classes_alone_shows_in_the_verdict():
    """Of 10,000 images 30 are lost, and 30 gained: but lost ones are all of classes b and c."""
    found = answers(
        (0, 0, 0, 9910), (0, 1, 0, 30), (1, 1, 1, 30), (1, 1, 0, 15), (2, 2, 2, 30), (2, 2, 0, 15)
    )
    rows = class_rows(found, ["a", "b", "c"])
    verdict = quantized_verdict({}, found, rows)
    assert verdict.mood != "good"


def test_classes_that_nobody_knows_are_told():
    """A network that always answers the commonest class loses nothing by being compressed."""
    found = answers((0, 0, 0, 900), (1, 0, 0, 50), (2, 2, 2, 9), (2, 0, 0, 41))
    verdict = quantized_verdict({}, found, class_rows(found, ["a", "b", "c"]))
    assert verdict.text.startswith("No loss beyond chance")
    assert verdict.mood == "unsure"
    assert verdict.notes[0].startswith("Hardly ever right even in float: b (0 of 50). ")


def test_without_predictions_the_metrics_speak():
    metrics = {"float": {"dice": 0.9}, "quantized": {"dice": 0.85}}
    text = quantized_verdict(metrics, None, []).text.replace(NBSP, " ")
    assert text == "Dice went from 90.0 % to 85.0 % (−5.0 points)."


def test_confusion_and_reliability():
    found = answers((0, 0, 0, 2), (0, 1, 1, 1), (1, 1, 1, 4))
    assert confusion(found.before, found.labels).tolist() == [[2, 1, 0], [0, 4, 0], [0, 0, 0]]
    bins = reliability(found.before, found.labels)
    sure = float(torch.tensor([4.0, 0, 0]).softmax(0)[0])
    assert [(b.confidence, b.right, b.images) for b in bins] == [
        (pytest.approx(sure, abs=1e-6), pytest.approx(6 / 7), 7)
    ]
    spread = torch.tensor([[2.0, 0.0], [0.1, 0.0]])
    assert [b.images for b in reliability(spread, torch.tensor([0, 1]))] == [1, 1]


def test_the_bins_give_torchmetrics_calibration_error():
    from torchmetrics.functional.classification import multiclass_calibration_error

    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 4, generator=rng) * 2
    labels = torch.randint(0, 4, (500,), generator=rng)
    bins = reliability(logits, labels, bins=15)
    error = sum(b.images * abs(b.right - b.confidence) for b in bins) / 500
    theirs = multiclass_calibration_error(logits.softmax(1), labels, 4, n_bins=15)
    assert error == pytest.approx(float(theirs), abs=1e-6)


def test_paired_counts():
    before, after = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, 0])
    pair = paired(before, after.bool())
    assert pair == Paired(1, 1, 1, 1)
    assert paired(before, after.bool(), torch.tensor([True, True, False, False])).loss == 0.5


def test_changed_images_in_the_order_of_their_weight(tmp_path):
    found = answers((0, 0, 0, 5), (0, 0, 1, 1), (1, 0, 1, 1), (2, 2, 0, 1), (2, 0, 1, 1))
    pixels = torch.arange(9, dtype=torch.uint8).view(9, 1, 1, 1).expand(9, 3, 4, 200).clone()
    names = tuple(f"{i}.png" for i in range(9))
    images = ImageSet(ArrayImages(pixels), found.labels, names=names)
    shown, count = changed_images(found, ["a", "b", "c"], ["c", "b", "a"], images)
    assert count == 4
    assert [(x.place, x.kind, x.name) for x in shown] == [
        (7, "lost", "7.png"), (5, "lost", "5.png"), (6, "gained", "6.png"), (8, "other", "8.png")
    ]  # fmt: skip
    assert shown[0].before_confidence == pytest.approx(float(torch.eye(3)[0].mul(4).softmax(0)[0]))
    head, _, content = shown[0].picture.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        assert picture.size == (96, 2)  # 4 x 200, made smaller
        assert picture.convert("RGB").getpixel((0, 0)) == (7, 7, 7)
    few, count = changed_images(found, ["a", "b", "c"], ["c", "b", "a"], None, most=1)
    assert (len(few), count, few[0].picture) == (1, 4, None)


def test_one_channel_is_grey():
    uri = data_uri(torch.full((1, 5, 5), 200, dtype=torch.uint8))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
        assert picture.mode == "L"
        assert picture.getpixel((2, 2)) == 200


def test_predictions_are_kept_and_checked(tmp_path):
    found = answers((0, 0, 1, 2), (2, 2, 2, 1))
    run = RunFolder(tmp_path)
    assert Predictions.load(tmp_path) is None
    found.save(run)
    again = Predictions.load(tmp_path)
    assert torch.equal(again.labels, found.labels)
    assert torch.equal(again.after, found.after)
    run.write_tensors(FILE, {"labels": found.labels + 1, "float": found.before})
    with pytest.raises(RequestError, match="must hold a label and logits for each image"):
        Predictions.load(tmp_path)


def test_large_predictions_are_not_kept(tmp_path):
    huge = torch.zeros(1).expand(MOST_BYTES // 4, 1)
    Predictions(torch.zeros(len(huge), dtype=torch.int64), huge).save(RunFolder(tmp_path))
    masks = torch.zeros(2, 4, 4, dtype=torch.int64)
    Predictions(masks, torch.zeros(2, 3, 4, 4)).save(RunFolder(tmp_path))
    assert not (tmp_path / FILE).exists()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low, width):
    ticks = nice_ticks(low, low + width)
    assert 2 <= len(ticks) <= 11
    slack = 1e-6 * (width + abs(low))
    assert all(low - slack <= t <= low + width + slack for t in ticks)


def test_points_are_where_they_belong():
    found = chart("t", [Series("s", [(1, 0.0), (10, 0.5), (100, 1.0)])], x_label="", y_label="",
                  description="", log_x=True)  # fmt: skip
    (x0, y0), (x1, y1), (x2, y2) = found.series[0].marks
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.02)  # equal ratios
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.02)
    assert (y0, y2) == (found.bottom, found.top)
    assert chart("t", [], x_label="", y_label="", description="") is None


def test_equal_points_still_have_an_axis():
    found = chart("t", [Series("s", [(3, 0.0)])], x_label="", y_label="", description="")
    assert found.series[0].marks[0] == pytest.approx(
        ((found.left + found.right) / 2, found.bottom), abs=0.02
    )


def test_numbers_as_people_read_them():
    assert scaled(999.0, "B").text == f"999{NBSP}B"
    assert scaled(66_832, "B").text == f"66.8{NBSP}kB"
    assert scaled(332_394_496, "").text == f"332{NBSP}M"
    assert scaled(0.00421, "s").text == f"4.2{NBSP}ms"
    assert [signed(x) for x in (-0.04, 0.06, -1.25)] == ["0.0", "+0.1", "−1.2"]
