"""The folder a run writes: what was asked, what came out, and enough to go on after a crash.

==========================  =======================================================================
``run.json``                what was asked, versions, seed, data fingerprint, model, status
``policy.json``             the bitwidth policy
``layers.json``             shapes and MACs of the quantizable layers
``model.safetensors``       the result's weights (quantized runs: with scales)
``float.safetensors``       quantized runs: the float weights they started from
``folded.safetensors``      of ``batch_norm="fold"``: the layers' weights, folded, not yet trained
``metrics.json``            what the result is worth
``log.jsonl``               one record an epoch
``predictions.safetensors`` labels and logits on the test images, unless they are large
``report.html``             a page about all of it; see :mod:`sdq.report`
``checkpoints/``            one file a phase
``plots/``                  quantized and searched runs: pictures of them; see :mod:`sdq.plots`
==========================  =======================================================================

Every file is written whole or not at all.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch
from pydantic import ValidationError

from sdq.checkpoint import Checkpoint, load_tensors, save_tensors, write_bytes_atomically
from sdq.data import ImageSet, Splits
from sdq.errors import RequestError, RunError
from sdq.layers import Between, LayerSpec
from sdq.policy import BitwidthPolicy
from sdq.run_document import check_document, check_metrics, checked_layers, first_of

SCHEMA = "sdq.run/1"


class RunFolder:
    """A run's folder, held by one process at a time.

    Use as a context manager: the lock is released at the end. Made by :meth:`create` or, for
    reading, :meth:`open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @classmethod
    def create(cls, path: Path, request: Mapping[str, Any], *, resume: bool) -> "RunFolder":
        """Make a new run folder, or take up an interrupted run.

        Args:
            path: of the folder; it must not exist, or be empty, unless resuming.
            request: what was asked, as JSON values; a resumed run must ask the same.
            resume: go on with the run in ``path``.

        Raises:
            RequestError: the folder exists; or there is nothing to resume; or the run in it was
                asked something else; or another process holds it.
        """
        run = cls(path)
        check_new(path, resume=resume)
        if resume:
            run._check_same_request(dict(request))
        path.mkdir(parents=True, exist_ok=True)
        run._take_lock()
        with contextlib.ExitStack() as on_failure:
            on_failure.push(run)
            for part in path.rglob(".*.part"):  # of a process that was killed while it wrote
                part.unlink()
            if not resume:
                begun = {"schema": SCHEMA, "status": "running", "request": dict(request)}
                run.write_json("run.json", begun | {"versions": versions()})
            on_failure.pop_all()
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open a run folder for reading; RequestError if it is none."""
        run = cls(path)
        document = run.read_json("run.json")
        if document.get("schema") != SCHEMA:
            raise RequestError(
                f"{path / 'run.json'}: schema must be {SCHEMA!r}, got {document.get('schema')!r}; "
                "it was written by another version of sdq"
            )
        check_document(path / "run.json", document)
        return run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115 - held for the run's life
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            self._lock = None
            raise RequestError(
                f"{self.path}: another sdq process is working in this folder; wait for it"
            ) from None

    def _check_same_request(self, request: dict[str, Any]) -> None:
        before = _flat(RunFolder.open(self.path).read_json("run.json").get("request", {}))
        now = _flat(json.loads(json.dumps(request)))
        for key in [*now, *before]:
            if _without_place(key, before.get(key)) != _without_place(key, now.get(key)):
                raise RequestError(
                    f"--resume: {key} must be as in the interrupted run, "
                    f"{before.get(key)!r}, got {now.get(key)!r}; repeat the same command, "
                    "or start in a new folder"
                )

    def update(self, **fields: Any) -> None:
        """Add fields to ``run.json``."""
        self.write_json("run.json", {**self.read_json("run.json"), **fields})

    def write_json(self, name: str, document: Any) -> None:
        """Write a JSON file, atomically; RunError if a number in it is NaN or infinite."""
        self.write_text(name, self._text(name, document, indent=2) + "\n")

    def _text(self, name: str, document: Any, indent: int | None = None) -> str:
        """Return a document as JSON; RunError if a number in it is NaN or infinite."""
        try:
            return json.dumps(document, indent=indent, allow_nan=False)
        except ValueError:
            raise RunError(
                f"{self.path / name}: numbers must be finite, got NaN or infinity; "
                "lower the learning rate"
            ) from None

    def write_text(self, name: str, text: str) -> None:
        """Write a text file, atomically."""
        write_bytes_atomically(self.path / name, text.encode())

    def read_json(self, name: str) -> dict[str, Any]:
        """Read a JSON object; RequestError if it is absent or damaged."""
        path = self.path / name
        if not path.is_file():
            raise RequestError(
                f"{self.path}: must be a run folder, but has no {name}; give the --out of an "
                "earlier run that ended well"
            )
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: must be JSON, {error}") from None
        if not isinstance(document, dict):
            raise RequestError(f"{path}: must be a JSON object, got {type(document).__name__}")
        return document

    def read_metrics(self) -> dict[str, Any]:
        """Read ``metrics.json``; RequestError if it is absent, damaged, or not of metrics."""
        document = self.read_json("metrics.json")
        check_metrics(self.path / "metrics.json", document)
        return document

    def write_tensors(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a safetensors file, atomically."""
        save_tensors(self.path / name, tensors)

    def read_tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Read a safetensors file; RequestError if it is absent or damaged."""
        return load_tensors(self.path / name)[0]

    def write_policy(self, policy: BitwidthPolicy) -> None:
        """Write ``policy.json``, and to ``run.json`` its SHA-256."""
        text = policy.to_json()
        self.write_text("policy.json", text)
        self.update(policy_sha256=hashlib.sha256(text.encode()).hexdigest())

    def read_policy(self) -> BitwidthPolicy:
        """Read ``policy.json``.

        Raises:
            RequestError: there is none, it is damaged, or it is another than the run wrote.
        """
        path = self.path / "policy.json"
        policy = BitwidthPolicy.load(path)
        wrote = self.read_json("run.json").get("policy_sha256")
        if wrote not in (None, hashlib.sha256(path.read_bytes()).hexdigest()):
            raise RequestError(
                f"{path}: must be the policy that the run was trained with, but was changed since; "
                "put it back, or give the changed one to `sdq quantize --policy`"
            )
        return policy

    def write_layers(self, layers: tuple[LayerSpec, ...]) -> None:
        """Write ``layers.json``."""
        self.write_json("layers.json", {"layers": [asdict(layer) for layer in layers]})

    def read_log(self) -> list[dict[str, Any]]:
        """Return the records of ``log.jsonl``, none if there is no such file.

        Raises:
            RequestError: a line is no JSON object.
        """
        path = self.path / "log.jsonl"
        try:
            records = [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]
            json.dumps(records, allow_nan=False)  # Python reads NaN, which is no JSON
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:
            raise RequestError(f"{path}: must have JSON in every line, {error!s:.200}") from None
        if not all(isinstance(record, dict) for record in records):
            raise RequestError(f"{path}: must have a JSON object in every line; remove the file")
        return records

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one epoch's record to ``log.jsonl``, in place of an earlier one of that epoch.

        The file is written anew: appending could leave half a line, and an epoch whose checkpoint
        was not saved any more is run again.
        """
        of = (record.get("phase"), record.get("epoch"))
        kept = [x for x in self.read_log() if (x.get("phase"), x.get("epoch")) != of]
        texts = [self._text("log.jsonl", x) for x in (*kept, dict(record))]
        self.write_text("log.jsonl", "\n".join(texts) + "\n")

    def checkpoint(self, phase: str, identity: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint of a phase."""
        return Checkpoint(self.path / "checkpoints" / f"{phase}.safetensors", identity)

    @property
    def done(self) -> bool:
        """Whether the run ended well."""
        return self.read_json("run.json").get("status") == "done"


def check_new(path: Path, *, resume: bool) -> None:
    """Raise RequestError if ``path`` is taken, or if there is nothing to resume in it.

    Cheap, so that nobody waits for data to load only to be refused.
    """
    if resume:
        if not (path / "run.json").is_file():
            raise RequestError(
                f"--resume: no run to continue in {str(path)!r}; start without --resume"
            )
    elif path.exists() and (not path.is_dir() or any(not _is_ours(p) for p in path.iterdir())):
        raise RequestError(
            f"--out: folder must be new or empty, got {str(path)!r}; "
            "choose another, or pass --resume to continue an interrupted run in it"
        )


def _is_ours(path: Path) -> bool:
    """Tell whether this is what a run leaves in a folder before it has written ``run.json``."""
    return path.name == ".lock" or path.suffix == ".part"


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested objects by ``outer.inner``."""
    flat: dict[str, Any] = {}
    for key, value in document.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def read_layers(path: Path) -> tuple[LayerSpec, ...]:
    """Read ``layers.json``; RequestError if it is absent or damaged."""
    document = RunFolder(path.parent).read_json(path.name)
    try:
        for layer in document["layers"]:
            _spec(layer)  # raises for a field that is unknown
        return checked_layers(json.dumps(document["layers"]))
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        reason = first_of(error) if isinstance(error, ValidationError) else error
        raise RequestError(
            f"{path}: must list layer specifications, but: {reason!s:.200}"
        ) from None


def _spec(layer: dict[str, Any]) -> LayerSpec:
    before = tuple(Between(**operation) for operation in layer.get("before", ()))
    return LayerSpec(**{**layer, "before": before})


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in ("sdq", "torch", "brevitas", "numpy", "lightning-fabric"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # used from a source tree
            found[package] = "unknown"
    return found


PLACES = ("data.reference", "data.root", "data.split_file", "clients")
"""Of a request, paths of data: where they are may change; that they do not, a fingerprint says."""


def _without_place(key: str, value: Any) -> Any:
    return os.path.basename(value) if key in PLACES and isinstance(value, str) else value


def fingerprint(splits: Splits, sample: int = 256) -> str:
    """Return a hash of labels, shapes and evenly spaced images and masks of every split."""
    digest = hashlib.sha256()
    for part in (splits.train, splits.val, splits.test):
        if part is not None:
            _add(digest, part, sample)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", part: ImageSet, sample: int) -> None:
    digest.update(repr(part.images.shape).encode())
    digest.update(part.labels.numpy().tobytes())
    indices = torch.linspace(0, len(part) - 1, min(sample, len(part))).long()
    digest.update(part.images.take(indices).contiguous().numpy().tobytes())
    if part.masks is not None:
        digest.update(part.masks.take(indices).contiguous().numpy().tobytes())
