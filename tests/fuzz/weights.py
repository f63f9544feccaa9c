"""Mutations of safetensors and .pt files: header length, offsets, types, shapes, names, and the numbers themselves."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

from .change import Change, Random, flipped, pick
from .sources import Source
from .values import ODD, Raw, dumps

TYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U64",
    "BOOL",
    "F8_E4M3",
    "F4",
    "f32",
    "C64",
    "",
)
SIZES = (0, 1, 2, 3, -1, 2**31, 2**32, 2**40, 2**63, 2**64, 10**30, 1.5, True, None, "8")


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes, numbers: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + numbers


def _file(rng: Random, source: Source) -> str:
    return pick(rng, source.files, ".safetensors")


def length(rng: Random, source: Source) -> Change:
    name = _file(rng, source)
    data = source.files[name]
    true = struct.unpack("<Q", data[:8])[0]
    value = rng.choice((0, 1, true - 1, true + 1, true + 8, len(data), 2**31, 2**40, 2**63, 2**64 - 1))
    return Change(files={name: struct.pack("<Q", value) + data[8:]}, note=f"{name}: header of {value} bytes")


def _edited(rng: Random, source: Source, edit: Callable[[Random, dict[str, Any], str], str]) -> Change:
    name = _file(rng, source)
    header, numbers = split(source.files[name])
    key = rng.choice([key for key in header if key != "__metadata__"])
    note = edit(rng, header, key)
    return Change(files={name: joined(dumps(header), numbers)}, note=f"{name}, {key}: {note}")


def offsets(rng: Random, source: Source) -> Change:
    def edit(rng: Random, header: dict[str, Any], key: str) -> str:
        start, end = header[key]["data_offsets"]
        other = rng.choice([k for k in header if k != "__metadata__"])
        new = rng.choice(
            ([end, start], [start, end + 4], [start + 4, end], [0, end - start], [0, 0], [start, start], [-1, end],
             [start, 2**63], [2**64 - 4, 2**64], [start], [start, end, end], header[other]["data_offsets"], "x", None,
             [float(start), float(end)], [start, rng.choice(SIZES)])
        )  # fmt: skip
        header[key]["data_offsets"] = new
        return f"offsets {new}"

    return _edited(rng, source, edit)


def dtype(rng: Random, source: Source) -> Change:
    def edit(rng: Random, header: dict[str, Any], key: str) -> str:
        header[key]["dtype"] = rng.choice((*TYPES, *ODD))
        return f"dtype {header[key]['dtype']!r}"

    return _edited(rng, source, edit)


def shape(rng: Random, source: Source) -> Change:
    def edit(rng: Random, header: dict[str, Any], key: str) -> str:
        old = list(header[key]["shape"])
        at = rng.randrange(max(len(old), 1))
        size = old[at] if old else 1
        changed = [*old[:at], rng.choice((*SIZES, size + 1, size * 2)), *old[at + 1 :]]
        new = rng.choice(
            (changed, changed, old[::-1], [*old, 1], [1, *old], old[1:], [], "x", None, [old], [2**40, 2**40])
        )
        header[key]["shape"] = new
        return f"shape {new}"

    return _edited(rng, source, edit)


def names(rng: Random, source: Source) -> Change:
    def edit(rng: Random, header: dict[str, Any], key: str) -> str:
        action = rng.randrange(6)
        new = rng.choice(
            (key + "x", "", "a" * 300, "0." + key, "model." + key, "\ud800", "__metadata__", "../x", "9999.weight")
        )
        if action < 3:
            header[new] = header.pop(key)
            return f"renamed {new[:40]!r}"
        if action == 3:
            del header[key]
            return "removed"
        if action == 4:
            header["__metadata__"] = rng.choice((*ODD, {"format": 1}, {"format": "x" * 10**5}))
            return "metadata"
        header[key] = rng.choice((*ODD, Raw("NaN"), Raw("[" * 10_000 + "]" * 10_000)))
        return "entry of another type"

    return _edited(rng, source, edit)


def header_bytes(rng: Random, source: Source) -> Change:
    name = _file(rng, source)
    header, numbers = split(source.files[name])
    text = flipped(rng, json.dumps(header).encode(), 4)
    return Change(files={name: joined(text, numbers)}, note=f"{name}: bytes of the header changed")


def numbers(rng: Random, source: Source) -> Change:
    """Numbers of one tensor: another weight is another model; NaN and infinity must be named if they matter."""
    name = pick(rng, source.files, ".safetensors", ".data")
    data = bytearray(source.files[name])
    start = 0 if name.endswith(".data") else 8 + struct.unpack("<Q", data[:8])[0]
    at = start + rng.randrange((len(data) - start) // 4) * 4
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 1e38, -1e30, 0.0, 1.0, 100.0))
    count = rng.choice((1, 16, 1024))
    piece = struct.pack("<f", value) * count
    data[at : at + len(piece)] = piece[: len(data) - at]
    return Change(
        files={name: bytes(data)}, note=f"{name}: {count} numbers are {value} at {at}", asked="another weight"
    )


def pickled(rng: Random, source: Source) -> Change:
    """A .pt file: other instructions, calls of a function, or a damaged archive."""
    name = "image_decoder/model.pt"
    data = source.files[name]
    action = rng.randrange(4)
    if action == 0:
        return Change(files={name: flipped(rng, data)}, note="archive: bytes changed", asked="another weight")
    inner = {
        info.filename: zipfile.ZipFile(io.BytesIO(data)).read(info)
        for info in zipfile.ZipFile(io.BytesIO(data)).infolist()
    }
    program = next(n for n in inner if n.endswith("data.pkl"))
    if action == 1:
        call = rng.choice((b"cos\nsystem\n", b"cbuiltins\nexec\n", b"csubprocess\ncall\n", b"cbuiltins\neval\n"))
        inner[program] = b"\x80\x02" + call + b"(X\x04\x00\x00\x00exit\x85R."
    elif action == 2:
        inner[program] = flipped(rng, inner[program], 4)
    else:
        victim = rng.choice(sorted(inner))
        inner[victim] = rng.choice((b"", flipped(rng, inner[victim] or b"x"), b"\0" * 10**6))
    buffer = io.BytesIO()
    with zipfile.ZipFile(
        buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    ) as archive:
        for path, content in inner.items():
            archive.writestr(path, content)
    return Change(files={name: buffer.getvalue()}, note=f"archive: kind {action}", asked="another weight")


MUTATIONS: dict[str, Callable[[Random, Source], Change]] = {
    "header length": length,
    "tensor offsets": offsets,
    "tensor dtype": dtype,
    "tensor shape": shape,
    "tensor names": names,
    "header bytes": header_bytes,
}
