"""Faults that the stand-in shows. Each test fails until its fault is fixed; then its mark goes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mindomni_rt.backends.base import DenoiseRequest
from mindomni_rt.backends.fast.backend import TorchCudaBackend
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import timesteps

from . import test_lengths as lengths
from .runs import ROOT, Runs
from .test_requests import job
from .tf32 import Tf32

pytestmark = pytest.mark.timeout(1800)
SHORT: dict[str, Any] = dict(num_inference_steps=6, max_new_tokens=6, height=512, width=512)
EDIT: dict[str, Any] = dict(
    SHORT, image=True, edit_features="vit+vae", draft_tokens=2, preview_every=3, max_new_tokens=20, end=14
)
"""Every stage and kind of step."""
IN_FLIGHT = 2  # steps that a cancelled request may still run
STREAMS = 2  # the default one and one for captures


def clean(found: dict[str, Any]) -> None:
    """Loaded, ran, nothing noted."""
    for part in (found, *found["again"]):
        assert not part["load"]["error"], part["load"]["error"]
        for request in part["requests"]:
            assert not request["error"], request["error"]
    assert not found["faults"], found["faults"]


def two_requests(runs: Runs, **load: Any) -> dict[str, Any]:
    found = runs(folder=runs.thin, load={"device": "cuda:0", **load}, requests=["first", "second"])
    clean(found)
    return found


def loads(runs: Runs) -> dict[str, Any]:
    """A load within a budget, then a plain one, then a pair."""
    rest = [{"device": "cuda:0"}, {"device": "cuda:0", "precision": "decoder=fp8"}]
    again = [{"load": load, "requests": []} for load in rest]
    found = runs(folder=runs.thin, load={"device": "cuda:0", "memory_budget": "16GB"}, requests=[], again=again)
    clean(found)
    return found


def test_the_default_device(runs: Runs) -> None:
    budget = {"load": {"device": "cuda", "memory_budget": "16GB"}, "requests": [["short", SHORT]]}
    clean(runs(folder=runs.thin, load={"device": "cuda"}, requests=[["short", SHORT]], again=[budget]))


def test_float32_steps_do_without_tf32() -> None:
    folder = ROOT / "tests" / "fixtures" / "parity"
    model, _ = load_model(folder, torch.float32)
    backend = TorchCudaBackend(model, "cpu")
    exact = _latents(backend, backend.config)
    with Tf32():
        found = _latents(backend, backend.config)
    assert np.linalg.norm(found - exact) / np.linalg.norm(exact) < 1e-6


def _latents(backend: TorchCudaBackend, config: ModelConfig) -> np.ndarray:
    generator = np.random.default_rng(0)
    times = timesteps(4)
    condition = torch.from_numpy(generator.standard_normal((1, 9, config.decoder.stack.hidden_size)).astype(np.float32))
    request = DenoiseRequest(
        latents=generator.standard_normal((1, 4, 8, 12)).astype(np.float32),
        times=times,
        guided=backend.prefix(condition, times[:-1], 24),
        unguided=None,
        guidance_scale=1.0,
    )
    *_, last = denoise(backend, request)
    return backend.numpy(last.latents)


def test_prompts_do_not_unpack_weights(runs: Runs) -> None:
    """Launches for a few rows have tiles of 16 rows."""
    eight = {**lengths.job(runs), "requests": lengths.REQUESTS[:1]}
    for asked, kernel in ((job("int4", "8GB"), "int4_linear"), (eight, "int8_linear")):
        launches = [it for it in runs(**asked)["launches"] if it["kernel"] == f"{kernel}.product_kernel"]
        assert max(dict(it["constants"])["BM"] for it in launches) >= 64, kernel


def test_pinned_memory_is_what_the_weights_take(runs: Runs) -> None:
    found = runs(**job("int4", "8GB"))
    assert found["load"]["pinned"] <= 1.05 * found["load"]["pinned_wanted"]


def test_a_guest_goes_when_a_resident_part_works(runs: Runs) -> None:
    found = two_requests(runs, memory_budget="4.8GB", precision="int4")
    assert "decoder" in found["load"]["resident"] and "language" not in found["load"]["resident"]
    second = found["requests"][1]
    # What the loop holds besides its weights, pools of graphs among it, is less than the language model's 1.8 GB.
    assert second["stages"]["denoiser"] < second["stages"]["language"]
    assert second["peak"] <= second["planned"]


def test_float32_with_fp8_off_hopper(runs: Runs) -> None:
    load = {"device": "cuda:0", "dtype": "float32", "precision": "decoder=fp8"}
    clean(runs(folder=runs.thin, stand={"capability": [8, 9]}, load=load, requests=[["short", SHORT]]))


def test_an_error_in_a_capture_ends_it(runs: Runs) -> None:
    found = runs(
        folder=runs.thin,
        load={"device": "cuda:0"},
        requests=[["short", SHORT]],
        refuse={"gemv.gemv_kernel": "capture", "segment_attention.segment_kernel": "capture"},
    )
    assert not found["stuck"] and found["current"] == [0, 0]  # what follows runs on the default stream
    clean(found)


def test_steps_in_flight_are_bounded(runs: Runs) -> None:
    found = two_requests(runs)
    assert max(found["requests"][0]["ahead"]) <= IN_FLIGHT


def test_the_measured_peak_counts_pools(runs: Runs) -> None:
    found = two_requests(runs)
    second = found["requests"][1]
    assert second["measured"] >= 0.97 * second["peak"]


def test_work_runs_on_few_streams(runs: Runs) -> None:
    found = two_requests(runs)
    assert len(found["streams"]) <= STREAMS
    assert len(runs(**job("int4", "8GB"))["streams"]) <= STREAMS + 1  # and one for what is uploaded


def test_tokens_and_steps_have_pools_of_their_own(runs: Runs) -> None:
    """A token's graph does not hold what the graphs of a large image took."""
    second = two_requests(runs)["requests"][1]
    assert sum(pool["graphs"] > 0 for pool in second["pools"]) == 2


def test_the_second_device_from_a_worker_thread(runs: Runs) -> None:
    requests = [["short", SHORT], ["edit", EDIT], ["question", dict(understand="what is it", image=True, end=4)]]
    found = runs(folder=runs.thin, stand={"devices": 2}, load={"device": "cuda:1"}, requests=requests, thread=True)
    clean(found)
    assert found["devices"] == [1] and found["current"] == [0, 0, 0]


def test_two_pipelines_on_two_devices(runs: Runs) -> None:
    again = [{"load": {"device": "cuda:1"}, "requests": [["short", SHORT]]}]
    stand, first = {"devices": 2}, {"device": "cuda:0"}
    clean(runs(folder=runs.thin, stand=stand, load=first, requests=[["short", SHORT]], keep=True, again=again))


def test_a_budget_ends_with_its_pipeline(runs: Runs) -> None:
    found = loads(runs)
    assert found["load"]["fraction"][0] < 1
    assert found["again"][0]["load"]["fraction"] == [1.0]


def test_pairs_leave_the_vae_alone(runs: Runs) -> None:
    plain, pair = (part["load"] for part in loads(runs)["again"])
    assert pair["vae"] == plain["vae"] == "bfloat16"
