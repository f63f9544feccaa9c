"""Names, types and shapes of the tensors in a torch .pt file, without torch and without running anything.

The file is a zip whose data.pkl describes a dictionary of tensors. A pickle is a program; this reads the few
instructions that such a dictionary needs and refuses all others.
"""

from __future__ import annotations

import pickletools
import zipfile
import zlib
from pathlib import Path
from typing import Any

from ..errors import BadCheckpointError
from ..files import require_regular, why

_MOST_BYTES = 64 * 2**20
_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
_TENSOR = "torch._utils _rebuild_tensor_v2"
_DICT = "collections OrderedDict"
_PUSH = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINFLOAT",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class _Mark:
    """Where a tuple or a run of items begins on the stack."""


def read_pickled_header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For each tensor its type as safetensors spells it and its shape. Raises BadCheckpointError."""
    try:
        require_regular(path)
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1 or archive.getinfo(names[0]).file_size > _MOST_BYTES:
                raise ValueError("no data.pkl of a dictionary of tensors in it")
            found = _Reader(archive.read(names[0])).read()
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError, RuntimeError,
            zipfile.BadZipFile, zlib.error, EOFError, OverflowError) as error:  # fmt: skip
        raise BadCheckpointError(f"{path} is not a readable weights file: {why(error)}") from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(t, _Tensor) for k, t in found.items()):
        raise BadCheckpointError(f"{path}: expected a flat dictionary of tensors")
    return {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()}


class _Tensor:
    def __init__(self, storage: Any, offset: Any, shape: Any, *_: Any) -> None:
        kind, name, *_rest = storage
        if kind != "storage" or not isinstance(name, str) or not name.startswith("torch "):
            raise ValueError(f"a tensor of storage {name!r}")
        if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
            raise ValueError("a tensor without shape")
        self.dtype, self.shape = _DTYPES.get(name.removeprefix("torch "), name), shape


class _Reader:
    """Runs the allowed instructions over a stack and a memo."""

    def __init__(self, program: bytes) -> None:
        self.program = program
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        for opcode, argument, _ in pickletools.genops(self.program):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("data.pkl has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSH:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_Mark)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._marked() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(_Tensor(*arguments) if function == _TENSOR else self._empty(function, arguments))
        elif name == "BUILD":
            stack.pop()  # an OrderedDict's _metadata: versions of modules
        elif name == "BINPERSID":
            pass  # a storage: its description stays on the stack
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"its pickle holds {name}, which no dictionary of tensors needs; nothing was executed")

    @staticmethod
    def _global(name: str) -> str:
        if name not in (_TENSOR, _DICT) and not name.startswith("torch "):
            raise ValueError(f"its pickle names {name!r}, which no dictionary of tensors needs; nothing was executed")
        return name

    @staticmethod
    def _empty(function: Any, arguments: Any) -> dict[Any, Any]:
        if function != _DICT or arguments != ():
            raise ValueError(f"its pickle calls {function!r}; nothing was executed")
        return {}

    def _marked(self) -> list[Any]:
        """Takes everything above the last mark off the stack."""
        at = len(self.stack) - 1 - self.stack[::-1].index(_Mark)
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items
