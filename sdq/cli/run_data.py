"""The data of an earlier run, as they were there."""

from dataclasses import replace
from typing import Any

from sdq.batches import Normalization
from sdq.cli import inputs as inp
from sdq.errors import RequestError
from sdq.run_folder import RunFolder


def run_inputs(
    folder: RunFolder,
    data: str | None = None,
    root: str | None = None,
    image_size: int | None = None,
    mean: str | None = None,
    std: str | None = None,
    split: str | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
) -> inp.Inputs:
    """Open a run's own data as it was, or other data prepared as the run's was.

    Args:
        folder: of the run.
        data: other data; None: the run's own. The following are of other data alone but ``root``
            and ``batch_size``. The run's own data named again are divided as they were.
        root: folder that holds the data sets read by name; None: as it was.
        image_size: side in pixels; None: as it was.
        mean: of pixels, as ``--mean`` has it; None: as it was.
        std: likewise.
        split: shares, as ``--split`` has them; None: other data without parts are measured on
            whole.
        batch_size: images at a time; None: as it was.
        seed: of the division; None: as it was.

    Raises:
        RequestError: the run has not ended or had no images, its data are gone or changed since,
            or the other data do not fit its network.
    """
    inp.check_ended(folder)
    document = folder.read_json("run.json")
    recorded = document["data"]
    before = inp.DataRequest.recorded(folder)
    # what one hospital lacks another may have
    every_class = "methods" not in document
    if data is None and not before.reference:
        raise RequestError(
            f"{folder.path}: data must be named, since the server of this federation had none; "
            "pass --data"
        )
    if data is None and inp.is_gone(before.reference):
        raise RequestError(
            f"{folder.path}: its data, {before.reference}, must be where they were, but are not; "
            "name them with --data"
        )
    if data is None:
        count = batch_size or before.batch_size
        request = replace(before, root=root or before.root, batch_size=count)
        inputs = inp.open_inputs(request, every_class=every_class)
        if inputs.splits.label_names and recorded.get("task") != "segmentation":
            inputs = inputs.classifying()
        if inputs.describe()["fingerprint"] != recorded["fingerprint"]:
            # a hospital that lacks a class has them numbered as all hospitals together
            numbered = _as_before(request, recorded)
            if numbered is None:
                raise RequestError(
                    f"{before.reference}: must be the data the run was made with, but it changed "
                    "since; name it with --data if that is meant"
                )
            inputs = numbered
        recorded_norm = Normalization(tuple(recorded["mean"]), tuple(recorded["std"]))
        return inp.Inputs(inputs.splits, recorded_norm, inputs.train, request)
    own = inp.same_data(data, before.reference)
    size = image_size or before.image_size
    request = inp.DataRequest(
        data, root or before.root, size, mean, std, split or before.split,
        batch_size or before.batch_size, before.seed if seed is None else seed,
    )  # fmt: skip
    if own and (split, seed) != (None, None):
        raise inp.other_division("--split, --seed", data, folder.path)
    if own or split is not None:
        return inp.open_inputs(request.like(before), recorded, every_class=every_class)
    if seed is not None:
        raise RequestError(
            "--seed: must go with --split: without it all of other data is measured, undivided; "
            "leave it out"
        )
    whole = inp.open_inputs(request, recorded, every_class=False, whole=True)
    train, test = whole.splits.train, whole.splits.test
    undivided = test is not None and test.images is train.images
    if not undivided and before.split_file is None and before.client is None:
        return whole
    as_before = replace(before, reference=request.reference, root=request.root)
    return _as_before(as_before, recorded) or whole


def _as_before(request: inp.DataRequest, recorded: dict[str, Any]) -> inp.Inputs | None:
    """Return data divided as a run's were, if they are those, moved or copied; else None."""
    try:
        found = inp.open_inputs(request, recorded, every_class=False)
    except RequestError:
        return None
    return found if found.describe()["fingerprint"] == recorded["fingerprint"] else None
