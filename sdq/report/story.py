"""What a run did, in words that need no knowledge of the field."""

from collections.abc import Mapping, Sequence
from typing import Any

from sdq.report.networks import Network
from sdq.report.tables import headline, metric_cell, metric_label, scaled, share
from sdq.run_document import held_out

SEARCHES = {
    "sdq": "was learned by gradient, together with the weights",
    "hessian": "follows from how sensitive each layer is (Hessian)",
    "sensitivity": "follows from what fewer bits cost each layer, measured",
    "greedy": "was found by taking bits away where that hurts least",
    "interpolate": "was read off between uniform networks",
    "random": "was drawn at random (a comparison, not a method)",
    "uniform": "is the same wherever the budget allows",
}
UNITS = {
    "avg_weight_bits": ("{:g} bits a weight on average", 1),
    "weight_bytes": ("{:,.1f} kB of weights", 1e-3),
    "bops": ("{:,.3f} G bit operations an image", 1e-9),
    "avg_act_bits": ("{:g} bits an activation on average", 1),
}


def passes(count: int) -> str:
    """Return how often images are gone through."""
    return "one pass" if count == 1 else f"{count} passes"


def data_sentence(document: Mapping[str, Any]) -> str:
    """Say what is told apart, on which data."""
    data, model = document["data"], document["model"]
    names = [str(name) for name in data["class_names"]]
    shown = ", ".join(names[:10]) + (", …" if len(names) > 10 else "")
    of_model = str(model["reference"]).rpartition("/")[2]
    where = data["reference"] or "the clients keep them"
    if _marks(document):
        return f"The network ({of_model}) marks in an image what is {shown}. Data: {where}."
    return (
        f"The network ({of_model}) looks at an image and names one of {len(names)} classes "
        f"({shown}). Data: {where}."
    )


def _marks(document: Mapping[str, Any]) -> bool:
    return bool(document["data"].get("task") == "segmentation")


def trained(document: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    """Tell of a run of ``sdq train``."""
    images = document["data"]["num_examples"]
    epochs = document["request"]["train"]["epochs"]
    best = metrics.get("best_epoch")
    kept = f" The state after pass {best} was kept." if best else ""
    return [
        data_sentence(document),
        f"It was trained on {images['train']:,} images, {passes(epochs)} over them.{kept} "
        f"{_tried(images, known=held_out(document))}",
    ]


def _tried(images: Mapping[str, int], *, known: bool) -> str:
    part = "test" if "test" in images else "val"
    if part not in images:
        return ""
    here = "" if known else " here"
    return f"Then it was tried on {images[part]:,} images that it was not trained on{here}."


def quantized(
    document: Mapping[str, Any], metrics: Mapping[str, Any] | None, networks: Sequence[Network]
) -> list[str]:
    """Tell of a run of ``sdq quantize`` or ``sdq search``.

    Args:
        document: ``run.json``.
        metrics: ``metrics.json``; None of a search.
        networks: the float one and the quantized one.
    """
    found = [data_sentence(document), _smaller(document["request"], networks)]
    if metrics is None:
        return [*found, "Only the bits were chosen: no network was trained or measured for them."]
    return [*found, _tuned(document), _measured(document, metrics)]


def compared(
    document: Mapping[str, Any], metrics: Mapping[str, Any], networks: Sequence[Network]
) -> list[str]:
    """Tell of bits that a federation learned; as :func:`quantized`."""
    return [f"{_sizes(networks)}. The bits were learned together, too.",
            _measured(document, metrics)]  # fmt: skip


def _sizes(networks: Sequence[Network]) -> str:
    before, after = networks[0], networks[1]
    size, less = (n.costs.get("weight_bytes") for n in (before, after))
    told = f"Its weights, stored with 32 bits each, were given {after.bits:.2f} bits on average"
    if size and less:
        told += (
            f": {scaled(size, 'B').text} of weights become {scaled(less, 'B').text}, "
            f"{size / less:.1f} times less"
        )
    return told


def _smaller(request: Mapping[str, Any], networks: Sequence[Network]) -> str:
    told = _sizes(networks)
    if request.get("policy"):
        return f"{told}. The bits of each layer were given ({request['policy']})."
    method = SEARCHES.get(request["search_method"], f"was found by {request['search_method']}")
    return f"{told}. How many bits each layer gets {method}. Allowed were {_budget(request)}."


def _budget(request: Mapping[str, Any]) -> str:
    budget = request.get("budget") or {}
    parts = [
        form.format(budget[name] * factor)
        for name, (form, factor) in UNITS.items()
        if budget.get(name) is not None
    ]
    parts += [f"{name} {limit:g}" for name, limit in (budget.get("costs") or {}).items()]
    return "; ".join(parts) or "any bits"


def _tuned(document: Mapping[str, Any]) -> str:
    request = document["request"]
    if ptq := request.get("ptq"):
        if ptq["rounding"] == "nearest" or not ptq["steps"]:
            return "Each weight was then rounded to the nearest level; nothing was trained."
        count = min(ptq["images"], document["data"]["num_examples"]["train"])
        return (
            f"How to round was then learned from {count:,} images without their labels; nothing "
            "was trained."
        )
    epochs = (request.get("train") or {}).get("epochs", 0)
    times = passes(epochs)
    if not epochs:
        return "The quantized network was not trained any further."
    return (
        f"The quantized network was then trained for {times} over the training images, to "
        "make up for what rounding costs."
    )


def _measured(document: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    images = document["data"]["num_examples"]
    part = "test" if "test" in images else "val"
    before, after = metrics["float"], metrics["quantized"]
    name = headline([before, after])
    told = f"Both networks were tried on {images.get(part, 0):,} images that "
    told += (
        "neither was trained on."
        if held_out(document)
        else "nothing here was learned from; what the float network was trained on before is not "
        "known."
    )
    for each in dict.fromkeys(("accuracy", name)):
        if each is not None and each in before and each in after:
            told += (
                f" {metric_label(each)[:1].upper()}{metric_label(each)[1:]}: "
                f"{metric_cell(each, before[each]).text} before, "
                f"{metric_cell(each, after[each]).text} after."
            )
    if metrics.get("agreement") is not None:
        what = "pixels" if _marks(document) else "images"
        told += f" They give the same answer for {share(metrics['agreement']).text} of the {what}."
    return told


def federated(documents: Mapping[str, Mapping[str, Any]], rounds: int, clients: int) -> list[str]:
    """Tell of a run of ``sdq federate``.

    Args:
        documents: ``run.json`` of each method, by its name.
        rounds: that each had, of all phases.
        clients: how many there are.
    """
    document = next(iter(documents.values()))
    setting = document["request"]["federation"]
    share = setting["participation"]
    asked = "all clients" if share == 1 else f"{100 * share:g} % of the clients"
    pooled = [name for name, each in documents.items() if each.get("pools_images")]
    alone = [name for name, each in documents.items() if each.get("server_model") is False]
    together = [name for name in documents if name not in pooled + alone]
    told = f"There are {clients} clients (such as hospitals)."
    if together:
        told = (
            f"{clients} clients (such as hospitals) trained it together without showing each other "
            f"an image: in each of {rounds} rounds the server sent the network to {asked}, "
            f"each trained it on its own images for {passes(setting['local_epochs'])} and sent it "
            "back, and the server made one network of them."
        )
    if together and len(documents) > 1:
        each = "once with each of " if len(together) > 1 else "with "
        told += f" This was done {each}{', '.join(together)}."
    if alone:
        told += f" With {', '.join(alone)} each client ended with a network of its own."
    if pooled:
        told += (
            f" With {', '.join(pooled)} the images of all were in one place: no federation, but "
            "what one is held against."
        )
    return [data_sentence(document), told]
