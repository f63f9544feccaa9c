"""Names of devices and pools of graphs, without a device."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest
import torch

from mindomni_rt.backends.fast import graph
from mindomni_rt.backends.fast.graph import GraphPool, Replay
from mindomni_rt.backends.torch.device import index_of, is_cuda, limit_memory, on_device, with_index


def test_a_name_gets_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert [with_index(name) for name in ("cuda", "cuda:0", "cuda:3", "cpu")] == ["cuda:1", "cuda:0", "cuda:3", "cpu"]
    assert (index_of("cuda"), index_of("cuda:2")) == (1, 2)
    assert is_cuda("cuda") and is_cuda("cuda:1") and not is_cuda("cpu")


def test_a_method_runs_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            entered.append(self.index)

        def __exit__(self, *_: object) -> None:
            entered.append(-1)

    class Worker:
        def __init__(self, device: str) -> None:
            self.device = device

        @on_device
        def work(self, left: int, right: int = 0) -> int:
            """Adds."""
            entered.append(100)
            return left + right

    monkeypatch.setattr(torch.cuda, "device", Device)
    assert Worker("cuda:2").work(1, right=2) == 3 and entered == [2, 100, -1]
    assert Worker("cpu").work(4) == 4 and entered == [2, 100, -1, 100]
    assert Worker.work.__doc__ == "Adds."


def test_a_share_of_memory_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *given: told.append(given))
    for share in (-0.5, 0.25, 7.0):
        limit_memory("cuda:1", share)
    assert told == [(0.0, 1), (0.25, 1), (1.0, 1)]


def test_a_failed_capture_uses_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise RuntimeError("no such kernel")

    handles = count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: SimpleNamespace(number=next(handles)))
    monkeypatch.setattr(graph, "captured", failing)
    pool = GraphPool()
    replays = [Replay(lambda: None, "cuda:0", pool) for _ in range(2)]
    for replay in replays:
        with pytest.raises(RuntimeError, match="no such kernel"):
            replay.prepare()
    assert next(handles) == 2  # each began a pool of its own


def test_a_pool_without_graphs_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    handles = count()
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: SimpleNamespace(number=next(handles)))
    pool = GraphPool()
    one, two = (Replay(lambda: None, "cpu", pool) for _ in range(2))
    assert pool.handle(one).number == pool.handle(two).number == 0
    pool.leave(one)  # its capture failed
    assert pool.handle(one).number == 0
    del one
    assert pool.handle(two).number == 0
    del two
    assert pool.handle(Replay(lambda: None, "cpu", pool)).number == 1
