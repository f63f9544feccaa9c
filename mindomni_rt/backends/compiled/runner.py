"""Memory of a runtime, as the compiled stages see it: an address, a shape, a type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...bundle.contracts import DTYPE_BYTES

# numpy has no bfloat16: such numbers travel as the upper half of a float32.
NUMPY: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "bool": np.dtype(np.bool_),
}


def encode(array: Any, dtype: str) -> NDArray[Any]:
    """A host array in the bits of a type; bfloat16 is rounded to even, as the hardware does."""
    if dtype != "bfloat16":
        return np.ascontiguousarray(array, NUMPY[dtype])
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def decode(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The float32 (or integer) numbers behind the bits of a type."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32) if dtype == "float16" else array


@dataclass(frozen=True)
class DeviceArray:
    """A contiguous array. owner keeps the memory alive; offset is this view's first byte in it."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str
    owner: Any
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    def _view(self, skip: int, shape: tuple[int, ...]) -> DeviceArray:
        ahead = skip * DTYPE_BYTES[self.dtype]
        return DeviceArray(self.pointer + ahead, shape, self.dtype, self.owner, self.offset + ahead)

    def take(self, index: int) -> DeviceArray:
        """Entry `index` of the first axis, without copying."""
        assert 0 <= index < self.shape[0], (index, self.shape)
        return self._view(index * math.prod(self.shape[1:]), self.shape[1:])

    def rows(self, start: int, end: int) -> DeviceArray:
        """Rows start…end-1 of an array (1, rows, …), without copying."""
        assert self.shape[0] == 1 and 0 <= start <= end <= self.shape[1], (start, end, self.shape)
        return self._view(start * math.prod(self.shape[2:]), (1, end - start, *self.shape[2:]))

    def reshape(self, *shape: int) -> DeviceArray:
        """The same numbers under another shape."""
        assert math.prod(shape) == math.prod(self.shape), (shape, self.shape)
        return self._view(0, shape)


class Runner(Protocol):
    """What a runtime must do: hold memory and run graphs on it. Calls are queued in order; `get` waits."""

    name: str
    device: str

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        """New memory, zeroed."""
        ...

    def write(self, target: DeviceArray, values: NDArray[Any]) -> None:
        """Copies encoded host values of the same shape and type into memory."""
        ...

    def get(self, array: DeviceArray) -> NDArray[Any]:
        """A host copy, encoded."""
        ...

    def run(self, graph: str, inputs: Mapping[str, DeviceArray], outputs: Mapping[str, DeviceArray]) -> None:
        """Runs a graph; every output is memory that the caller gives."""
        ...

    def release(self, graph: str) -> None:
        """Frees a graph's weights; the next run loads them again."""
        ...

    def synchronize(self) -> None: ...

    def mark(self) -> Callable[[], None]:
        """A function that waits until what is queued so far has run."""
        ...


class PatchLatents:
    """Latents or a velocity (n, c, h, w) stored on the device as patches; `np.asarray` copies them to the host."""

    def __init__(self, runner: Runner, array: DeviceArray, patch: int, height: int, width: int) -> None:
        self._runner, self._array, self._patch = runner, array, patch
        self.shape = (array.shape[0], array.shape[2] // patch**2, height, width)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        patches = decode(self._runner.get(self._array), self._array.dtype)
        out = unpatchify(patches, self._patch, *self.shape[-2:])
        return out if dtype is None else out.astype(dtype, copy=False)


def patchify(latents: NDArray[np.float32], patch: int) -> NDArray[np.float32]:
    """(n, c, h, w) -> (n, N, patch² · c), numbers of a patch in the order row, column, channel."""
    n, c, h, w = latents.shape
    cut = latents.reshape(n, c, h // patch, patch, w // patch, patch).transpose(0, 2, 4, 3, 5, 1)
    return np.ascontiguousarray(cut.reshape(n, -1, patch * patch * c), np.float32)


def unpatchify(patches: NDArray[np.float32], patch: int, height: int, width: int) -> NDArray[np.float32]:
    """The reverse of `patchify`."""
    n, c = patches.shape[0], patches.shape[2] // patch**2
    grid = patches.reshape(n, height // patch, width // patch, patch, patch, c)
    return np.ascontiguousarray(grid.transpose(0, 5, 1, 3, 2, 4).reshape(n, c, height, width))
