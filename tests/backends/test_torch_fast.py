"""The fast path on a CPU (no graphs, reference implementations of the kernels) against the reference backend."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PARITY, relative
from torch import nn

import mindomni_rt
from mindomni_rt import BadRequestError, Pipeline
from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
from mindomni_rt.backends.fast.backend import FastOptions, TorchCudaBackend
from mindomni_rt.backends.fast.pinned import pack, pinned
from mindomni_rt.backends.fast.residency import Residency
from mindomni_rt.memory.footprint import Precision, stage_memory
from mindomni_rt.memory.layers import Workload
from mindomni_rt.memory.planner import block_bytes, blocks_ahead, plan
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.sampling.decode import generate_tokens
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import timesteps

SMALL: dict[str, Any] = dict(height=32, width=48, num_inference_steps=4, max_new_tokens=9, seed=1, output="numpy")


@pytest.fixture(scope="module")
def slow() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu")


@pytest.fixture(scope="module")
def fast() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu", fast=True)


def same(a: Any, b: Any, bound: float = 1e-5) -> None:
    assert a.token_ids == b.token_ids and a.text == b.text
    assert relative(b.latents, a.latents) < bound


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_images": 3, "temperature": 1.0},
        {"guidance_scale": 1.0, "num_inference_steps": 3},
        {"first_step": "condition_only"},
        {"guidance_interval": (0.2, 0.7), "solver": "multistep"},
        {"height": 160, "width": 208, "num_inference_steps": 2, "think": False},  # LongRoPE's long factors
    ],
    ids=str,
)
def test_the_same_as_the_reference(slow: Pipeline, fast: Pipeline, options: dict[str, Any]) -> None:
    same(slow.generate("two cats", **{**SMALL, **options}), fast.generate("two cats", **{**SMALL, **options}))


def test_buffers_serve_one_request_after_another(fast: Pipeline) -> None:
    """Prompts of other lengths, then the first again: nothing of one request is left in the next."""
    first = fast.generate("two cats", **SMALL)
    backend = fast.backend
    assert isinstance(backend, TorchCudaBackend)
    buffers, state = next(iter(backend._buffers.values())), backend._state
    fast.generate("a much longer prompt with many more words in it", **SMALL)
    fast.generate("x", **{**SMALL, "guidance_interval": (0.0, 0.5)})
    again = fast.generate("two cats", **SMALL)
    assert np.array_equal(first.latents, again.latents) and first.token_ids == again.token_ids
    assert next(iter(backend._buffers.values())) is buffers and backend._state is state


def test_hidden_states_end_with_the_text(slow: Pipeline, fast: Pipeline) -> None:
    """The device runs ahead of the end of the text; what it computed past it is not part of the condition."""
    ids = np.arange(20, 40)
    base = LanguageRequest(token_ids=ids, positions=np.tile(np.arange(20), (3, 1)), next_position=20, max_new_tokens=10)
    tokens = list(generate_tokens(slow.backend.language(base)))
    for stop in (tokens[0], tokens[4], tokens[9]):
        request = replace(base, eos_token_ids=(stop,))
        runs = [p.backend.language(request) for p in (slow, fast)]
        texts = [list(generate_tokens(run)) for run in runs]
        assert texts[0] == texts[1] and texts[0][-1] == stop
        hidden = [p.backend.numpy(run.hidden(len(texts[0]))) for p, run in zip((slow, fast), runs, strict=True)]
        assert hidden[1].shape == (1, 20 + len(texts[1]) - 1, 64) and relative(hidden[1], hidden[0]) < 1e-5


def test_text_alone_and_abandoned(slow: Pipeline, fast: Pipeline) -> None:
    fast.stream("two cats", **SMALL).close()
    request = LanguageRequest(token_ids=np.arange(5), positions=np.tile(np.arange(5), (3, 1)), next_position=5)
    expected = slow.backend.numpy(slow.backend.language(request).hidden())
    assert relative(fast.backend.numpy(fast.backend.language(request).hidden()), expected) < 1e-5
    assert list(generate_tokens(fast.backend.language(request))) == []
    next(generate_tokens(fast.backend.language(replace(request, max_new_tokens=6))))
    same(slow.generate("two cats", **SMALL), fast.generate("two cats", **SMALL))


def test_previews_do_not_change_the_image(fast: Pipeline) -> None:
    plain, previewed = fast.generate("x", **SMALL), fast.generate("x", preview_every=1, **SMALL)
    assert np.array_equal(plain.images, previewed.images)


def test_half_precision_stays_near(slow: Pipeline) -> None:
    exact = slow.generate("two cats", think=False, **SMALL).latents
    half = mindomni_rt.load(PARITY, device="cpu", dtype="bfloat16", fast=True)
    assert relative(half.generate("two cats", think=False, **SMALL).latents, exact) < 2e-2


def test_weights_are_stored_once() -> None:
    """What the linear layers took over is gone from the blocks they came from."""
    model, report = load_model(PARITY, torch.float32)
    blocks = [*model.language.layers, *model.decoder.llm.layers]
    backend = TorchCudaBackend(model, "cpu")
    taken = [p for block in blocks for p in block.parameters()]
    assert taken and all(p.is_meta for p in taken)
    modules = (backend.model, backend.language_stack, backend.decoder_stack)
    tensors = {t.data_ptr(): t for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta}
    assert sum(t.numel() * 4 for t in tensors.values()) == sum(report.bytes.values())


# Residency


def test_a_budget_swaps_parts_and_changes_nothing(slow: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    everything = plan(slow.config, Workload(joint=True), precision=_float32()).peak
    with caplog.at_level(logging.INFO):
        pipe = mindomni_rt.load(PARITY, device="cpu", fast=True, dtype="float32", memory_budget=everything - 1_200_000)
    assert "memory budget" in caplog.text and "swaps" in caplog.text
    backend = pipe.backend
    assert isinstance(backend, TorchCudaBackend) and len(backend.residency.loaded) < 5
    for _ in range(2):
        same(slow.generate("two cats", **SMALL), pipe.generate("two cats", **SMALL))
    # The first request too loads each part once: the negative prompt goes through every stage beside the prompt.
    budget, text = everything - 1_200_000, Workload(joint=True)
    schedule = plan(slow.config, text, precision=_float32(), budget=budget).schedule
    loads = sum(len(move.load) for move in schedule if move.stage != "vision")
    assert loads and backend.residency.loads == 2 * loads


def test_every_budget_gives_the_same_image(slow: Pipeline) -> None:
    model_options = [(), ("decoder",), ("vision", "language"), ("connector", "vae", "decoder")]
    expected = slow.generate("two cats", **SMALL)
    for resident in model_options:
        model, _ = load_model(PARITY, torch.float32)
        backend = TorchCudaBackend(model, "cpu", options=FastOptions(precision=_float32(), resident=resident))
        same(expected, Pipeline(backend, PARITY).generate("two cats", **SMALL))
        loads = backend.residency.loads
        same(expected, Pipeline(backend, PARITY).generate("two cats", preview_every=1, **SMALL))
        # A preview's VAE sends a visiting decoder away, and it comes back.
        assert resident or backend.residency.loads - loads >= 8
        assert set(resident) <= backend.residency.loaded and len(backend.residency.loaded) <= len(resident) + 1


def _float32() -> Precision:
    return Precision.uniform("float32")


def test_the_plan_counts_the_joint_buffers(fast: Pipeline) -> None:
    """What running both branches at once adds to the plan: K/V of both conditions side by side, and their rows."""
    fast.generate("two cats", **SMALL)
    backend = fast.backend
    assert isinstance(backend, TorchCudaBackend)
    buffers = next(iter(backend._buffers.values()))
    work = Workload(prompt_tokens=buffers.capacity, new_tokens=0, negative_tokens=buffers.capacity)
    precision = _float32()
    one, both = (
        next(s for s in stage_memory(fast.config, replace(work, joint=joint), precision) if s.stage == "denoiser")
        for joint in (False, True)
    )
    stack, tokens = fast.config.decoder.stack, work.image_tokens
    workspace = 2 * 2 * stack.hidden_size * (buffers.capacity + 1 + tokens) * 4
    block = tokens * (3 * stack.hidden_size + 4 * stack.intermediate_size) * 4
    cache = 3 * 2 * tokens * stack.hidden_size * 4  # states of both branches that a step cache keeps
    rows = max(block, tokens * 11 * stack.hidden_size * 4)
    assert both.activations - one.activations == buffers.keys.nbytes + buffers.values.nbytes - workspace + rows + cache


def test_residency_moves_and_tells() -> None:
    torch.manual_seed(0)
    parts = {name: [nn.Linear(4, 4)] for name in "abc"}
    values = {name: modules[0].weight.detach().clone() for name, modules in parts.items()}
    moved: list[str] = []
    residency = Residency(parts, "cpu", ["a"], moved.append)
    assert residency.loaded == {"a"}
    home = parts["b"][0].weight.data_ptr()
    residency.need("a")
    residency.need("b")
    residency.need("b")
    assert moved == ["b"] and parts["b"][0].weight.data_ptr() != home
    residency.need("c")
    assert moved == ["b", "b", "c"] and residency.loaded == {"a", "c"} and residency.loads == 2
    assert parts["b"][0].weight.data_ptr() == home
    residency.drop()
    assert residency.loaded == {"a"}
    for name, modules in parts.items():
        assert torch.equal(modules[0].weight, values[name])


def test_what_was_brought_is_taken_or_freed() -> None:
    torch.manual_seed(0)
    two = [nn.Linear(4, 4), nn.Linear(4, 4)]
    parts: dict[str, list[nn.Module]] = {"a": [nn.Linear(4, 4)], "b": list(two), "c": [nn.Linear(4, 4)]}
    values = [module.weight.detach().clone() for module in two]
    residency = Residency(parts, "cpu", [])
    home = two[0].weight.data_ptr()
    residency.need("a")
    residency.bring("b", two[:1], beside=("a",))
    residency.bring("b", two, beside=("a",))  # once is enough
    residency.need("a")
    assert two[0].weight.data_ptr() == home and residency.hidden_bytes == 0  # nobody sees half a part
    residency.need("b")
    assert residency.hidden_bytes == 80 and residency.moved_bytes == 80 + 160
    residency.bring("b", two, beside=())  # it is there
    residency.need("a")
    residency.bring("b", two, beside=("a",))
    residency.hold(two)
    residency.hold(two[:1])  # less room than there was
    residency.need("b")
    assert residency.hidden_bytes == 80
    residency.need("a")
    residency.bring("b", two, beside=("a",))
    residency.need("c")  # not beside it: there may be no room
    residency.need("b")
    assert residency.hidden_bytes == 80 and residency.moved_bytes == 80 + 160 + 80 + 160 + 80 + 80 + 160
    assert all(torch.equal(module.weight, value) for module, value in zip(two, values, strict=True))


def test_blocks_brought_beside_the_text_change_nothing(slow: Pipeline) -> None:
    """The language model stays, the decoder visits and there is room for all its blocks beside the text."""
    everything = plan(slow.config, Workload(joint=True), precision=_float32())
    found = replace(everything, resident=("vision", "language", "connector", "vae"), budget=everything.peak)
    blocks = blocks_ahead(slow.config, Workload(joint=True), found)
    assert blocks == slow.config.decoder.stack.num_layers
    model, _ = load_model(PARITY, torch.float32)
    backend = TorchCudaBackend(model, "cpu", options=FastOptions(precision=_float32(), plan=found))
    pipe = Pipeline(backend, PARITY)
    for count in (1, 2):
        same(slow.generate("two cats", **SMALL), pipe.generate("two cats", **SMALL))
        assert backend.residency.hidden_bytes == count * blocks * block_bytes(slow.config, _float32())
    pipe.generate("two cats", **{**SMALL, "think": False})
    assert backend.residency.hidden_bytes == 2 * blocks * block_bytes(slow.config, _float32())


def test_pinned_blocks() -> None:
    """Blocks are powers of two, tensors lie apart inside them, and all together take hardly more than the tensors."""
    generator = np.random.default_rng(0)
    layer = [2 * 3584 * 4608, 2 * 3584 * 3584, 2 * 3584 * 37888, 2 * 3584 * 18944, 7168, 7168]
    for sizes in ([], [1], [2 * 152064 * 3584, *28 * layer], list(map(int, generator.integers(1, 1 << 28, 200)))):
        blocks = pack(sizes)
        placed = [at for _, places in blocks for at in places]
        assert sorted(placed) == list(range(len(sizes)))
        for room, places in blocks:
            assert room & (room - 1) == 0
            spans = sorted((at, at + sizes[i]) for i, at in places.items())
            assert all(end <= start for (_, end), (start, _) in pairwise(spans)) and spans[-1][1] <= room
            assert all(at % 64 == 0 for at, _ in spans)
        if len(sizes) > 1:
            assert sum(room for room, _ in blocks) <= 1.03 * sum(sizes)


def test_host_copies_keep_values_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    torch.manual_seed(0)
    image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    tensors = [
        torch.randn(7, 3),
        image,
        torch.randn(5).to(torch.float8_e4m3fn),
        torch.randn(4, 6)[:, ::2],
        torch.ones(()),
    ]
    found = {id(tensor): host for tensor, host in pinned(tensors)}
    for tensor in tensors:
        host = found[id(tensor)]
        assert host.dtype == tensor.dtype and torch.equal(host.float(), tensor.float())
    assert found[id(image)].stride() == image.stride()
    assert len({host.untyped_storage().data_ptr() for host in found.values()}) < len(tensors)


def test_no_budget_is_small_enough() -> None:
    with pytest.raises(mindomni_rt.OutOfMemoryError, match="alone needs"):
        mindomni_rt.load(PARITY, device="cpu", fast=True, memory_budget="1MB")
    with pytest.raises(BadRequestError, match="fast path"):
        mindomni_rt.load(PARITY, device="cpu", memory_budget="1GB")


# Lossy options


def test_step_cache(fast: Pipeline, slow: Pipeline) -> None:
    options = {**SMALL, "num_inference_steps": 12, "think": False}
    exact = fast.generate("two cats", **options)
    assert np.array_equal(exact.latents, fast.generate("two cats", step_cache=0.0, **options).latents)
    never = fast.generate("two cats", step_cache=1e-9, **options)
    same(exact, never, 1e-6)
    some, more = (fast.generate("two cats", step_cache=c, **options) for c in (0.05, 1e9))
    assert 1e-6 < relative(some.latents, exact.latents) <= relative(more.latents, exact.latents) < 0.5
    with pytest.raises(BadRequestError, match="step_cache"):
        slow.generate("two cats", step_cache=0.1, **options)


def test_step_cache_skips_at_most_three_in_a_row(fast: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        fast.generate("x", step_cache=1e9, **{**SMALL, "num_inference_steps": 12, "think": False})
    # Steps 1 and 12 are whole; of the ten between, two are (after three and six in a row).
    assert "8 of 12 steps used it" in caplog.text


def test_the_whole_interval_and_euler_are_the_default(slow: Pipeline, fast: Pipeline) -> None:
    for pipe in (slow, fast):
        plain = pipe.generate("two cats", **SMALL)
        spelled = pipe.generate("two cats", guidance_interval=(0.0, 1.0), solver="euler", draft_tokens=0, **SMALL)
        assert np.array_equal(plain.latents, spelled.latents)


def test_guidance_interval_by_hand(slow: Pipeline) -> None:
    """Outside the interval the guided branch stands alone: what a scale of 1 gives."""
    options = {**SMALL, "think": False, "guidance_scale": 4.0}
    none = slow.generate("two cats", guidance_interval=(0.9, 0.95), **options)  # no step begins in it
    alone = slow.generate("two cats", **{**options, "guidance_scale": 1.0})
    assert np.array_equal(none.latents, alone.latents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(guidance_interval=(0.5, 0.2)), "guidance_interval"),
        (dict(guidance_interval=(0.5,)), "guidance_interval"),
        (dict(solver="heun"), "solver"),
        (dict(step_cache=-1.0), "step_cache"),
        (dict(draft_tokens=40), "draft_tokens"),
    ],
)
def test_wrong_options(slow: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        slow.generate("x", **SMALL, **options)


def test_the_loop_alone(slow: Pipeline, fast: Pipeline) -> None:
    """Velocities of each step, of a condition made by hand."""
    g = np.random.default_rng(0)
    condition = torch.from_numpy(g.standard_normal((1, 7, 48)).astype(np.float32))
    times = timesteps(3)
    latents = g.standard_normal((2, 4, 4, 6)).astype(np.float32)
    found = []
    for pipe in (slow, fast):
        prefixes = [
            pipe.backend.prefix(c, times[:-1], 6, b) for c, b in ((condition, [(1, 4)]), (condition[:, :3], []))
        ]
        request = DenoiseRequest(
            latents=latents, times=times, guided=prefixes[0], unguided=prefixes[1], guidance_scale=2.5
        )
        found.append([pipe.backend.numpy(state.velocity) for state in denoise(pipe.backend, request)])
    for a, b in zip(*found, strict=True):
        assert relative(b, a) < 1e-5


def test_edit_features_on_the_fast_path(tmp_path: Path) -> None:
    from PIL import Image

    from mindomni_rt.model.tiny import write_random_checkpoint

    write_random_checkpoint(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8))
    pipes = [mindomni_rt.load(tmp_path, device="cpu", fast=f) for f in (False, True)]
    a, b = (p.generate("but red", image=image, edit_features="vit+vae", **SMALL) for p in pipes)
    same(a, b)
