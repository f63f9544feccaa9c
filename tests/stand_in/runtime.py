"""The C functions under `torch.cuda`, stubbed: devices, streams, events, graphs. The Python wrappers stay torch's own.

`Runtime.install` must run before `torch.cuda` is imported: its classes derive from those of `torch._C`. `prepare`
arranges that.
"""

from __future__ import annotations

import sys
import threading
import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from types import SimpleNamespace
from typing import Any

from .memory import Allocator

CUDA = 1  # torch's number of the device type
STREAMS = 32  # that torch hands out in turn
ROOTS = ("mindomni_rt", "export", "kernels", "training", "benchmarks", "serving")


@dataclass(frozen=True)
class Sync:
    """A place where the host waited for a device. kind: item, download, upload, event,
    stream, device, or capture (`torch.cuda.graph` waits for the device before it begins)."""

    kind: str
    where: str
    phase: str
    capturing: bool


@dataclass(frozen=True)
class Upload:
    """A copy to a device that the host does not wait for. read: tokens of the text read before."""

    phase: str
    stream: int
    bytes: int
    read: int


@dataclass
class Stand:
    """What is chosen for a run, and what was seen."""

    capability: tuple[int, int] = (9, 0)
    devices: int = 1
    total_memory: int = 80 << 30
    pinned_powers: bool = True  # torch up to 2.11 rounds pinned blocks to powers of two
    ours: bool = True  # timings favour our kernels, else the library's
    stuck_captures: bool = True  # torch up to 2.11: a capture that fails leaves the allocator capturing
    phase: str = ""
    syncs: list[Sync] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    streams: Counter = field(default_factory=Counter)
    captures: int = 0  # of steps
    timings: int = 0  # captures that were made to be timed
    read: int = 0  # tokens of the text that runs
    uploads: list[Upload] = field(default_factory=list)
    plans: set[Any] = field(default_factory=set)  # shapes of attention that cuDNN may have been asked for


def caller() -> str:
    """The innermost line of the project that led here."""
    for frame in reversed(traceback.extract_stack()):
        name = frame.filename.replace("\\", "/")
        if any(f"/{root}/" in name for root in ROOTS) and "/stand_in/" not in name and "site-packages" not in name:
            short = next(name[name.rindex(f"/{root}/") + 1 :] for root in ROOTS if f"/{root}/" in name)
            return f"{short}:{frame.lineno} {frame.name}"
    return "?"


def _begins_capture() -> bool:
    """Whether `torch.cuda.graph` waits, as it does before a capture."""
    frame = sys._getframe(2)
    for _ in range(6):
        if frame is None:
            return False
        if frame.f_code.co_filename.endswith("cuda/graphs.py"):
            return True
        frame = frame.f_back
    return False


def _timed() -> bool:
    """Whether a capture is made by the clock of the choices."""
    return any(frame.name == "milliseconds" for frame in traceback.extract_stack())


class Runtime:
    """State of the devices of one process."""

    def __init__(self, stand: Stand) -> None:
        self.stand = stand
        self.allocator = Allocator(stand.devices, stand.pinned_powers, lambda: stand.phase)
        self._begin()

    def _begin(self) -> None:
        self.issued = self.done = 0  # device work in order; what a host has waited for
        self.launched = 0  # by Triton, of which
        self.invalid = False  # the capture that runs has failed
        self._here = threading.local()
        self._next_stream = [0] * self.stand.devices
        self._next_pool = 0

    def become(self, chosen: dict[str, Any]) -> None:
        """Begins anew with these fields of `Stand`; nothing of before may still live on the devices."""
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()}
        # In place: functions of torch._C hold both.
        self.stand.__init__(**fields)  # type: ignore[misc]
        self.allocator.__init__(  # type: ignore[misc]
            self.stand.devices, self.stand.pinned_powers, lambda: self.stand.phase
        )
        self._begin()

    # Where a thread is

    @property
    def device(self) -> int:
        return getattr(self._here, "device", 0)

    def set_device(self, index: int) -> None:
        if not 0 <= index < self.stand.devices:
            raise RuntimeError(f"CUDA error: invalid device ordinal {index}")
        self._here.device = index

    def stream(self, device: int) -> int:
        return getattr(self._here, "streams", {}).get(device, 0)

    @property
    def capturing(self) -> bool:
        return threading.get_ident() in self.allocator.capturing

    # Work and waiting

    def work(self, launches: int = 0) -> None:
        """Something was queued on the current stream."""
        self.issued += 1
        self.launched += launches
        self.stand.streams[(self.device, self.stream(self.device))] += 1

    def upload(self, count: int) -> None:
        """A copy from pinned memory was queued on the current stream."""
        self.work()
        self.stand.uploads.append(Upload(self.stand.phase, self.stream(self.device), count, self.stand.read))

    def wait(self, kind: str, up_to: int | None = None) -> None:
        """The host waits. Not allowed in a capture."""
        self.done = max(self.done, self.issued if up_to is None else up_to)
        if kind == "device" and _begins_capture():
            kind = "capture"
        self.stand.syncs.append(Sync(kind, caller(), self.stand.phase, self.capturing))
        if self.capturing:
            self.fail(f"host synchronization ({kind}) in a capture at {caller()}")
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def fail(self, text: str) -> None:
        if text not in self.stand.faults:
            self.stand.faults.append(text)

    # Names of torch._C

    def functions(self) -> dict[str, Any]:
        """Everything that is put into `torch._C`, by name."""
        stand, here, allocator = self.stand, self, self.allocator

        def exchange(index: int) -> int:
            before = here.device
            if index >= 0:
                here.set_device(index)
            return before

        def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
            here.set_device(device_index)
            streams = here._here.__dict__.setdefault("streams", {})
            streams[device_index] = stream_id

        def set_fraction(fraction: float, device: int) -> None:
            allocator.fractions[device] = fraction

        found: dict[str, Any] = {
            "_has_cuda": True,
            "_cuda_getDeviceCount": lambda: stand.devices,
            "_cuda_init": self._init,
            "_cuda_getDevice": lambda: here.device,
            "_cuda_setDevice": here.set_device,
            "_cuda_exchangeDevice": exchange,
            "_cuda_maybeExchangeDevice": exchange,
            "_cuda_getArchFlags": lambda: None,
            "_cuda_isInBadFork": lambda: False,
            "_cuda_synchronize": lambda: here.wait("device"),
            "_cuda_getCurrentStream": lambda device: (here.stream(device), device, CUDA),
            "_cuda_getDefaultStream": lambda device: (0, device, CUDA),
            "_cuda_setStream": set_stream,
            "_cuda_getCurrentRawStream": lambda device: 1000 * device + here.stream(device),
            "_cuda_emptyCache": allocator.empty_cache,
            "_cuda_setMemoryFraction": set_fraction,
            "_cuda_getMemoryFraction": lambda device: allocator.fractions[device],
            "_cuda_memoryStats": self._stats,
            "_cuda_resetPeakMemoryStats": allocator.reset_peaks,
            "_cuda_resetAccumulatedMemoryStats": lambda device: None,
            "_cuda_isCurrentStreamCapturing": lambda: here.capturing,
            "_graph_pool_handle": self._new_pool,
            "_host_emptyCache": lambda: None,
            "_cudart": SimpleNamespace(cudaMemGetInfo=self._free, cudaError=SimpleNamespace(success=0)),
            "_CudaDeviceProperties": type("_CudaDeviceProperties", (SimpleNamespace,), {}),
        }
        found["_CudaStreamBase"], found["_CudaEventBase"] = _stream_class(self), _event_class(self)
        found["_CUDAGraph"] = _graph_class(self)
        return found

    def _init(self) -> None:
        import torch

        torch.cuda._get_device_properties = self.properties  # type: ignore[attr-defined]
        torch._C.__dict__["_cuda_endAllocateToPool"] = self._end_allocation  # torch.cuda.memory has set a dummy

    def properties(self, device: int) -> Any:
        major, minor = self.stand.capability
        return SimpleNamespace(
            name=f"stand-in sm_{major}{minor}",
            major=major,
            minor=minor,
            total_memory=self.stand.total_memory,
            multi_processor_count=132,
            warp_size=32,
            L2_cache_size=50 << 20,
            max_threads_per_multi_processor=2048,
            regs_per_multiprocessor=65536,
            shared_memory_per_block_optin=232448,
            is_integrated=False,
            uuid="GPU-00000000-0000-0000-0000-00000000000" + str(device),
        )

    def _free(self, device: int) -> tuple[int, int]:
        total = self.stand.total_memory
        return total - self.allocator.used(device), total

    def _end_allocation(self, device: int, pool: Any) -> None:
        """As the allocator's: only for the pool that it serves."""
        if self.allocator.capturing.get(threading.get_ident()) != tuple(pool):
            raise RuntimeError("INTERNAL ASSERT FAILED: endAllocatePool: not currently recording to mempool_id")
        self.allocator.end()

    def _new_pool(self) -> tuple[int, int]:
        self._next_pool += 1
        return (0, self._next_pool)

    def _stats(self, device: int) -> dict[str, Any]:
        """As the allocator's: "allocated" is blow by blow, "reserved" is what the process holds, pools included."""
        counts, used = self.allocator.devices[device], self.allocator.used(device)
        zero = {"current": 0, "peak": 0, "allocated": 0, "freed": 0}
        allocated = {**zero, "current": counts.live, "peak": counts.top}
        reserved = {**zero, "current": used, "peak": counts.used_top}
        kinds = ("all", "small_pool", "large_pool")
        found: dict[str, Any] = {
            f"{name}_bytes": {kind: value if kind == "all" else zero for kind in kinds}
            for name, value in (
                ("allocated", allocated), ("active", allocated), ("reserved", reserved), ("requested", allocated),
                ("inactive_split", zero),
            )
        }  # fmt: skip
        return {**found, "num_alloc_retries": 0, "num_ooms": 0}

    def install(self) -> None:
        """Into `torch._C`, which must be loaded."""
        sys.modules["torch._C"].__dict__.update(self.functions())


class _Finder(MetaPathFinder):
    """Runs `then` once when `torch.cuda` is about to be imported."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torch.cuda":
            sys.meta_path.remove(self)
            self._then()


def prepare(stand: Stand) -> Runtime:
    """A runtime that stands in as soon as torch is imported, which must not have happened yet."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; a stand-in needs a fresh process")
    runtime = Runtime(stand)
    sys.meta_path.insert(0, _Finder(runtime.install))
    return runtime


def _stream_class(runtime: Runtime) -> type:
    class StreamBase:
        """A number in a device's list of streams."""

        def __new__(
            cls,
            priority: int = 0,
            stream_id: int | None = None,
            device_index: int | None = None,
            device_type: int = CUDA,
            stream_ptr: int = 0,
        ) -> Any:
            import torch

            self = super().__new__(cls)
            index = runtime.device if device_index is None else device_index
            if stream_id is None:
                runtime._next_stream[index] = runtime._next_stream[index] % STREAMS + 1
                stream_id = runtime._next_stream[index]
            self.stream_id, self.device_index, self.device_type = stream_id, index, device_type
            self.device, self.priority = torch.device("cuda", index), priority
            self.cuda_stream = 1000 * index + stream_id
            return self

        def __eq__(self, other: object) -> bool:
            return isinstance(other, StreamBase) and self.cuda_stream == other.cuda_stream

        def __hash__(self) -> int:
            return self.cuda_stream

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            runtime.wait("stream")

    return StreamBase


def _event_class(runtime: Runtime) -> type:
    class EventBase:
        """Remembers how much work was queued before it."""

        def __new__(
            cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, external: bool = False
        ) -> Any:
            self = super().__new__(cls)
            self.at, self.launched, self.device, self.timing = 0, 0, None, enable_timing
            return self

        def record(self, stream: Any) -> None:
            if self.device is not None and self.device != stream.device:
                raise RuntimeError(f"event of {self.device} recorded on a stream of {stream.device}")
            self.at, self.launched, self.device = runtime.issued, runtime.launched, stream.device

        def wait(self, stream: Any) -> None:
            pass

        def query(self) -> bool:
            return self.at <= runtime.done

        def synchronize(self) -> None:
            runtime.wait("event", self.at)

        def elapsed_time(self, other: Any) -> float:
            """Milliseconds: fewer with more launches of ours, or more."""
            if not (self.timing and other.timing):
                raise ValueError("Both events must be created with argument 'enable_timing=True'.")
            launched = other.launched - self.launched
            return 1 / (1 + launched) if runtime.stand.ours else 1.0 + launched

        @property
        def cuda_event(self) -> int:
            return id(self)

    return EventBase


def _graph_class(runtime: Runtime) -> type:
    class GraphBase:
        """Replays count as one piece of work; memory of its capture stays in the pool while it lives."""

        def __new__(cls, keep_graph: bool = False) -> Any:
            self = super().__new__(cls)
            self._pool, self.device, self._launches = None, None, 0
            return self

        def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
            if runtime.capturing:
                raise RuntimeError("a capture begins while one is under way")
            self._pool = tuple(pool) if pool is not None else runtime._new_pool()
            self.device = runtime.device
            if runtime.stream(self.device) == 0:
                raise RuntimeError("CUDA graphs must be captured on a non-default stream")
            if _timed():
                runtime.stand.timings += 1
            else:
                runtime.stand.captures += 1
            runtime.allocator.begin(self._pool, self.device)
            runtime.invalid, self._launches = False, -runtime.launched
            self._released = weakref.finalize(self, runtime.allocator.release, self._pool)

        def capture_end(self) -> None:
            if runtime.invalid:
                runtime.invalid = False
                if not runtime.stand.stuck_captures:
                    runtime.allocator.end()
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
            runtime.allocator.end()
            self._launches += runtime.launched

        def instantiate(self) -> None:
            pass

        def replay(self) -> None:
            if runtime.capturing:
                raise RuntimeError("a graph is replayed in a capture")
            runtime.work(self._launches)

        def reset(self) -> None:
            self._released()

        def pool(self) -> Any:
            return self._pool

    return GraphBase
