"""What a plan counts with a part of the model leaves the device with it: buffers, token loops, graphs, prefixes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import PARITY

from mindomni_rt import Pipeline
from mindomni_rt.backends.fast import backend as module
from mindomni_rt.backends.fast import prefix as prefixes
from mindomni_rt.backends.fast.backend import FastOptions, TorchCudaBackend
from mindomni_rt.backends.fast.buffers import Shape, StepBuffers
from mindomni_rt.backends.fast.language import DecodeState
from mindomni_rt.backends.fast.pinned import pinned
from mindomni_rt.backends.fast.prefix import FastPrefix
from mindomni_rt.backends.fast.step_cache import StepCache
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.model.decoder import PrefixKV
from mindomni_rt.model.mindomni import load_model

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=4, max_new_tokens=9, seed=1, output="numpy")
OWN = {"language": (DecodeState,), "decoder": (StepBuffers, StepCache)}
"""Classes of what belongs to a part."""


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Weak references to everything of `OWN` that the backend makes. Memory on a device does not wait for a collector
    of circles, so there is none."""
    found: list[Any] = []
    for kind in (DecodeState, StepBuffers, StepCache):

        def make(*args: Any, kind: Any = kind, **kwargs: Any) -> Any:
            one = kind(*args, **kwargs)
            found.append(weakref.ref(one))
            return one

        monkeypatch.setattr(module, kind.__name__, make)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def alive(made: list[Any]) -> Iterator[type]:
    return (type(one) for one in (ref() for ref in made) if one is not None)


def pipeline(*resident: str) -> tuple[Pipeline, TorchCudaBackend]:
    options = FastOptions(precision=Precision.uniform("float32"), resident=resident)
    backend = TorchCudaBackend(load_model(PARITY, torch.float32)[0], "cpu", options=options)
    return Pipeline(backend, PARITY), backend


@pytest.mark.parametrize("resident", [(), ("language",), ("decoder",), ("language", "decoder")], ids=str)
def test_what_belongs_to_a_part_goes_with_it(made: list[Any], resident: tuple[str, ...]) -> None:
    """The VAE comes last and sends every visitor away."""
    pipe, _ = pipeline(*resident)
    for _ in range(2):
        pipe.generate("two cats", step_cache=0.1, **SMALL)
        assert {kind for part in resident for kind in OWN[part]} == set(alive(made))


def test_one_set_of_buffers_at_a_time(made: list[Any]) -> None:
    pipe, _ = pipeline("language", "decoder")
    for height in (32, 64, 32):
        pipe.generate("two cats", **{**SMALL, "height": height})
    pipe.generate("two cats " * 120, **SMALL)  # a longer text than the buffers have room for
    assert sorted(kind.__name__ for kind in alive(made)) == ["DecodeState", "StepBuffers"] and len(made) > 5


def test_graphs_leave_though_a_session_holds_their_buffers() -> None:
    """A session that runs keeps its buffers and captures anew."""
    pipe, backend = pipeline("language", "decoder")
    pipe.generate("two cats", **SMALL)
    (buffers,), state = backend._buffers.values(), backend._state
    assert state is not None and buffers._graphs and state._graphs
    backend._moved("decoder")
    assert not buffers._graphs and state._graphs
    backend._moved("language")
    assert not state._graphs and buffers.shape == Shape(2, 1, 4, 6)


def test_kept_prefixes_leave_when_a_request_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative prompt's waits for later requests: on the host, before the first stage runs."""
    pipe, backend = pipeline()
    pipe.generate("two cats", **SMALL)
    gc.collect()
    kept, log = len(backend._prefixes), list[str]()
    assert kept == 1
    need = backend.residency.need
    monkeypatch.setattr(FastPrefix, "to_host", lambda self: log.append("left"))
    monkeypatch.setattr(backend.residency, "need", lambda part: log.append(part) or need(part))
    pipe.generate("two cats", **SMALL)
    assert log[: kept + 1] == ["left", "language"]


def test_a_prefix_on_the_host_is_not_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of it; the parts that a step reads come back."""

    class OnDevice(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    def there(*size: int) -> torch.Tensor:
        return torch.ones(size).as_subclass(OnDevice)

    prefix = FastPrefix(PrefixKV(there(2, 3), there(2, 3), there(4, 3), there(4, 3)), there(4, 6))
    monkeypatch.setattr(prefixes, "pinned", lambda given: [(t, torch.ones(t.shape)) for t in given])
    prefix.to_host()
    kv = prefix.kv
    assert not any(t.is_cuda for t in (kv.keys, kv.values, kv.time_keys, kv.time_values, prefix.modulation))
    assert [t.shape for t in prefix.at_times("cpu")] == [(4, 3), (4, 3), (4, 6)]


def test_a_limit_ends_when_its_pipeline_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget limits the memory of the whole process, so the next pipeline would have it too."""
    told: list[tuple[str, float]] = []
    monkeypatch.setattr(module, "limit_memory", lambda *given: told.append(given))
    model = load_model(PARITY, torch.float32)[0]
    for limited in (False, True):
        options = FastOptions(precision=Precision.uniform("float32"), limited=limited)
        with Pipeline(TorchCudaBackend(model, "cpu", options=options), PARITY):
            assert not told
        model = load_model(PARITY, torch.float32)[0]
    assert told == [("cpu", 1.0)]


def test_pinned_blocks_are_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch makes them in any case: many tensors share one, each is there once, and little is left over."""
    sizes, real = list[int](), torch.empty

    def empty(size: int, **options: Any) -> torch.Tensor:
        assert options.pop("pin_memory")
        sizes.append(size)
        return real(size, **options)

    given = [torch.full((n,), float(n)) for n in (60_000, 33_000, 33_000, 1, 700, 20_000)]
    monkeypatch.setattr("mindomni_rt.backends.fast.pinned.torch.empty", empty)
    copies = list(pinned(given))
    assert all(torch.equal(tensor, copy) for tensor, copy in copies) and len(copies) == len(given)
    assert len(sizes) < len(given) and all(size & (size - 1) == 0 for size in sizes)
    assert sum(sizes) < 1.3 * sum(t.nbytes for t in given)
