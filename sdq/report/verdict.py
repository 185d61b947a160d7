"""The first lines of a page: what came of the run, and whether to trust it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sdq.report.classes import ClassRow, paired
from sdq.report.intervals import mean_loss
from sdq.report.predictions import Predictions
from sdq.report.tables import headline, metric_cell, metric_label, share, signed

Mood = Literal["good", "unsure", "bad", "plain"]

HARDLY = 0.1
"""Share of a class that is right, below which the class is not recognised."""

SMALL = 0.01
"""A loss that is shown, but of which little comes."""

FEW = 0.05
"""A loss that the images could not have shown: from here on they are too few to tell."""


@dataclass(frozen=True)
class Verdict:
    """A sentence, what is held against the run, and how it looks.

    Args:
        text: the sentence.
        mood: its style.
        warnings: beyond chance.
        notes: what chance may explain, or what to look at.
    """

    text: str
    mood: Mood
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


def quantized_verdict(
    metrics: Mapping[str, Any], predictions: Predictions | None, rows: Sequence[ClassRow]
) -> Verdict:
    """Return the verdict on a quantized network, compared with the float one.

    Args:
        metrics: with ``float`` and ``quantized``.
        predictions: of both on the test images, if they are known.
        rows: of the classes; empty where predictions are not known.
    """
    if predictions is None or predictions.after is None:
        return _of_metrics(metrics["float"], metrics["quantized"])
    answers = (predictions.before.argmax(1), predictions.after.argmax(1))
    right = [a == predictions.labels for a in answers]
    pair = paired(right[0], right[1])
    interval = pair.interval()
    warnings = [_warning(row, rows) for row in rows if row.level == "warning"]
    unknown = _unrecognised(rows)
    notes = [*unknown, *(_note(row) for row in rows if row.level == "unsure")]
    images = f"{pair.images:,} images"
    if warnings:
        names = _listed([_name(row) for row in rows if row.level == "warning"])
        text = f"Look before you use it: compression cost {names} more than the other classes."
        return Verdict(text, "bad", warnings, notes)
    _, mean = mean_loss([row.paired for row in rows if row.paired is not None])
    if max(interval.low, mean.low) > 0:
        alike = "" if interval.low > 0 else ", if every class counts alike,"
        loss = interval if interval.low > 0 else mean
        small = loss.high < SMALL
        text = (
            f"The quantized network is {'hardly worse' if small else 'worse'}: of 100 "
            f"images{alike} it gets between {_points(loss.low)} and {_points(loss.high)} fewer "
            "right than the float network."
        )
        mood: Mood = "bad" if loss.low > FEW else "unsure"
        return Verdict(text, "good" if small and not unknown else mood, (), notes)
    most = max(interval.high, 0.0)
    if most > FEW:
        text = (
            f"Too few images to tell: {images} show no loss beyond chance, but a loss of up to "
            f"{_points(most)} in 100 could hide in them."
        )
        return Verdict(text, "unsure", (), notes)
    text = (
        f"No loss beyond chance: of 100 images at most {_points(most)} fewer are right, as far as "
        f"{images} can show."
    )
    return Verdict(text, "unsure" if unknown else "good", (), notes)


def _unrecognised(rows: Sequence[ClassRow]) -> list[str]:
    """Return a sentence on classes that the float network hardly ever gets right."""
    found = [row for row in rows if row.before < HARDLY * row.images]
    if not found:
        return []
    told = _listed([f"{_name(row)} ({row.before} of {row.images})" for row in found])
    return [
        f"Hardly ever right even in float: {told}. What compression costs a class shows only where "
        "the float network knows it."
    ]


def _name(row: ClassRow) -> str:
    """Return a class's name; one that is a number must not be taken for an amount."""
    return f"class {row.name}" if row.name.isdecimal() else row.name


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _warning(row: ClassRow, rows: Sequence[ClassRow]) -> str:
    assert row.paired is not None
    assert row.after is not None
    average, _ = mean_loss([r.paired for r in rows if r.paired is not None])
    interval = row.paired.interval()
    return (
        f"{_name(row)}: {row.before} of {row.images} right before, {row.after} after: "
        f"{_points(row.paired.loss)} points lost (95 % interval {_points(interval.low)} to "
        f"{_points(interval.high)}); the classes lost {_points(average)} on average. "
        "More than chance explains."
    )


def _note(row: ClassRow) -> str:
    return (
        f"{_name(row)}: {row.before} of {row.images} right before, {row.after} after. With so few "
        "images that may be chance; test more of them."
    )


def _of_metrics(before: Mapping[str, Any], after: Mapping[str, Any]) -> Verdict:
    name = headline([before, after])
    if name is None:
        return Verdict("The quantized network was measured; see the table.", "plain")
    text = (
        f"{_first_upper(metric_label(name))} went from {metric_cell(name, before[name]).text} to "
        f"{metric_cell(name, after[name]).text} ({signed(100 * (after[name] - before[name]))} "
        "points)."
    )
    return Verdict(text, "plain")


def float_verdict(metrics: Mapping[str, Any], rows: Sequence[ClassRow]) -> Verdict:
    """Return the verdict on a float network.

    Args:
        metrics: of it.
        rows: of the classes; empty where predictions are not known.
    """
    name = headline([metrics])
    if name is None:
        return Verdict("The network was measured; see the table.", "plain")
    text = f"{_first_upper(metric_label(name))}: {metric_cell(name, metrics[name]).text}."
    if rows:
        worst = min(rows, key=lambda r: r.before / r.images)
        text += (
            f" The weakest class is {worst.name}, of which {worst.before} of {worst.images} "
            "images are right."
        )
    return Verdict(text, "plain")


def federated_verdict(methods: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Return the verdict on a federation.

    Args:
        methods: metrics of each.
    """
    scores: dict[str, dict[str, tuple[float, str]]] = {}
    for method, metrics in methods.items():
        for kind in ("generalization", "specialization"):
            found = metrics.get(kind)
            if found and (name := headline([found])) is not None:
                scores.setdefault(kind, {})[method] = (found[name], name)
    sentences = [_best(kind, found) for kind, found in scores.items()]
    notes = []
    if len(methods) > 1:
        notes.append(
            "One run of each method: differences of a few points between methods may be chance. "
            "Repeat with other seeds before you choose."
        )
    failed = {m: len(x.get("failures", ())) for m, x in methods.items()}
    notes += [f"{m}: a client was left out of a round {n} times." for m, n in failed.items() if n]
    return Verdict(" ".join(sentences) or "The federation ran; see below.", "plain", (), notes)


def _best(kind: str, scores: Mapping[str, tuple[float, str]]) -> str:
    method = max(scores, key=lambda m: scores[m][0])
    value, name = scores[method]
    what = {
        "generalization": "One network for all",
        "specialization": "Each client's own network on its own images",
    }[kind]
    by = f" (best: {method})" if len(scores) > 1 else ""
    return f"{what}{by}: {metric_label(name)} {share(value).text}."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _first_upper(sentence: str) -> str:
    return sentence[:1].upper() + sentence[1:]
