"""The machine at hand, as much as choosing a type and a plan needs: free memory, GPUs, what the CPU computes."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import UnsupportedDeviceError
from .gpus import Gpu, gpus
from .host import HostMemory, host_memory

# Of /proc/cpuinfo. Elsewhere the products run, but several times slower than those of float32.
_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})


@dataclass(frozen=True, kw_only=True)
class Machine:
    """host: None where it cannot be read. bfloat16: whether the CPU multiplies it at speed."""

    host: HostMemory | None
    cpu: str = ""
    cores: int = 1
    bfloat16: bool = False
    gpus: tuple[Gpu, ...] = ()

    def gpu(self, device: str) -> Gpu:
        """The GPU that "cuda" or "cuda:N" names. Raises UnsupportedDeviceError."""
        kind, _, index = device.partition(":")
        if kind != "cuda" or (index and not index.isdecimal()):
            raise UnsupportedDeviceError(f"device {device!r}: expected cpu, cuda or cuda:N")
        for gpu in self.gpus:
            if gpu.index == int(index or 0):
                return gpu
        known = ", ".join(f"cuda:{gpu.index} ({gpu.name})" for gpu in self.gpus) or "none"
        raise UnsupportedDeviceError(f"device {device!r}: no such CUDA device here (found: {known}); use device='cpu'")

    def widens(self, dtype: str) -> bool:
        """Whether products with weights of a type are computed in float32 on this CPU (`backends.torch.widen`)."""
        return dtype != "float32" and not (dtype == "bfloat16" and self.bfloat16)

    def free(self, device: str) -> int | None:
        """Bytes free on "cpu", "cuda" or "cuda:N"; None where unknown. A GPU without its own memory has the host's."""
        host = self.host.free if self.host else None
        if device == "cpu":
            return host
        gpu = self.gpu(device)
        return host if gpu.free is None else gpu.free


def read_machine(root: Path = Path("/"), with_gpus: bool = True) -> Machine:
    """Reads this machine. with_gpus: asking PyTorch for free memory makes a CUDA context, so not for CPU work."""
    name, flags = _cpu(root)
    return Machine(
        host=host_memory(root),
        cpu=name,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        bfloat16=bool(flags & _BFLOAT16),
        gpus=gpus() if with_gpus else (),
    )


def _cpu(root: Path) -> tuple[str, frozenset[str]]:
    """(name, flags) of the first processor; x86 writes "flags", ARM "Features"."""
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine(), frozenset()
    found = dict(reversed(re.findall(r"^([^:\n]+?)\s*:[ \t]*(.*)$", text, re.MULTILINE)))
    flags = found.get("flags") or found.get("Features") or ""
    return found.get("model name") or found.get("Model") or platform.machine(), frozenset(flags.split())
