"""Bytes as torch's caching allocator would count them: live blocks, private pools of graphs, pinned host blocks.

Workspaces inside one operation (cuDNN, cuBLAS) and fragmentation are not counted.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

ROUND = 512  # the allocator's smallest block
PoolId = tuple[int, int]


@dataclass
class Pool:
    """A graph's private pool. `graphs` is its use count; `reserved` stays until no graph uses the pool."""

    device: int
    graphs: int = 0
    live: int = 0
    reserved: int = 0


@dataclass
class Counts:
    """One device. live and peak leave private pools out as `torch.cuda.memory_allocated` does after a capture."""

    live: int = 0
    top: int = 0  # largest `live`
    used_top: int = 0  # largest sum with private pools
    trace: list[tuple[str, int]] = field(default_factory=list)


class CapturePoolError(RuntimeError):
    """The allocator's internal assert: a capture into a pool that no graph uses while a block of it lives."""


class Allocator:
    """Counts storages until they die. `where` names what is running, for the peak's report."""

    def __init__(self, devices: int, pinned_powers: bool = True, where: Callable[[], str] = str) -> None:
        self.devices = [Counts() for _ in range(devices)]
        self.pools: dict[PoolId, Pool] = {}
        self.pinned = self.pinned_top = self.pinned_wanted = 0
        self.pinned_powers = pinned_powers
        self.fractions = [1.0] * devices
        self.capturing: dict[int, PoolId] = {}  # by thread
        self.stages: dict[str, int] = {}
        self._where = where
        self._known: dict[int, Any] = {}
        self._pinned: set[int] = set()
        self._lock = threading.RLock()

    # Storages

    def track(self, storage: Any, device: int) -> int:
        """Counts a device storage once, in the pool of the capture that runs, if any; returns its bytes if new."""
        pool = self.capturing.get(threading.get_ident())

        def count(size: int) -> Callable[[], None]:
            if pool is not None:
                owner = self.pools[pool]
                owner.live += size
                owner.reserved = max(owner.reserved, owner.live)
            else:
                self.devices[device].live += size
            self._note(device)

            def free() -> None:
                if pool is not None:
                    self.pools[pool].live -= size
                    if not self.pools[pool].graphs:
                        self.pools[pool].reserved = self.pools[pool].live
                else:
                    self.devices[device].live -= size

            return free

        return self._once(storage, count)

    def pin(self, storage: Any) -> int:
        """Counts a pinned host storage once, rounded up to a power of two where torch does so."""

        key = storage._cdata

        def count(size: int) -> Callable[[], None]:
            self._pinned.add(key)
            rounded = 1 << (size - 1).bit_length() if self.pinned_powers and size else size
            self.pinned += rounded
            self.pinned_wanted += size
            self.pinned_top = max(self.pinned_top, self.pinned)

            def free() -> None:
                self._pinned.discard(key)
                self.pinned -= rounded
                self.pinned_wanted -= size

            return free

        return self._once(storage, count)

    def is_pinned(self, storage: Any) -> bool:
        return storage._cdata in self._pinned

    def _once(self, storage: Any, count: Callable[[int], Callable[[], None]]) -> int:
        key = storage._cdata
        with self._lock:
            if key in self._known or not storage.nbytes():
                return 0
            size = -(-storage.nbytes() // ROUND) * ROUND
            free = count(size)

            def died(_: Any) -> None:
                with self._lock:
                    self._known.pop(key, None)
                    free()

            self._known[key] = weakref.ref(storage, died)
            return size

    def known(self, storage: Any) -> bool:
        return storage._cdata in self._known

    # Totals

    def used(self, device: int) -> int:
        """Bytes that nothing else on the device could have now."""
        return self.devices[device].live + sum(p.reserved for p in self.pools.values() if p.device == device)

    def _note(self, device: int) -> None:
        counts = self.devices[device]
        counts.top = max(counts.top, counts.live)
        used, stage = self.used(device), self._where()
        self.stages[stage] = max(self.stages.get(stage, 0), used)
        counts.used_top = max(counts.used_top, used)

    def reset_peaks(self, device: int) -> None:
        counts = self.devices[device]
        counts.top, counts.used_top = counts.live, self.used(device)
        self.stages.clear()

    # Pools

    def begin(self, pool: PoolId, device: int) -> None:
        """A capture begins: what this thread allocates from here on belongs to the pool."""
        if pool not in self.pools:
            self.pools[pool] = Pool(device)
        elif not self.pools[pool].graphs:
            raise CapturePoolError(
                "INTERNAL ASSERT FAILED: it->second->use_count > 0 (a capture into a pool that no graph uses, "
                f"{self.pools[pool].live} bytes of it still alive)"
            )
        self.pools[pool].graphs += 1
        self.capturing[threading.get_ident()] = pool

    def end(self) -> None:
        self.capturing.pop(threading.get_ident(), None)

    def release(self, pool: PoolId) -> None:
        """A graph of the pool is gone."""
        self.pools[pool].graphs -= 1
        if not self.pools[pool].graphs:
            self.pools[pool].reserved = self.pools[pool].live

    def empty_cache(self) -> None:
        """Forgets pools that no graph uses and nothing lives in."""
        for pool in [p for p, it in self.pools.items() if not it.graphs and not it.live]:
            del self.pools[pool]
