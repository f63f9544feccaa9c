"""Free memory from files of made-up machines, computed by hand, and GPUs from a made-up driver."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mindomni_rt import UnsupportedDeviceError
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.memory.fit import gpu_reserve
from mindomni_rt.memory.gpus import Gpu, _of_driver, gpus, visible
from mindomni_rt.memory.host import HostMemory, host_memory, parse_vm_stat
from mindomni_rt.memory.machine import Machine, read_machine

MEMINFO = """MemTotal:       24683520 kB
MemFree:          512000 kB
MemAvailable:   20480000 kB
Buffers:          102400 kB
Cached:         18432000 kB
HugePages_Total:       0
"""
KB = 1024


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_without_limits_it_is_what_the_kernel_calls_available(tmp_path: Path) -> None:
    root = machine(tmp_path, {})
    assert host_memory(root) == HostMemory(24683520 * KB, 20480000 * KB)


def test_kernels_before_3_14_add_up_free_and_cached(tmp_path: Path) -> None:
    text = "".join(line + "\n" for line in MEMINFO.splitlines() if "Available" not in line)
    root = machine(tmp_path, {"proc/meminfo": text})
    assert host_memory(root) == HostMemory(24683520 * KB, (512000 + 102400 + 18432000) * KB)


def test_version_2_groups_count_their_page_cache_as_free(tmp_path: Path) -> None:
    group = "sys/fs/cgroup/app/worker"
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app/worker\n",
            f"{group}/memory.max": "8000000000\n",
            f"{group}/memory.high": "max\n",
            f"{group}/memory.current": "7000000000\n",
            # shmem is memory that cannot be read again; "file" would count it
            f"{group}/memory.stat": "anon 1900000000\nfile 5100000000\nshmem 100000000\n"
            "inactive_file 3000000000\nactive_file 2000000000\n",
        },
    )
    # 8 GB less 7 GB used, of which 3 + 2 GB are file pages
    assert host_memory(root) == HostMemory(8_000_000_000, 6_000_000_000)


def test_the_tightest_group_above_decides(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "0::/app/worker\n",
            "sys/fs/cgroup/app/worker/memory.max": "max\n",
            "sys/fs/cgroup/app/worker/memory.current": "100\n",
            "sys/fs/cgroup/app/memory.max": "9000000000\n",
            "sys/fs/cgroup/app/memory.high": "4000000000\n",
            "sys/fs/cgroup/app/memory.current": "1500000000\n",
        },
    )
    assert host_memory(root) == HostMemory(4_000_000_000, 2_500_000_000)


@pytest.mark.parametrize("path", ["/docker/0123", "/"])
def test_version_1_groups_also_where_only_their_root_is_mounted(tmp_path: Path, path: str) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": f"12:cpu,cpuacct:{path}\n5:memory:{path}\n1:name=systemd:{path}\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000000\n",
            "sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_inactive_file 300000000\ntotal_active_file 200000000\n",
        },
    )
    assert host_memory(root) == HostMemory(3_000_000_000, 2_500_000_000)


def test_version_1_without_a_limit(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        {
            "proc/self/cgroup": "5:memory:/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1000000000\n",
        },
    )
    assert host_memory(root) == HostMemory(24683520 * KB, 20480000 * KB)


def test_this_machine() -> None:
    found = read_machine(with_gpus=False)
    assert found.host is not None and 0 < found.host.free <= found.host.total
    assert found.cores >= 1 and found.gpus == ()


def test_vm_stat_of_macos() -> None:
    text = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               10000.
Pages active:                            400000.
Pages inactive:                          300000.
Pages speculative:                         2000.
Pages wired down:                        150000.
Pages purgeable:                           1000.
"Translation faults":                 123456789.
"""
    assert parse_vm_stat(text, 16 << 30) == HostMemory(16 << 30, 16384 * (10000 + 300000 + 2000 + 1000))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("processor : 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx512f avx512_bf16\n\nflags : fpu\n", True),
        ("model name : Intel Xeon\nflags : avx512f amx_bf16 amx_tile\n", True),
        ("model name : Intel Xeon\nflags : avx512f avx512_vnni\n", False),
        ("processor : 0\nFeatures : fp asimd i8mm bf16\n", True),
        ("processor : 0\nFeatures : fp asimd\nModel : Raspberry Pi 4\n", False),
    ],
)
def test_bfloat16_by_the_flags_of_the_first_processor(tmp_path: Path, text: str, expected: bool) -> None:
    assert read_machine(machine(tmp_path, {"proc/cpuinfo": text}), with_gpus=False).bfloat16 is expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("GPU-b", [1]), ("0,9,1", [0]), ("-1", []), ("1,1", [1])],
)
def test_visible_devices_end_at_the_first_unknown(shown: str | None, expected: list[int]) -> None:
    environment = {} if shown is None else {"CUDA_VISIBLE_DEVICES": shown}
    assert visible(["GPU-a1", "GPU-b2", "GPU-c3"], environment) == expected


class Driver:
    """NVML with one card, and one device that shares the host's memory."""

    def __init__(self) -> None:
        self.open = 0

    def nvmlInit_v2(self) -> int:
        self.open += 1
        return 0

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, handle: Any) -> int:
        handle._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, handle: Any, buffer: Any, size: int) -> int:
        buffer.value = b"GPU-%d" % handle.value
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, size: int) -> int:
        buffer.value = (b"NVIDIA GeForce RTX 4060", b"NVIDIA GB10")[handle.value - 1]
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:
        major._obj.value, minor._obj.value = ((8, 9), (12, 1))[handle.value - 1]
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.free = 8 << 30, 7 << 30
        return 0 if handle.value == 1 else 3  # NVML_ERROR_NOT_SUPPORTED


def test_gpus_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    driver = Driver()
    card = Gpu(index=0, name="NVIDIA GeForce RTX 4060", capability=(8, 9), total=8 << 30, free=7 << 30)
    shared = Gpu(index=1, name="NVIDIA GB10", capability=(12, 1), total=None, free=None)
    assert _of_driver(driver) == (card, shared) and driver.open == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2")
    assert [gpu.name for gpu in _of_driver(driver)] == ["NVIDIA GB10"]
    host = Machine(host=HostMemory(100, 60), gpus=(card, shared))
    assert host.free("cuda") == host.free("cuda:0") == 7 << 30
    assert host.free("cuda:1") == host.free("cpu") == 60
    for device in ("cuda:2", "cuda:x", "mps"):
        with pytest.raises(UnsupportedDeviceError, match=device):
            host.free(device)


def test_gpus_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What shares the host's memory has none of its own: a part that waits there would take it twice."""
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        mem_get_info=lambda index: (5 << 30, 8 << 30),
        get_device_properties=lambda index: SimpleNamespace(is_integrated=index == 1),
        get_device_name=lambda index: ("NVIDIA GeForce RTX 4060", "Orin")[index],
        get_device_capability=lambda index: ((8, 9), (8, 7))[index],
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    card, orin = gpus()
    assert (card.total, card.free) == (8 << 30, 5 << 30) and (orin.total, orin.free) == (None, None)
    machine = Machine(host=HostMemory(32 << 30, 20 << 30), gpus=(card, orin))
    assert machine.free("cuda:1") == 20 << 30
    assert [gpu_reserve(machine, f"cuda:{gpu.index}") for gpu in (card, orin)] == [RESERVE[False], RESERVE[True]]


def test_no_driver_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert gpus() == ()
    with pytest.raises(UnsupportedDeviceError, match="found: none"):
        Machine(host=None).gpu("cuda")
