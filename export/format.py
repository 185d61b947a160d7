"""What a file format is, and how a network is written in one.

A format is a module ``export/formats/NAME.py`` with the attributes of :class:`Format`. Writing is
the same for all of them: into a temporary folder, whose file is read back and compared with the
policy, and only then takes its place.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from export import network_rules
from export.findings import Finding, refuse
from sdq import plugins
from sdq.batches import Normalization
from sdq.checkpoint import write_bytes_atomically
from sdq.errors import RequestError, RunError
from sdq.policy import FLOAT_BITS, LayerBits
from sdq.quant_model import QuantModel

SCHEMA = "sdq.export/1"
RECORD = "export.json"
VERIFICATION = "verification.json"
"""Beside it: what a verification found, by format; written by the command line."""

RESERVED = ("schema", "format", "policy", "image_shape", "normalization")
"""Metadata keys that the file fills in itself."""


Bits = int | tuple[int, ...]
"""A bitwidth; or one for each output channel of a weight, where they differ."""


@dataclass(frozen=True, eq=False)
class QuantizerInFile:
    """A quantizer as a file has it, read from the file's nodes.

    Args:
        bits: the bitwidth its range of codes has.
        scale: float32, one value or one an output channel ``(K,)``.
        codes: of a weight, in the shape PyTorch gives it ``(K, ...)``; None for an activation.
    """

    bits: Bits
    scale: Tensor
    codes: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Trace:
    """What one pass gave: the network's output, and integer codes by activation quantizer."""

    output: Tensor
    codes: dict[str, Tensor]


Runner = Callable[[Tensor], Trace]
"""Runs the file on float images ``(N, C, H, W)``, or on uint8 ``(N, H, W, C)`` if the file holds
the preprocessing."""


class ToolMissing(RunError):
    """A runtime needs a package or a program that is not installed; the message says which."""


class Format(Protocol):
    """What a module in ``export/formats`` provides.

    Attributes:
        FILE: the name of the file inside the export folder that states the network.
        RUNTIMES: the names of the runtimes :meth:`open_runtime` knows, in the order of the way
            from the file to the device.
        REWRITES: those of them that rewrite the graph before they run it, so that reading the
            codes may change how they compute, and float biases may be rounded: where codes differ
            by a few at most, a warning if no decision does.
        ADVICE: what to do where a runtime deviates through a fault of its own, otherwise than
            those that are not named here. It then gives a warning, and does not decide on the file.

    Optional, in formats that have them: ``OPSETS``, a range of ONNX opsets, of which
    :meth:`write` then takes one as ``opset``; ``container_bytes(path)``, the bytes that the
    weights take in the file; and ``rehearse(qmodel, sample)``, what :meth:`check` cannot tell
    without translating the network.
    """

    FILE: str
    RUNTIMES: tuple[str, ...]
    REWRITES: tuple[str, ...]
    ADVICE: Mapping[str, str]

    def check(self, qmodel: QuantModel, sample: Tensor) -> tuple[Finding, ...]:
        """Return what the format, or the tool that reads it, cannot take in a network.

        Asked before anything is written, also where that tool is not installed.

        Args:
            qmodel: need not be calibrated.
            sample: ``(N, C, H, W)``, for shapes only.
        """

    def write(
        self,
        qmodel: QuantModel,
        folder: Path,
        *,
        sample: Tensor,
        preprocessing: Normalization | None,
        metadata: Mapping[str, str],
    ) -> None:
        """Write ``FILE`` into an empty folder, with the files and folders that belong to it.

        ``qmodel`` is left as it is.
        """

    def bits(self, path: Path) -> dict[str, Bits]:
        """Return the bits of each layer's weight and of each activation quantizer, by name.

        They follow from the file's nodes and constants, not from its metadata; 32 is float.
        """

    def quantizers(self, path: Path) -> dict[str, QuantizerInFile]:
        """Return the quantizers of weights (by layer) and activations (by path)."""

    def metadata(self, path: Path) -> dict[str, str]:
        """Return the file's metadata; RequestError if it is not a file of ours."""

    def run(self, path: Path, inputs: Tensor) -> Tensor:
        """Run the file in the format's own runtime."""

    def open_runtime(self, path: Path, runtime: str, *, taps: bool) -> Runner:
        """Return a runner in one of ``RUNTIMES``; with ``taps`` it also records the codes.

        A runtime that no longer has some quantizer leaves out its codes.

        Raises:
            ToolMissing: it is not installed. The other runtimes are asked all the same.
            RunError: it refuses the file.
        """

    def open_exact(self, path: Path) -> Runner:
        """Return a runner in float64 that records the codes."""


@dataclass(frozen=True)
class ExportResult:
    """A file that was written.

    Args:
        format: plugin name.
        path: of the file.
        sha256: of the file, in hexadecimal.
        weight_bits: of each layer, as read back from the file.
        act_bits: of each activation quantizer, as read back from the file.
        file_bytes: its size.
        weight_bytes: what the weights hold: the sum of their bits, over 8.
        container_bytes: what they are stored in, without scales and names; None if the format does
            not say.
        others: names of the files and folders that were written with it.
    """

    format: str
    path: Path
    sha256: str
    weight_bits: Mapping[str, Bits]
    act_bits: Mapping[str, Bits]
    file_bytes: int
    weight_bytes: float
    container_bytes: int | None = None
    others: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a document that ``json.dumps`` takes; the path is relative to its folder."""
        return {
            "format": self.format,
            "file": self.path.name,
            "sha256": self.sha256,
            "weight_bytes": self.weight_bytes,
            "container_bytes": self.container_bytes,
            "file_bytes": self.file_bytes,
            "weight_bits": {name: _plain(bits) for name, bits in self.weight_bits.items()},
            "act_bits": dict(self.act_bits),
            "others": list(self.others),
        }


def load_format(name_or_format: "str | Format") -> tuple[str, Format]:
    """Return a format's plugin name and the format.

    Raises:
        RequestError: no such format; the message offers the nearest name.
    """
    if not isinstance(name_or_format, str):
        return _name(name_or_format), name_or_format
    module = cast(Format, plugins.load("export.formats", name_or_format))
    return _name(module), module


def _name(plugin: Format) -> str:
    """Return a format's name as the command line has it, with dashes."""
    return plugins.name_of(str(getattr(plugin, "__name__", ""))).replace("_", "-")


def check(qmodel: QuantModel, *, format: "str | Format", sample: Tensor) -> tuple[Finding, ...]:
    """Return what stands against writing a network in a format; empty if nothing does.

    Args:
        qmodel: need not be calibrated.
        format: a plugin name of ``export.formats``, or such a module.
        sample: an input ``(N, C, H, W)``, for shapes only.

    Raises:
        RequestError: no such format.
    """
    _, plugin = load_format(format)
    return (*network_rules.check(qmodel), *plugin.check(qmodel, sample))


def rehearse(qmodel: QuantModel, *, format: "str | Format", sample: Tensor) -> tuple[Finding, ...]:
    """Return what stands against writing a network as far as only trying shows it.

    It takes as long as writing does. :func:`check`, whose arguments and errors it has, is quick
    and asked before every export.
    """
    _, plugin = load_format(format)
    found = check(qmodel, format=plugin, sample=sample)
    if found or not hasattr(plugin, "rehearse"):
        return found
    tried: tuple[Finding, ...] = plugin.rehearse(qmodel, sample)
    return tried


def expected_bits(qmodel: QuantModel) -> dict[str, Bits]:
    """Return the bits a file of this network must have: of the policy, and of its activations."""
    weights = {bits.name: _expected(bits) for bits in qmodel.policy}
    return weights | {name: q.bits for name, q in qmodel.act_quantizers().items()}


def _expected(layer: LayerBits) -> Bits:
    each = layer.channel_bits
    return layer.weight_bits if each is None or len(set(each)) == 1 else each


def _plain(bits: Bits) -> int | list[int]:
    return bits if isinstance(bits, int) else list(bits)


def write(
    qmodel: QuantModel,
    folder: str | Path,
    *,
    format: "str | Format",
    sample: Tensor,
    preprocessing: Normalization | None = None,
    metadata: Mapping[str, object] | None = None,
    overwrite: bool = False,
    opset: int | None = None,
) -> ExportResult:
    """Write a quantized network to ``folder`` in a format, and read its bitwidths back.

    The file appears whole or not at all, and ``qmodel`` is left as it is, also when this fails.

    Args:
        qmodel: calibrated; on any device, in either mode.
        folder: made if it does not exist. Besides the file it gets ``export.json``.
        format: a plugin name of ``export.formats``, or such a module.
        sample: an input ``(N, C, H, W)``, for shapes only; the file takes batches of any size.
        preprocessing: put into the file, which then takes uint8 pixels ``(N, H, W, C)``.
        metadata: written into the file; values that are not text become JSON.
        overwrite: replace the format's file if there is one.
        opset: of ONNX; None: what the format prefers.

    Raises:
        RequestError: the network is not calibrated or still being searched, the format cannot take
            it (all findings in one message), the sample does not fit, the file exists already, the
            format does not have the opset, or a metadata key is the file's own.
        RunError: the exporter failed, or the file's bitwidths are not the policy's.
        OSError: the folder cannot be written, or the disk is full.
    """
    name, plugin = load_format(format)
    options = _options(name, plugin, opset)
    texts = _texts(qmodel, name, sample, preprocessing, metadata or {})
    _check_network(qmodel)
    refuse(name, check(qmodel, format=plugin, sample=sample))
    folder = Path(folder)
    target = folder / plugin.FILE
    if target.exists() and not overwrite:
        raise RequestError(
            f"export: {str(target)!r} must not exist yet; choose another folder, "
            "or pass --overwrite (overwrite=True)"
        )
    record = read_record(folder)
    with _folder(folder):
        temporary = folder / f".{name}.{os.getpid()}.part"
        temporary.mkdir()
        try:
            plugin.write(
                qmodel, temporary, sample=sample, preprocessing=preprocessing, metadata=texts,
                **options,
            )  # fmt: skip
            written = temporary / plugin.FILE
            bits = plugin.bits(written)
            _check_bits(bits, expected_bits(qmodel))
            content = written.read_bytes()
            others = sorted(path.name for path in temporary.iterdir() if path != written)
            layers = [layer.name for layer in qmodel.policy]
            weighty = [spec.name for spec in qmodel.layers if spec.kind != "float"]
            stored = getattr(plugin, "container_bytes", None)
            result = ExportResult(
                name,
                target,
                hashlib.sha256(content).hexdigest(),
                {layer: bits[layer] for layer in layers},
                {key: value for key, value in bits.items() if key not in layers},
                len(content),
                sum(qmodel.policy[name].total_weight_bits for name in weighty) / 8,
                stored(written) if stored else None,
                tuple(others),
            )
            record[name] = result.to_json() | {"policy": json.loads(qmodel.policy.to_json())}
            document = json.dumps({"schema": SCHEMA, "exports": record}, indent=2) + "\n"
            _sync(written)
            # the record first: if the disk is full now, the old file stays, or none is there
            write_bytes_atomically(folder / RECORD, document.encode())
            for other in others:
                _remove(folder / other)
                os.replace(temporary / other, folder / other)
            os.replace(written, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return result


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_record(folder: Path) -> dict[str, Any]:
    """Return what ``export.json`` in a folder says, by format; empty if there is none.

    Raises:
        RequestError: there is one, but it is not of this schema.
    """
    path = folder / RECORD
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, RecursionError, OSError):
        document = None
    exports = document.get("exports") if isinstance(document, dict) else None
    if not isinstance(exports, dict) or document.get("schema") != SCHEMA:
        raise RequestError(
            f"{path}: must be of schema {SCHEMA!r}, got something else; "
            "remove it, or choose another folder"
        )
    return exports


def _options(name: str, plugin: Format, opset: int | None) -> dict[str, int]:
    """Return what the format's writer takes besides, or raise RequestError."""
    if opset is None:
        return {}
    known = getattr(plugin, "OPSETS", None)
    if known is None:
        raise RequestError(
            f"export: opset must not be given for the format {name!r}, which has one of its own, "
            f"got {opset}; leave it out"
        )
    if opset not in known:
        raise RequestError(
            f"export: opset of the format {name!r} must be {known[0]} to {known[-1]}, got {opset}"
        )
    return {"opset": opset}


def _texts(
    qmodel: QuantModel,
    name: str,
    sample: Tensor,
    preprocessing: Normalization | None,
    metadata: Mapping[str, object],
) -> dict[str, str]:
    taken = [key for key in metadata if key in RESERVED]
    if taken:
        raise RequestError(
            f"export: metadata must not have the key {taken[0]!r}, which the file fills in; "
            "rename it"
        )
    texts = {
        "schema": SCHEMA, "format": name, "policy": qmodel.policy.to_json(),
        "image_shape": json.dumps(list(sample.shape[1:])),
    }  # fmt: skip
    if preprocessing is not None:
        values = {"mean": preprocessing.mean, "std": preprocessing.std}
        texts["normalization"] = json.dumps(values)
    for key, value in metadata.items():
        texts[key] = value if isinstance(value, str) else json.dumps(value)
    return texts


def _check_network(qmodel: QuantModel) -> None:
    if not qmodel.calibrated:
        raise RequestError(
            "export: activation scales must be calibrated, got some that are not; "
            "call sdq.calibrate_(qmodel, batches)"
        )
    for bits in qmodel.policy:
        if bits.weight_bits != FLOAT_BITS:
            qmodel.settled_quantizer(bits.name)


def _check_bits(found: Mapping[str, Bits], expected: Mapping[str, Bits]) -> None:
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise RunError(
                f"export: {name}: bits in the file must be {expected.get(name)!r:.100}, as in the "
                f"policy, got {found.get(name)!r:.100}; nothing was written"
            )


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder; if the block fails, take away what was made."""
    made = next((p for p in [*reversed(folder.parents), folder] if not p.exists()), None)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        raise
