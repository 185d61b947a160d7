"""What every data plugin owes: images without a root, or a refusal that says how to give one."""

import os
from pathlib import Path

import pytest
import torch

from sdq import plugins
from sdq.data import DataOptions, Splits, open_data
from sdq.errors import RequestError
from sdq.run_folder import fingerprint

DATASETS = plugins.names("sdq.datasets")
BUILT_IN = [name for name in DATASETS if name.startswith("synthetic")]
ROOTED = [name for name in DATASETS if name not in BUILT_IN]


def check(splits: Splits) -> None:
    channels, height, width = splits.image_shape
    assert channels in (1, 3)
    assert min(height, width) >= 8
    segmenting = splits.task == "segmentation"
    assert len(splits.class_names) == len(set(splits.class_names)) >= (1 if segmenting else 2)
    for part in (splits.train, splits.val, splits.test):
        assert part is not None
        pixels = part.images.take(torch.tensor([0, len(part) - 1, 0]))
        assert pixels.dtype == torch.uint8
        assert pixels.shape == (3, *splits.image_shape)
        assert torch.equal(pixels[0], pixels[2])
        assert part.labels.dtype == torch.int64
        assert part.labels.shape == (len(part),)
        assert part.images.shape[0] == len(part)
        assert (part.masks is not None) is segmenting
        if part.masks is not None:
            masks = part.masks.take(torch.tensor([0, len(part) - 1]))
            assert masks.dtype == torch.uint8
            assert masks.shape == (2, 1, height, width)
            assert int(masks.max()) <= len(splits.class_names)
        if part.centres is not None:
            assert part.centres.shape == (len(part),)
            assert int(part.centres.max()) < len(splits.centre_names)
    assert splits.checked("here") is splits


def test_there_is_a_built_in_set() -> None:
    assert BUILT_IN == ["synthetic_derm", "synthetic_ich", "synthetic_lesions_seg"]
    assert {"cifar10", "dermamnist", "ham10000", "isic2018", "isic2019", "rsna_ich"} <= set(ROOTED)


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_set_needs_nothing_and_follows_from_its_seed(name: str) -> None:
    first = open_data(name, DataOptions(image_size=16))
    check(first)
    assert first.image_shape[1:] == (16, 16)
    assert fingerprint(first) == fingerprint(open_data(name, DataOptions(image_size=16)))
    assert fingerprint(first) != fingerprint(open_data(name, DataOptions(image_size=16, seed=1)))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_set_has_centres_with_mixes_of_their_own(name: str) -> None:
    splits = open_data(name, DataOptions(image_size=16))
    classes = len(splits.label_names or splits.class_names)
    centres = len(splits.centre_names)
    assert centres >= 4
    for part in (splits.train, splits.test):
        assert part is not None
        assert part.centres is not None
        joint = torch.bincount(part.centres * classes + part.labels, minlength=centres * classes)
        joint = joint.view(centres, classes) / joint.view(centres, classes).sum(1, keepdim=True)
        assert (joint.amax(0) > 1.2 * joint.amin(0)).all()
        assert (joint.amax(0) > 2 * joint.amin(0)).sum() >= classes - 1


@pytest.mark.parametrize("name", ROOTED)
def test_a_set_without_a_root_says_how_to_name_one(name: str) -> None:
    with pytest.raises(RequestError) as caught:
        open_data(name, DataOptions())
    message = str(caught.value)
    assert f"{name!r} is read from a data root" in message
    assert "--data-root DIR or set SDQ_DATA" in message


@pytest.mark.parametrize("name", ROOTED)
def test_an_empty_root_is_named_with_what_belongs_there(name: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        open_data(name, DataOptions(root=tmp_path))
    message = str(caught.value)
    assert message.startswith(name)
    assert str(tmp_path) in message
    assert ";" in message  # and the repair


@pytest.mark.slow
@pytest.mark.parametrize("name", ROOTED)
def test_a_set_that_is_there_is_read(name: str, real_root: Path) -> None:
    try:
        splits = open_data(name, DataOptions(root=real_root, image_size=32))
    except RequestError as error:
        if any(name in entry for entry in os.listdir(real_root)):
            raise
        pytest.skip(f"not in the data root: {error}")
    check(splits)
