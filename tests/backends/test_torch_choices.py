"""What the fast path chooses by measurement on a device: attention, one-row and 8-bit products; and graphs."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PARITY

import mindomni_rt
from mindomni_rt.backends.fast.attention import Segments, candidates, choose
from mindomni_rt.backends.fast.graph import Replay
from mindomni_rt.backends.fast.linear import LinearDense, LinearW8A8
from mindomni_rt.backends.fast.load import check_device, reserve
from mindomni_rt.backends.fast.tune import choose_fused_rows, choose_one_row, choose_w8a8
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.memory.footprint import Precision


def _attention_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Segments]:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, 9, 32, generator=g) for _ in range(3))
    keys, values = torch.randn(2, 2, 2, 11, 32, generator=g)
    time_keys, time_values = torch.randn(2, 2, 2, 32, generator=g)
    lengths = (11, 4)
    segments = Segments(keys, values, time_keys, time_values, torch.tensor(lengths, dtype=torch.int32), lengths)
    return q, k, v, segments


def test_attentions_agree() -> None:
    q, k, v, segments = _attention_case()
    tried = candidates(torch.device("cpu"), 32, "torch")
    for part in (segments, replace(segments, with_image=False)):
        expected = tried["sdpa"](q, k, v, part)
        torch.testing.assert_close(tried["segment"](q, k, v, part), expected, rtol=1e-4, atol=1e-5)
        assert expected.transpose(1, 2).is_contiguous()


def test_the_fastest_attention_that_is_right_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    q, k, v, segments = _attention_case()
    tried = candidates(torch.device("cpu"), 32, "torch")

    def wrong(*_: Any) -> torch.Tensor:
        return torch.zeros_like(q)

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    tried |= {"wrong": wrong, "failing": failing}
    times = {id(tried["sdpa"]): 2.0, id(tried["segment"]): 1.0}

    def clock(run: Any, _: torch.device) -> float:
        return times[id(run.__defaults__[0])]

    with caplog.at_level(logging.INFO):
        assert choose(tried, q, k, v, segments, clock) == "segment"
        times[id(tried["sdpa"])] = 0.5
        assert choose(tried, q, k, v, segments, clock) == "sdpa"
    assert "no such kernel" in caplog.text and "wrong differs" in caplog.text and "500.000 ms" in caplog.text
    assert choose({"sdpa": tried["sdpa"]}, q, k, v, segments) == "sdpa"  # by the real clock


def test_one_row_products_are_chosen_once_a_shape(caplog: pytest.LogCaptureFixture) -> None:
    products = [LinearDense(torch.randn(6, 8), None, "torch") for _ in range(3)] + [
        LinearDense(torch.randn(5, 8), None, "torch")
    ]
    times = iter([6.0, 3.0, 1.0, 2.0])
    with caplog.at_level(logging.INFO):
        choose_one_row(products, lambda run: (run(), next(times))[1])
    assert [p.one_row for p in products] == ["gemv"] * 3 + ["cublas"]
    assert "cublas 2.0000 ms, gemv 1.0000 ms" in caplog.text  # three of a shape share the clock's time


def test_eight_bit_products_are_chosen_once_a_shape(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    products = [LinearW8A8(torch.randn(n, 32), None, "auto", "int8") for n in (16, 16, 16, 16, 16, 48)]
    times = iter([2.0, 1.0, 1.0, 2.0])
    with caplog.at_level(logging.INFO):
        choose_w8a8(products, 20, lambda run: (run(), next(times))[1])
    assert [p.how for p in products] == ["triton"] * 5 + ["cublas"] and "1.0000 ms" in caplog.text

    def clock(run: Any) -> float:
        run()
        raise RuntimeError("no such product")

    with (
        caplog.at_level(logging.INFO),
        pytest.raises(mindomni_rt.UnsupportedDeviceError, match="no kernel for int8 rows of 16x32"),
    ):
        choose_w8a8(products, 20, clock)
    assert "no such product" in caplog.text


@pytest.mark.parametrize("precision", [None, "language=int8wo", "language=int4"])
def test_fused_rows(precision: str | None) -> None:
    """Norm, product and gate as one kernel give the text that they give apart; chosen when it is faster."""
    pipe = mindomni_rt.load(PARITY, device="cpu", fast=True, precision=precision)
    stack = pipe.backend.language_stack  # type: ignore[attr-defined]
    options: dict[str, Any] = dict(height=32, width=32, num_inference_steps=1, max_new_tokens=12, output="numpy")
    apart = pipe.generate("two cats", **options)
    for times, fused in (((1.0, 2.0), False), ((2.0, 1.0), True)):
        clock = iter(times)
        choose_fused_rows(stack, lambda run, clock=clock: (run(), next(clock))[1])
        assert stack.fused_rows == (fused and precision != "language=int4")  # 4-bit weights have no such kernel
    found = pipe.generate("two cats", **{**options, "latents": apart.latents * 0})
    again = pipe.generate("two cats", **{**options, "latents": apart.latents * 0})
    assert found.token_ids == apart.token_ids == again.token_ids


def test_types_that_a_gpu_lacks() -> None:
    check_device(Precision(decoder="fp8fast"), (8, 9))
    with pytest.raises(mindomni_rt.UnsupportedDeviceError, match="use int8"):
        check_device(Precision(decoder="fp8"), (8, 6))
    with pytest.raises(mindomni_rt.UnsupportedDeviceError, match="float16"):
        check_device(Precision(), (7, 5))


@pytest.mark.parametrize("shared", [False, True])
def test_a_budget_leaves_the_system_its_memory(monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """More where the GPU has the host's memory, as on a Jetson."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=shared))
    assert reserve("cuda:0") == RESERVE[shared] and reserve("cpu") == 0


def test_a_replay_without_a_graph_runs_the_step() -> None:
    counter = torch.zeros(1)
    replay = Replay(lambda: counter.add_(1), "cpu")
    replay.prepare()
    replay()
    replay()
    assert counter == 2


@pytest.mark.parametrize("stage", ["language", "prefix", "denoiser"])
def test_no_memory_is_told_by_stage(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    pipe = mindomni_rt.load(PARITY, device="cpu", fast=True)
    options: dict[str, Any] = dict(height=32, width=32, num_inference_steps=2, max_new_tokens=2)
    calls = []

    def full(*_: Any, **__: Any) -> None:
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    owner, name = {
        "language": (pipe.backend.language_stack, "forward"),  # type: ignore[attr-defined]
        "prefix": (pipe.backend.model.decoder, "modulation"),  # type: ignore[attr-defined]
        "denoiser": (pipe.backend, "_filled"),
    }[stage]
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(mindomni_rt.OutOfMemoryError, match=f"stage {stage}.*2 GiB.*memory_budget"):
        pipe.generate("two cats", **options)
    assert calls
