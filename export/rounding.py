"""A matrix rounded to the numbers and scales of a precision, to nearest, a slab at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

INT8_MAX, FP8_MAX, FP4_MAX = 127.0, 448.0, 6.0
FP4_BLOCK = 16
_INT4_MAX = 7.0
_SLAB = 1 << 19  # numbers that are rounded at a time: they stay in a core's cache


class WeightRounder:
    """A matrix (K, N) and the constants that it is rounded to. It works on slabs of columns: temporaries stay small."""

    def __init__(self, values: NDArray[np.float32], dtype: ir.DataType) -> None:
        self.values, self.type = values, dtype
        self.tensors: dict[str, ir.TensorProtocol] = {}
        self._lost = self._whole = 0.0

    @property
    def squares(self) -> tuple[float, float]:
        return self._lost, self._whole

    def slabs(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """Column ranges, and the numbers in them, contiguous."""
        inner, outer = self.values.shape
        width = max(1, _SLAB // inner)
        for start in range(0, outer, width):
            columns = slice(start, min(start + width, outer))
            yield columns, np.ascontiguousarray(self.values[:, columns])

    def rows(self) -> Iterator[tuple[slice, NDArray[np.float32]]]:
        """The same transposed, (columns, K): no copy where the matrix is a Linear's weight seen from the other side."""
        width = max(1, _SLAB // self.values.shape[0])
        for start in range(0, self.values.shape[1], width):
            columns = slice(start, min(start + width, self.values.shape[1]))
            yield columns, np.ascontiguousarray(self.values[:, columns].T)

    def lose(self, found: NDArray[np.float32], values: NDArray[np.float32]) -> None:
        """Notes a slab's error; `found` is overwritten."""
        found -= values
        lost, whole = found.ravel(), values.ravel()
        self._lost += float(lost @ lost)
        self._whole += float(whole @ whole)

    def keep(self, suffix: str, array: NDArray[Any], dtype: ir.DataType) -> None:
        self.tensors[suffix] = ir.Tensor(array, dtype=dtype)

    def keep_scale(self, suffix: str, array: NDArray[np.float32] | np.float32) -> None:
        self.keep(suffix, np.asarray(array).astype(self.type.numpy()), self.type)


def _channel_scales(weight: NDArray[np.float32], largest: float) -> NDArray[np.float32]:
    return np.maximum(np.maximum(weight.max(axis=0), -weight.min(axis=0)), 1e-8) / np.float32(largest)


def to_int8(rounder: WeightRounder) -> None:
    """int8 and a scale for each column."""
    inner, outer = rounder.values.shape
    q, scales = np.empty((inner, outer), np.int8), np.empty(outer, np.float32)
    for columns, values in rounder.slabs():
        scale = scales[columns] = _rounded(_channel_scales(values, INT8_MAX), rounder.type)
        found = values / scale
        np.clip(np.rint(found, out=found), -INT8_MAX, INT8_MAX, out=found)
        q[:, columns] = found
        found *= scale
        rounder.lose(found, values)
    rounder.keep("int8", q, ir.DataType.INT8)
    rounder.keep_scale("scale", scales)


def to_fp8(rounder: WeightRounder) -> None:
    """float8 (e4m3) and a scale for each column."""
    inner, outer = rounder.values.shape
    q, scales = np.empty((inner, outer), ml_dtypes.float8_e4m3fn), np.empty(outer, np.float32)
    for columns, values in rounder.slabs():
        scale = scales[columns] = _rounded(_channel_scales(values, FP8_MAX), rounder.type)
        part = q[:, columns] = np.clip(values / scale, -FP8_MAX, FP8_MAX).astype(q.dtype)
        rounder.lose(part.astype(np.float32) * scale, values)
    rounder.keep("fp8", q, ir.DataType.FLOAT8E4M3FN)
    rounder.keep_scale("scale", scales)
    rounder.keep("zero", np.zeros(outer, q.dtype), ir.DataType.FLOAT8E4M3FN)


def to_int4(rounder: WeightRounder, block: int) -> None:
    """int4 and a scale for each `block` rows of a column."""
    inner, outer = rounder.values.shape
    nibbles, scales = np.empty((inner, outer), np.uint8), np.empty((inner // block, outer), np.float32)
    for columns, values in rounder.slabs():
        groups = values.reshape(inner // block, block, -1)
        most = np.maximum(np.maximum(groups.max(axis=1), -groups.min(axis=1)), 1e-8)
        scale = scales[:, columns] = _rounded(most / np.float32(_INT4_MAX), rounder.type)
        found = groups / scale[:, None]
        np.clip(np.rint(found, out=found), -_INT4_MAX - 1, _INT4_MAX, out=found)
        nibbles[:, columns] = found.reshape(inner, -1).astype(np.int8).view(np.uint8) & 15
        found *= scale[:, None]
        rounder.lose(found.reshape(inner, -1), values)
    flat = nibbles.reshape(-1)  # of an even length: the blocks are
    rounder.tensors["int4"] = ir.PackedTensor(flat[::2] | flat[1::2] << 4, ir.DataType.INT4, shape=(inner, outer))
    rounder.keep_scale("scale", scales)


def to_nvfp4(rounder: WeightRounder) -> None:
    """float4 (e2m1) in two levels: a float8 scale for each block of 16, and one scale that brings those into range."""
    inner, outer = rounder.values.shape
    most = max(float(rounder.values.max()), -float(rounder.values.min()), 1e-8)
    top = np.float32(most / (FP8_MAX * FP4_MAX))
    q = np.empty((inner, outer), ml_dtypes.float4_e2m1fn)
    blocks = np.empty((inner // FP4_BLOCK, outer), ml_dtypes.float8_e4m3fn)
    for columns, values in rounder.slabs():
        groups = values.reshape(inner // FP4_BLOCK, FP4_BLOCK, -1)
        part = blocks[:, columns] = (np.abs(groups).max(axis=1) / np.float32(FP4_MAX) / top).astype(blocks.dtype)
        scale = part.astype(np.float32) * top
        rounded = np.clip(groups / np.maximum(scale, 1e-12)[:, None], -FP4_MAX, FP4_MAX).astype(q.dtype)
        q[:, columns] = rounded.reshape(inner, -1)
        rounder.lose((rounded.astype(np.float32) * scale[:, None]).reshape(inner, -1), values)
    rounder.keep("fp4", q, ir.DataType.FLOAT4E2M1)
    rounder.keep("blocks", blocks, ir.DataType.FLOAT8E4M3FN)
    rounder.keep_scale("level", top)


def to_packed(rounder: WeightRounder, bits: int, block: int) -> None:
    """What MatMulNBits reads: rows of an output channel, each in blocks of unsigned numbers around the middle."""
    inner, outer = rounder.values.shape
    largest = np.float32(2 ** (bits - 1) - 1)
    q = np.empty((outer, inner // block, block * bits // 8), np.uint8)
    scales = np.empty((outer, inner // block), np.float32)
    for columns, rows in rounder.rows():
        groups = rows.reshape(-1, inner // block, block)
        most = np.maximum(np.maximum(groups.max(axis=2), -groups.min(axis=2)), 1e-8)
        scale = scales[columns] = _rounded(most / largest, rounder.type)
        found = groups / scale[..., None]
        np.clip(np.rint(found, out=found), -largest - 1, largest, out=found)
        numbers = np.add(found, largest + 1).astype(np.uint8)
        q[columns] = numbers if bits == 8 else numbers[..., ::2] | numbers[..., 1::2] << 4
        found *= scale[..., None]
        rounder.lose(found.reshape(-1, inner), rows)
    rounder.keep(f"int{bits}", q, ir.DataType.UINT8)
    rounder.keep_scale("scale", scales)


def _rounded(scale: NDArray[np.float32], dtype: ir.DataType) -> NDArray[np.float32]:
    """A scale as the model's type will hold it, so that weights are rounded against what will multiply them."""
    return np.maximum(scale.astype(dtype.numpy()).astype(np.float32), np.finfo(np.float16).smallest_subnormal)
