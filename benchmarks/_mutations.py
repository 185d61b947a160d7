"""Ways to damage a file: any bytes, and documents, tables, arrays, texts.

A mutation takes a random generator and the bytes of a sound file, and returns other bytes. Those
that know a format keep it readable and make what it says absurd, so that a reader gets past its
first check. Those of pictures and volumes, and of ONNX graphs, are in files of their own.
"""

import ast
import io
import json
import random
import re
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

Mutation = Callable[[random.Random, bytes], bytes]

EXTREMES = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.5, 2**31, 2**63, -(2**63), 10**30, 1e308,
    float("nan"), float("inf"), float("-inf"), "", " ", "0", "1e400", "é\u0301ß漢", "\u0000",
    "\ud800", "../../etc", "a" * 5000, "=1+1", [], {}, [[]], [None], [1, "a"], {"": None},
    [0] * 1000,
)  # fmt: skip
"""Values that stand where a reader expects others."""


def deep(levels: int = 400) -> Any:
    """Return a list nested as deep as it can be written."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


# ------------------------------------------------------------------------------------- any bytes


def flip(rng: random.Random, data: bytes) -> bytes:
    """Flip some bits."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 64))):
        if found:
            found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def cut(rng: random.Random, data: bytes) -> bytes:
    """Keep the beginning, the end, or nothing."""
    at = rng.randrange(len(data) + 1)
    return rng.choice((data[:at], data[at:], b""))


def move_chunk(rng: random.Random, data: bytes) -> bytes:
    """Delete a chunk, double it, or put it elsewhere."""
    a, b = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    chunk, to = data[a:b], rng.randrange(len(data) + 1)
    without = data[:a] + data[b:]
    return rng.choice((without, data[:b] + data[a:], without[:to] + chunk + without[to:]))


def overwrite_number(rng: random.Random, data: bytes) -> bytes:
    """Write a huge, negative or zero number somewhere, as formats store sizes."""
    form = rng.choice(("<I", ">I", "<Q", ">Q", "<H", "B"))
    most = 2 ** (8 * struct.calcsize(form)) - 1
    number = struct.pack(form, rng.choice((0, 1, most, most // 2, most // 2 + 1, most // 1000)))
    at = rng.randrange(len(data) + 1)
    return data[:at] + number + data[at + len(number) :]


def insert(rng: random.Random, data: bytes) -> bytes:
    """Put bytes in: of noise, of no UTF-8, of another format's beginning."""
    noise = rng.randbytes(rng.choice((1, 4, 300)))
    starts = (
        b"\xff\xfe",
        b"\xef\xbb\xbf",
        b"PK\x03\x04",
        b"\x89PNG\r\n\x1a\n",
        b"\x80\x04.",
        b"\0" * 99,
    )
    at = rng.choice((0, rng.randrange(len(data) + 1), len(data)))
    return data[:at] + rng.choice((noise, *starts)) + data[at:]


BYTES: tuple[Mutation, ...] = (flip, flip, cut, move_chunk, overwrite_number, insert)


# ------------------------------------------------------------------------------------- documents


def change_value_(rng: random.Random, document: Any) -> Any:
    """Change one value in nested objects and lists, its key, or how often it stands."""
    places: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        at = waiting.pop()
        keys = list(at) if isinstance(at, dict) else range(len(at))
        for key in keys:
            places.append((at, key))
            if isinstance(at[key], dict | list):
                waiting.append(at[key])
    if not places or rng.random() < 0.02:
        return rng.choice((*EXTREMES, deep()))
    at, key = rng.choice(places)
    way = rng.randrange(8)
    if way == 0:
        del at[key]
    elif way == 1 and isinstance(at, list):
        at.insert(key, at[key])
    elif way == 1:
        at[rng.choice(("", "x", "é", key + " ", key.upper()))] = at.pop(key)
    elif way == 2 and isinstance(at[key], int | float):
        at[key] = rng.choice((-at[key], at[key] * 2, at[key] + 1, float(at[key]), str(at[key])))
    elif way == 3:
        at[key] = [at[key]]
    elif way == 4:
        other, its = rng.choice(places)
        at[key] = json.loads(json.dumps(other[its])) if its in keys_of(other) else None
    elif way == 5 and rng.random() < 0.2:
        at[key] = deep()
    else:
        at[key] = rng.choice(EXTREMES)
    return document


def keys_of(container: Any) -> Any:
    """Return what a container can be asked for."""
    return container if isinstance(container, dict) else range(len(container))


def change_json(rng: random.Random, data: bytes) -> bytes:
    """Change a value in a JSON file."""
    document = json.loads(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if isinstance(document, dict | list):
            document = change_value_(rng, document)
    return json.dumps(document).encode()


def change_json_lines(rng: random.Random, data: bytes) -> bytes:
    """Change a line of a file with a JSON value in each."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = change_json(rng, lines[at])
    return b"\n".join(lines) + b"\n"


# ---------------------------------------------------------------------------------------- tables


def change_csv(rng: random.Random, data: bytes) -> bytes:
    """Change cells, rows or columns of a CSV."""
    lines = data.decode().splitlines()
    between = "\t" if "\t" in lines[0] else ","
    rows = [line.split(between) for line in lines]
    row, column = rng.randrange(len(rows)), rng.randrange(len(rows[0]))
    way = rng.randrange(9)
    if way == 0:
        rows.insert(row, list(rows[row]))
    elif way == 1:
        del rows[row]
    elif way == 2:
        rows = [r[:column] + r[column + 1 :] for r in rows]
    elif way == 3:
        rows[0][column] = rng.choice(("", "x", "FILE", rows[0][0], "é", "split", "\ufeffimage"))
    elif way == 4:
        rows[row] = rows[row][: rng.randrange(len(rows[row]) + 1)]
    elif way == 5:
        rows[row] += ["more", "cells"]
    else:
        cells = (
            "", " ", '"', '"a""', "\0", "a" * 200_000, "-1", "1e9", "nan", "../../../etc/passwd",
            "/etc/passwd", "é漢", "1", "train", "tset", "0" * 5000, "²", "\r", "file", ".",
        )  # fmt: skip
        rows[row][column] = rng.choice(cells)
    return "\n".join(between.join(r) for r in rows).encode("utf-8", "surrogatepass") + b"\n"


# ---------------------------------------------------------------------------------------- arrays


SHAPES = (
    "(-1, 28)", "(10000000000000,)", "()", "(0,)", "(3, -2, 5, 3)", "(1,) * 9", "'a'", "(2.5,)",
    "(4611686018427387904, 4)", "(True,)", "(" * 300, "(1, 2, 3, 4, 5, 6)", "(100000, 100000)",
)  # fmt: skip
KINDS = ("|u1", "<f8", "|O", "<U4", "|b1", ">i8", "<c16", "<M8[s]", "x", "|V3", "|S0")


def _npy(rng: random.Random, data: bytes) -> bytes:
    """Write the header of an npy file anew, with another type, order or shape."""
    end = data.index(b"\n") + 1
    fields = {key: repr(value) for key, value in ast.literal_eval(data[10:end].decode()).items()}
    name, value = rng.choice((
        ("descr", repr(rng.choice(KINDS))), ("shape", rng.choice(SHAPES)),
        ("fortran_order", rng.choice(("False", "True", "2"))),
    ))  # fmt: skip
    text = "{" + ", ".join(f"'{k}': {v}" for k, v in (fields | {name: value}).items()) + "}"
    header = text.encode().ljust(117) + b"\n"
    return data[:8] + struct.pack("<H", len(header)) + header + data[end:]


def change_npy(rng: random.Random, data: bytes) -> bytes:
    """Change the header or the bytes of an npy file."""
    return _npy(rng, data) if rng.random() < 0.7 else rng.choice(BYTES)(rng, data)


def _other_array(rng: random.Random, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "U":  # of numbers, what follows can be made
        array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    with np.errstate(all="ignore"):
        found: np.ndarray = rng.choice((
            lambda: array.astype(np.float32) / 0, lambda: array.astype(np.int64) - 3,
            lambda: array.astype(np.uint64) + 2**63, lambda: array[:0], lambda: array[:1],
            lambda: array.reshape(-1), lambda: array[None], lambda: array[..., None],
            lambda: np.zeros(()), lambda: array.astype("U3"), lambda: np.array(["a", "b\0", "é"]),
            lambda: np.array([{}], dtype=object), lambda: array.astype(bool),
            lambda: array.astype(">i4"), lambda: np.full_like(array, 255), lambda: array[:, :0],
            lambda: np.zeros((2, 0, 0, 3), np.uint8), lambda: np.zeros(3, "M8[s]"),
            lambda: np.zeros(array.shape, [("a", "u1")]), lambda: array.T,
        ))()  # fmt: skip
    return found


def change_npz(rng: random.Random, data: bytes) -> bytes:
    """Change an array of an npz, its header, its name, or the archive's word on its size."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(list(members))
    way = rng.randrange(7)
    if way == 0:
        members[rng.choice(("x.npy", "é.npy", "../../x.npy", "images.npy", "a" * 300, " "))] = (
            members.pop(name)
        )
    elif way == 1:
        members[name] = change_npy(rng, members[name])
    elif way == 2:
        del members[name]
    elif way == 3:  # zeros that compress a thousandfold
        size = rng.choice((10**5, 10**6, 10**7, 10**8))
        members[name] = members[name][:128] + b"\0" * size
    elif way == 4:
        members[name] = rng.choice(BYTES)(rng, members[name])
    else:
        array = np.load(io.BytesIO(members[name]), allow_pickle=False)
        stream = io.BytesIO()
        np.save(stream, _other_array(rng, array))
        members[name] = stream.getvalue()
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return out.getvalue()


def change_safetensors(rng: random.Random, data: bytes) -> bytes:
    """Change the header of a safetensors file, JSON in its metadata, or its word on its size."""
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size]
    document = json.loads(header)
    texts = {k: v for k, v in document.get("__metadata__", {}).items() if v[:1] in ("{", "[")}
    if texts and rng.random() < 0.5:
        key = rng.choice(list(texts))
        document["__metadata__"][key] = change_json(rng, texts[key].encode()).decode()
        header = json.dumps(document).encode()
    else:
        header = change_json(rng, header)
    said = len(header) if rng.random() < 0.9 else rng.choice((0, 2**63, len(data) + 1, len(data)))
    return struct.pack("<Q", said) + header + data[8 + size :]


# ----------------------------------------------------------------------------------------- texts


WORDS = (
    b"", b"0", b"-1", b"1e9", b"nan", b"inf", b"8 8", b"8 8 3 3", b"100000 100000 100000",
    b"0 0 0", b"-8 -8 3", b"True", b"MET_DOUBLE", b"MET_OTHER", b"LOCAL", b"oct.mhd", b"\xff",
    b"../../x", b"/etc/passwd", b"a" * 5000, b"9" * 5000, "\u00b2".encode(), b"None", b"1_0",
)  # fmt: skip
"""Values in texts."""
_EACH = (b'<!ENTITY e%d "%s">' % (i, b"&e%d;" % (i - 1) * 10 if i else b"ha") for i in range(12))
ENTITIES = b"<!DOCTYPE a [" + b"".join(_EACH) + b"]>"
"""Entities of which each is ten of the one before: the last one would fill the memory."""


def change_xml(rng: random.Random, data: bytes) -> bytes:
    """Change a text or a tag of an XML file, or let it name entities."""
    way = rng.randrange(8)
    if way == 0:
        end = data.index(b">") + 1
        return ENTITIES + data[:end] + b"&e11;" + data[end:]
    if way == 1:
        name = rng.choice((b"size", b"width", b"bndbox", b"xmin", b"object", b"filename"))
        return data.replace(name, rng.choice((b"x", b"object", b"width")))
    places = [found.span(1) for found in re.finditer(rb">([^<>]+)<", data)]
    start, end = rng.choice(places)
    word = rng.choice(WORDS).replace(b"\xff", b"&#xFFFF;") if way == 2 else rng.choice(WORDS)
    return data[:start] + word + data[end:]


def change_lines(rng: random.Random, data: bytes) -> bytes:
    """Change a line of a text, leave one out or double it."""
    lines = data.splitlines()
    at, way = rng.randrange(len(lines)), rng.randrange(4)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(at, lines[at])
    else:
        lines[at] = rng.choice(WORDS)
    return b"\n".join(lines) + b"\n"


def change_python(rng: random.Random, data: bytes) -> bytes:
    """Change a word or a number in a Python file."""
    places = [found.span() for found in re.finditer(rb"[A-Za-z_]\w*|\d[\d_e]*", data)]
    start, end = rng.choice(places)
    words = (b"0", b"-1", b"1e400", b"None", b"{}", b"x", b"'a'", b"TARGET", b"10**30", b"()")
    return data[:start] + rng.choice(words) + data[end:]
