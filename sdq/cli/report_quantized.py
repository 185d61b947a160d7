"""The page of one network: of ``sdq train``, ``search``, ``quantize``, or of a federation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from sdq.cli import inputs as inp
from sdq.cli.device import DeviceRequest
from sdq.cli.run_data import run_inputs
from sdq.cli.run_networks import networks_of
from sdq.data import ImageSet
from sdq.errors import RequestError, RunError
from sdq.metrics import predict
from sdq.plots import quantized_weights
from sdq.policy import BitwidthPolicy
from sdq.report import story
from sdq.report.charts import Chart, Series, chart
from sdq.report.classes import ClassRow, class_rows, confusion, reliability
from sdq.report.layers import LayerRow, layer_rows, trajectory_charts
from sdq.report.networks import Network, network_charts, network_table
from sdq.report.overlays import Overlays, overlays
from sdq.report.page import MOST_CLASSES, Confusion, Page
from sdq.report.predictions import Predictions
from sdq.report.tables import Table, number, share, text
from sdq.report.thumbnails import changed_images
from sdq.report.verdict import Verdict, float_verdict, quantized_verdict
from sdq.run_folder import RunFolder
from sdq.trajectory import trajectory

MOST_MISTAKES = 25


@dataclass
class Material:
    """What a page is made of, and what could not be had.

    Args:
        run: that ended.
        data_root: where the data are, if not where the run had them.
        wants_images: whether pictures go on the page.
        inputs: the run's data, if they are open already.
        missing: what is not on the page, and why.
    """

    run: RunFolder
    data_root: str | None = None
    wants_images: bool = True
    inputs: inp.Inputs | None = None
    missing: list[str] = field(default_factory=list)
    tried: bool = False

    def open_data(self) -> inp.Inputs | None:
        """Return the run's data, or None and note why they cannot be had."""
        if self.inputs is None and not self.tried:
            self.tried = True
            try:
                self.inputs = run_inputs(self.run, root=self.data_root)
            except (RequestError, RunError, OSError) as error:
                self.missing.append(f"The data could not be opened: {error}")
        return self.inputs

    def predictions(self) -> Predictions | None:
        """Return what the run's networks say of the test images, read or computed."""
        found = Predictions.load(self.run.path)
        if found is None and (inputs := self.open_data()) is not None:
            try:
                found = _predict(self.run, inputs)
            except (RequestError, RunError, OSError) as error:
                self.missing.append(f"The networks could not be run: {error}")
        if found is None:
            self.missing.append(
                "Classes, confusions, confidence and changed answers: they need the run's "
                "predictions.safetensors, or its data and networks."
            )
        return found

    def images(self) -> ImageSet | None:
        """Return the test images, if pictures are wanted."""
        if not self.wants_images:
            self.missing.append("Pictures: the report was made with --no-images.")
            return None
        if (inputs := self.open_data()) is None:
            self.missing.append("Pictures of test images: they need the data.")
            return None
        found = inputs.splits.test or inputs.splits.val
        if found is None:
            self.missing.append("Pictures of test images: the data have no test part of their own.")
        return found

    def overlays(self, networks: Callable[[], dict[str, nn.Module]]) -> Overlays | None:
        """Return test images with outlines, if there are pictures.

        Args:
            networks: reads them, by the name on the page; called if there are pictures.
        """
        images = self.images()
        if images is None or self.inputs is None:
            return None
        try:
            return overlays(networks(), images, self.inputs.normalization)
        except (RequestError, RunError, OSError) as error:
            self.missing.append(f"Outlines: the networks could not be run: {error}")
            return None


def _networks(run: RunFolder) -> dict[str, nn.Module]:
    """Return a run's float network and, where there is one, the quantized one."""
    found = {"float": inp.load_float(run)}
    if run.read_json("run.json").get("quant"):
        found["quantized"] = inp.load_quantized(run)
    return found


def _predict(run: RunFolder, inputs: inp.Inputs) -> Predictions:
    found = [predict(network, inputs.held_out()) for network in _networks(run).values()]
    return Predictions(found[0][1], found[0][0], found[1][0] if len(found) > 1 else None)


def single_page(
    material: Material, device: DeviceRequest | None = None, beside: Sequence[Network] = ()
) -> Page:
    """Return the page of a run.

    Args:
        material: of the run.
        device: whose latency is shown; None: the one that the run's budget named.
        beside: other networks that are shown next to the run's.
    """
    run = material.run
    document = run.read_json("run.json")
    verb = document["request"]["verb"]
    metrics = run.read_metrics() if verb != "search" else None
    own = networks_of(run, device)
    networks = [*own, *beside]
    title = f"{verb}: {run.path.resolve().name}"
    table = network_table(networks, "Networks beside each other", differences=True)
    charts = network_charts(networks)
    if verb == "search":
        verdict = Verdict("The bits are chosen; nothing is measured yet.", "plain")
        told = story.quantized(document, None, own)
        return Page(title, told, verdict, [table], charts, **_of_layers(material, document))
    assert metrics is not None
    quantized = "quantized" in metrics
    classes = _of_classes(material, document, metrics)
    rows: list[ClassRow] = classes.pop("classes", [])
    predictions = classes.pop("predictions", None)
    if quantized:
        verdict = quantized_verdict(metrics, predictions, rows)
        together = verb == "federate"
        told = (story.compared if together else story.quantized)(document, metrics, own)
        classes |= _of_layers(material, document)
    else:
        verdict = float_verdict(metrics["float"], rows)
        told = story.trained(document, metrics)
    return Page(title, told, verdict, [table], charts, rows, quantized, **classes)


def _of_classes(
    material: Material, document: dict[str, Any], metrics: dict[str, Any]
) -> dict[str, Any]:
    """Return the parts of a page that need the answer to each image."""
    if "accuracy" not in metrics["float"]:  # not one class an image
        return {"overlays": material.overlays(partial(_networks, material.run))}
    predictions = material.predictions()
    if predictions is None:
        return {}
    data = document["data"]
    names = [str(name) for name in data["class_names"]]
    counts = data.get("class_counts")
    if counts is None and material.inputs is not None:  # of a run that did not keep them
        counts = inp.class_counts(material.inputs.splits)
    rows = class_rows(predictions, names, counts)
    found: dict[str, Any] = {"classes": rows, "predictions": predictions}
    found |= _confusions(predictions, names, [row.name for row in rows])
    found["reliability"] = _reliability(predictions, metrics)
    if predictions.after is not None:
        images = material.images()
        if images is not None and len(images) != len(predictions.labels):
            images = None
        order = [row.name for row in rows]
        changed, count = changed_images(predictions, names, order, images)
        found |= {"changed": changed, "changed_count": count}
    return found


def _confusions(
    predictions: Predictions, names: list[str], rare_first: list[str]
) -> dict[str, Any]:
    """Return the confusion matrices; of many classes, a list of the mistakes made most often."""
    both = {"float": predictions.before}
    if predictions.after is not None:
        both["quantized"] = predictions.after
    matrices = {k: confusion(v, predictions.labels) for k, v in both.items()}
    if len(names) > MOST_CLASSES:
        return {"details": [_mistakes(k, m.tolist(), names) for k, m in matrices.items()]}
    known = {name: place for place, name in enumerate(names)}
    order = [known[name] for name in rare_first]
    order += [i for i in range(len(names)) if i not in order]
    return {
        "confusions": [
            Confusion(
                f"What the {k} network takes each class for, in images",
                [names[i] for i in order],
                matrix[order][:, order].tolist(),
            )
            for k, matrix in matrices.items()
        ]
    }


def _mistakes(name: str, matrix: list[list[int]], names: list[str]) -> Table:
    found = sorted(
        ((n, i, j) for i, row in enumerate(matrix) for j, n in enumerate(row) if i != j and n),
        reverse=True,
    )[:MOST_MISTAKES]
    rows = [[text(names[i]), text(names[j]), number(n), share(n / sum(matrix[i]))]
            for n, i, j in found]  # fmt: skip
    columns = ["is", "taken for", "images", "of its class"]
    return Table(f"Mistakes the {name} network makes most often", columns, rows)


def _reliability(predictions: Predictions, metrics: dict[str, Any]) -> Chart | None:
    both = {"float": predictions.before, "quantized": predictions.after}
    series, told = [], []
    for name, logits in both.items():
        if logits is None:
            continue
        bins = reliability(logits, predictions.labels)
        series.append(Series(name, [(b.confidence, b.right) for b in bins]))
        states = "; ".join(
            f"says {100 * b.confidence:.0f} %, is right in {100 * b.right:.0f} % of {b.images:,}"
            for b in bins
        )
        told.append(f"{name} (calibration error {100 * metrics[name]['ece']:.1f} %): {states}.")
    return chart(
        "Confidence and right answers", series, x_label="stated confidence", y_label="right",
        description=" ".join(told), percent_x=True, full=True,
    )  # fmt: skip


def _of_layers(material: Material, document: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a page that are about layers."""
    run = material.run
    policy = BitwidthPolicy.load(run.path / "policy.json")
    errors: list[dict[str, float]] = [{}, {}]
    try:
        errors = [
            {name: q.relative_error() for name, q in part.items()}
            for part in quantized_weights(run, policy)
        ]
    except (RequestError, RuntimeError) as error:  # files that do not fit each other
        material.missing.append(f"Errors of the layers: {error}")
    rows: list[LayerRow] = layer_rows(policy, *errors)
    course: list[Chart] = []
    try:
        steps = trajectory(run.read_log(), policy)
        course = trajectory_charts(steps) if steps is not None else []
    except (RequestError, RunError) as error:
        material.missing.append(f"The course of the search: {error}")
    return {"layers": rows, "course": course}
