"""What an ONNX file says of itself, read from its protobuf without the onnx package: inputs, outputs, data files.

Field numbers are those of onnx.proto (ModelProto.graph = 7, GraphProto.node = 1, …), which never change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import BadBundleError
from ..files import read_bytes, why
from .interface import Interface, TensorShape

_TYPES = {1: "float32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}
_DEPTH = 32
_MOST_BYTES = 2**28  # weights lie in data files; what is left are a few hundred kilobytes
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

Buffer = memoryview


@dataclass
class OnnxFile:
    """inputs and outputs by name; data: names of the files that hold its weights; nested: it has graphs inside its
    graph, as Loop, Scan and If have."""

    inputs: Interface = field(default_factory=dict)
    outputs: Interface = field(default_factory=dict)
    data: set[str] = field(default_factory=set)
    nested: bool = False


def read_onnx(path: Path) -> OnnxFile:
    """Reads an ONNX file's description. Raises BadBundleError if it is not one."""
    found = OnnxFile()
    try:
        _model(memoryview(read_bytes(path, _MOST_BYTES)), found)
    except (ValueError, IndexError, OSError, UnicodeDecodeError, RecursionError) as error:
        raise BadBundleError(f"{path} is not a whole ONNX file: {why(error)}. Build the bundle again") from None
    return found


def _model(buffer: Buffer, found: OnnxFile) -> None:
    graphs = 0
    for number, value in _fields(buffer):
        if number == 7 and isinstance(value, memoryview):
            graphs += 1
            _graph(value, found, 0, outer=True)
        elif number == 25 and isinstance(value, memoryview):  # functions
            for inner, node in _messages(value):
                if inner == 7:
                    _node(node, found, 0)
    if graphs != 1:
        raise ValueError(f"{graphs} graphs in it, expected one")


def _graph(buffer: Buffer, found: OnnxFile, depth: int, outer: bool = False) -> None:
    if depth > _DEPTH:
        raise ValueError("graphs nested too deep")
    for number, value in _messages(buffer):
        if number == 1:
            _node(value, found, depth)
        elif number == 5:
            _tensor(value, found)
        elif number == 15:  # sparse: values and indices
            for inner, tensor in _messages(value):
                if inner in (1, 2):
                    _tensor(tensor, found)
        elif outer and number in (11, 12):
            name, shape = _value_info(value)
            (found.inputs if number == 11 else found.outputs)[name] = shape


def _node(buffer: Buffer, found: OnnxFile, depth: int) -> None:
    for number, attribute in _messages(buffer):
        if number != 5:
            continue
        for inner, value in _messages(attribute):
            if inner in (5, 10):  # t, tensors
                _tensor(value, found)
            elif inner in (6, 11):  # g, graphs
                found.nested = True
                _graph(value, found, depth + 1)
            elif inner in (22, 23):  # sparse tensors
                for part, tensor in _messages(value):
                    if part in (1, 2):
                        _tensor(tensor, found)


def _tensor(buffer: Buffer, found: OnnxFile) -> None:
    external, location = False, None
    for number, value in _fields(buffer):
        if number == 14:
            external = value == 1
        elif number == 13 and isinstance(value, memoryview):
            entry = {inner: bytes(text).decode("utf-8") for inner, text in _messages(value)}
            if entry.get(1) == "location":
                location = entry.get(2, "")
    if location is not None:
        found.data.add(location)
    elif external:
        raise ValueError("a tensor in a data file without name")


def _value_info(buffer: Buffer) -> tuple[str, TensorShape]:
    name, dtype, dims = "", "", []
    for number, value in _messages(buffer):
        if number == 1:
            name = bytes(value).decode("utf-8")
        elif number == 2:
            for kind, tensor in _messages(value):
                if kind != 1:
                    continue
                for inner, part in _fields(tensor):
                    if inner == 1 and isinstance(part, int):
                        dtype = _TYPES.get(part, f"type {part}")
                    elif inner == 2 and isinstance(part, memoryview):
                        dims = [_dim(dim) for axis, dim in _messages(part) if axis == 1]
    return name, TensorShape(dtype, tuple(dims))


def _dim(buffer: Buffer) -> int | None:
    """A fixed size, or None for a free axis."""
    for number, value in _fields(buffer):
        if number == 1 and isinstance(value, int):
            return value
    return None


def _messages(buffer: Buffer) -> Iterator[tuple[int, Buffer]]:
    """The fields that hold bytes."""
    for number, value in _fields(buffer):
        if isinstance(value, memoryview):
            yield number, value


def _fields(buffer: Buffer) -> Iterator[tuple[int, int | Buffer]]:
    """Field numbers and values of one message."""
    at, end = 0, len(buffer)
    while at < end:
        key = buffer[at]
        if key < 0x80:  # nearly all: a bundle has 20,000 fields
            at += 1
        else:
            key, at = _varint(buffer, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(buffer, at)
            yield number, value
            continue
        if kind == _BYTES:
            size = buffer[at]
            if size < 0x80:
                at += 1
            else:
                size, at = _varint(buffer, at)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > end:
            raise ValueError("it ends inside a field")
        if kind == _BYTES:
            yield number, buffer[at : at + size]
        at += size


def _varint(buffer: Buffer, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = buffer[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
