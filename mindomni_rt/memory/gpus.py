"""NVIDIA GPUs and their free memory: from PyTorch where it is loaded, else from the driver's own library (NVML)."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU. index: as in "cuda:N"; capability: (8, 9) for sm_89; total and free: bytes, None where it shares the
    host's memory (Jetson, DGX Spark)."""

    index: int
    name: str
    capability: tuple[int, int]
    total: int | None
    free: int | None


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA shows to this process; empty without one, or without a driver."""
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch, "cuda", None) is not None and torch.cuda.is_available():
        return tuple(_of_torch(torch, index) for index in range(torch.cuda.device_count()))
    for name in _LIBRARIES:
        with suppress(OSError):
            return _of_driver(ctypes.CDLL(name))
    return ()


def _of_torch(torch: Any, index: int) -> Gpu:
    free, total = torch.cuda.mem_get_info(index)
    shared = bool(torch.cuda.get_device_properties(index).is_integrated)
    return Gpu(
        index=index,
        name=torch.cuda.get_device_name(index),
        capability=torch.cuda.get_device_capability(index),
        total=None if shared else total,
        free=None if shared else free,
    )


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _of_driver(nvml: Any) -> tuple[Gpu, ...]:
    """What NVML lists, in the order and number that CUDA_VISIBLE_DEVICES gives.

    NVML counts by bus address. Where GPUs differ, CUDA counts the fastest first unless CUDA_DEVICE_ORDER is PCI_BUS_ID.
    """
    if nvml.nvmlInit_v2():
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return ()
        handles = [ctypes.c_void_p() for _ in range(count.value)]
        found = [h for i, h in enumerate(handles) if not nvml.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(h))]
        shown = visible([_text(nvml.nvmlDeviceGetUUID, h) for h in found], os.environ)
        return tuple(_described(nvml, found[place], index) for index, place in enumerate(shown))
    finally:
        nvml.nvmlShutdown()


def visible(uuids: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    """Positions of the devices that CUDA shows; as CUDA does, the list ends at the first entry that names none."""
    text = environment.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return list(range(len(uuids)))
    found: list[int] = []
    for entry in (part.strip() for part in text.split(",")):
        named = [i for i, uuid in enumerate(uuids) if entry and (uuid.startswith(entry) or entry == str(i))]
        if len(named) != 1 or named[0] in found:
            break
        found += named
    return found


def _text(call: Any, handle: Any) -> str:
    buffer = ctypes.create_string_buffer(96)
    return "" if call(handle, buffer, len(buffer)) else buffer.value.decode(errors="replace")


def _described(nvml: Any, handle: Any, index: int) -> Gpu:
    memory, major, minor = _Memory(), ctypes.c_int(), ctypes.c_int()
    nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor))
    known = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0 and memory.total > 0
    return Gpu(
        index=index,
        name=_text(nvml.nvmlDeviceGetName, handle),
        capability=(major.value, minor.value),
        total=int(memory.total) if known else None,
        free=int(memory.free) if known else None,
    )
