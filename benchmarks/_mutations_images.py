"""Mutations of pictures and volumes: PNG, JPEG, DICOM, NIfTI and MetaImage."""

import gzip
import io
import random
import struct
import zlib

from _mutations import BYTES, WORDS

NIFTI = (
    (0, "<i", (0, 1, 540, -1)), (40, "<h", (-1, 0, 2, 4, 8)), (42, "<h", (-1, 0, 1, 32767)),
    (44, "<h", (-1, 0, 9, 32767)), (46, "<h", (-1, 0, 1, 32767)),
    (70, "<h", (0, 1, 16, 32, 64, 128, 256, 1536, 9999)), (72, "<h", (0, 1, 64, -8)),
    (108, "<f", (0.0, 1e9, -4.0, float("nan"))), (112, "<f", (0.0, 1e38, float("nan"), -1.0)),
    (116, "<f", (1e38, float("inf"), -5.0)), (344, "<i", (0, 0x00326E2B)),
)  # fmt: skip
"""Fields of a NIfTI-1 header: place, form and values that make little sense."""


def change_nifti(rng: random.Random, data: bytes) -> bytes:
    """Change a field of a NIfTI header: sizes, type, where the voxels begin, their scale."""
    at, form, values = rng.choice(NIFTI)
    return data[:at] + struct.pack(form, rng.choice(values)) + data[at + struct.calcsize(form) :]


def change_gzip(rng: random.Random, data: bytes) -> bytes:
    """Change what a gzip archive holds: a NIfTI file, or any bytes."""
    inside = gzip.decompress(data)
    mutation = change_nifti if inside[344:347] == b"n+1" else rng.choice(BYTES)
    return gzip.compress(mutation(rng, inside), 1)


def change_fields(rng: random.Random, data: bytes) -> bytes:
    """Change a line ``key = value`` of a header before voxels, or leave one out or double it."""
    header, mark, rest = data.partition(b"ElementDataFile = ")
    lines = header.splitlines(keepends=True)
    at, way = rng.randrange(len(lines)), rng.randrange(6)
    if way == 0:
        del lines[at]
    elif way == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif way == 2:
        end = rest.find(b"\n")
        rest = rng.choice(WORDS) + rest[end:]
    else:
        lines[at] = lines[at].partition(b"=")[0] + b"= " + rng.choice(WORDS) + b"\n"
    return b"".join(lines) + mark + rest


def change_png(rng: random.Random, data: bytes) -> bytes:
    """Change the header chunk of a PNG, with its checksum made right."""
    width, height = (rng.choice((0, 1, 65535, 2**31 - 1, 2**32 - 1, 30000)) for _ in range(2))
    depth, colour = rng.choice((0, 1, 8, 16, 255)), rng.choice((0, 2, 3, 4, 6, 9))
    chunk = b"IHDR" + struct.pack(
        ">IIBBBBB", width, height, depth, colour, 0, 0, rng.choice((0, 1))
    )
    return data[:12] + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def other_mode(rng: random.Random, data: bytes) -> bytes:
    """Write an image of another mode or size."""
    from PIL import Image

    mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "F"))
    size = rng.choice(((1, 1), (8, 8), (3, 200), (1, 5000)))
    stream = io.BytesIO()
    kind = {"CMYK": "JPEG", "F": "TIFF"}.get(mode, "PNG")
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


ELEMENTS = (
    "Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "SamplesPerPixel",
    "PixelRepresentation", "NumberOfFrames", "RescaleSlope", "RescaleIntercept", "PixelData",
    "PhotometricInterpretation", "PatientID",
)  # fmt: skip


def change_dicom(rng: random.Random, data: bytes) -> bytes:
    """Change an element of a DICOM file."""
    import pydicom

    found = pydicom.dcmread(io.BytesIO(data))
    name = rng.choice(ELEMENTS)
    if rng.random() < 0.3:
        if name in found:
            delattr(found, name)
    elif name in ("RescaleSlope", "RescaleIntercept"):
        setattr(found, name, rng.choice(("1e300", "0", "-1e300", "", "1")))
    elif name == "PixelData":
        found.PixelData = rng.choice((b"", b"\0\0", found.PixelData[:10], found.PixelData * 2))
    elif name in ("PhotometricInterpretation", "PatientID"):
        setattr(found, name, rng.choice(("", "RGB", "PALETTE COLOR", "X" * 16)))
    else:
        setattr(found, name, rng.choice((0, 1, 3, 12, 16, 32, 65535)))
    stream = io.BytesIO()
    found.save_as(stream)
    return stream.getvalue()
