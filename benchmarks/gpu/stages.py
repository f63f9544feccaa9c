"""Stages and whole requests of `gpu_suite`, ours and the baselines', on one random model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
from mindomni_rt.backends.fast.backend import FastOptions, TorchCudaBackend
from mindomni_rt.backends.torch.backend import TorchPrefix
from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.memory.layers import Workload
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.sampling.decode import generate_tokens
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import plan_steps, timesteps

from .baselines import EagerDecoder
from .measure import Meter, relative_error


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Sizes of a run: pixels a side, steps, tokens of the prompt, written, and of the negative prompt."""

    config: ModelConfig
    dtype: str
    sides: Sequence[int]
    steps: int
    prompt: int
    new: int
    negative: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def work(self, side: int) -> Workload:
        """The request at a size, for the planner."""
        return Workload(
            prompt_tokens=self.prompt,
            new_tokens=self.new,
            negative_tokens=self.negative,
            height=side,
            width=side,
            steps=self.steps,
            joint=True,
        )

    @property
    def lengths(self) -> tuple[int, int]:
        """Condition lengths of both branches."""
        return self.prompt + self.new - 1, self.negative


def random_model(preset: Preset, device: torch.device, seed: int = 0) -> MindOmniModel:
    """The model with random weights, made on the device. The same seed gives the same weights."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = MindOmniModel(preset.config)
    model = model.to(preset.torch_dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and "bias" not in name:
            parameter.data.fill_(1.0)  # norms
        else:
            parameter.data.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


def conditions(preset: Preset, device: torch.device) -> list[Tensor]:
    """Random conditions (1, L, C) of both branches."""
    generator = torch.Generator(device).manual_seed(1)
    width = preset.config.decoder.stack.hidden_size
    return [
        torch.randn(1, length, width, device=device, generator=generator).to(preset.torch_dtype)
        for length in preset.lengths
    ]


def noise(side: int, seed: int = 2) -> np.ndarray:
    """(1, 4, side / 8, side / 8)."""
    return np.random.default_rng(seed).standard_normal((1, 4, side // 8, side // 8)).astype(np.float32)


def eager_steps(preset: Preset, model: MindOmniModel, meter: Meter, side: int, count: int = 5) -> dict[str, Any]:
    """Seconds of a guided step in the released code's formulation, and its first velocities."""
    device = meter.device
    latents = torch.from_numpy(noise(side)).to(device)
    with torch.inference_mode():
        eager = EagerDecoder(model.decoder, conditions(preset, device), side // 16, side // 16)
        meter.restart()
        velocities = eager.step(latents, 0.0)
        times = [meter.once(lambda: eager.step(latents, 0.0))[0] for _ in range(count)]
    return {"step_s": median(times), "peak_bytes": meter.peak(), "velocities": velocities.float()}


def prefixes_of(preset: Preset, backend: TorchCudaBackend, side: int) -> list[TorchPrefix]:
    """Both branches' prefixes for an image of a size."""
    times = timesteps(preset.steps)[:-1]
    found = conditions(preset, torch.device(backend.device))
    return [backend.prefix(c, times, (side // 16) ** 2) for c in found]


def denoise_request(preset: Preset, prefixes: Sequence[TorchPrefix], side: int, **more: Any) -> DenoiseRequest:
    """The whole loop at guidance 3."""
    return DenoiseRequest(
        latents=noise(side),
        times=timesteps(preset.steps),
        guided=prefixes[0],
        unguided=prefixes[1],
        guidance_scale=3.0,
        **more,
    )


def our_steps(
    preset: Preset, backend: TorchCudaBackend, meter: Meter, side: int, exact: Tensor | None = None
) -> dict[str, Any]:
    """Seconds of the prefix pass and of one guided step, and the distance from the eager velocities."""
    seconds, prefixes = meter.once(lambda: prefixes_of(preset, backend, side))
    seconds, prefixes = meter.once(lambda: prefixes_of(preset, backend, side))
    found: dict[str, Any] = {"prefixes_s": seconds}
    request = denoise_request(preset, prefixes, side)
    meter.restart()
    session = backend.denoiser(request)
    with torch.inference_mode():
        first = session.velocities(plan_steps(request.times)[0])[:, 0].clone()  # captures
        times = [meter.once(lambda: session.buffers.velocity(2))[0] for _ in range(meter.runs)]
    found |= {"step_s": median(times), "step_runs_s": times, "peak_bytes": meter.peak()}
    if exact is not None:
        found["error_to_eager"] = relative_error(first, exact)
    return found


def language_request(preset: Preset, new: int, count: int | None = None, **more: Any) -> LanguageRequest:
    """Random text, greedy."""
    count = count or preset.prompt
    ids = np.random.default_rng(3).integers(10, preset.config.language.vocab_size - 10, count)
    return LanguageRequest(
        token_ids=ids, positions=np.tile(np.arange(count), (3, 1)), next_position=count, max_new_tokens=new, **more
    )


def our_decoding(preset: Preset, backend: TorchCudaBackend, meter: Meter, **more: Any) -> dict[str, Any]:
    """Seconds of the prefill and of each token, by the difference between a long text and a short one."""

    def write(new: int) -> list[int]:
        return list(generate_tokens(backend.language(language_request(preset, new, **more))))

    write(preset.new)  # compiles, tunes, captures
    meter.restart()
    short = min(4, preset.new - 1)
    first = median(meter.once(lambda: write(short))[0] for _ in range(3))
    runs = [meter.once(lambda: write(preset.new)) for _ in range(3)]
    whole = median(seconds for seconds, _ in runs)
    return {
        "prefill_and_4_tokens_s": first,
        "whole_s": whole,
        "token_s": (whole - first) / (preset.new - short),
        "peak_bytes": meter.peak(),
        "tokens": runs[0][1][:16],
    }


def decode_bytes(backend: TorchCudaBackend) -> int:
    """Bytes of weights that one token reads: blocks, norm and head."""
    modules = (backend.language_stack, backend.head)
    tensors = {t.data_ptr(): t for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def whole_request(preset: Preset, backend: TorchCudaBackend, meter: Meter, side: int, **lossy: Any) -> dict[str, Any]:
    """Prompt to pixels, stage by stage: think, connect, both prefixes, every step, VAE."""
    spent: dict[str, float] = {}

    def stage(name: str, run: Callable[[], Any]) -> Any:
        seconds, result = meter.once(run)
        spent[name] = spent.get(name, 0.0) + seconds
        return result

    def think(new: int, count: int | None = None) -> Any:
        run = backend.language(language_request(preset, new, count))
        return run.hidden(len(list(generate_tokens(run))))

    def paint() -> Tensor:
        *_, last = denoise(backend, denoise_request(preset, prefixes, side, **lossy))
        found: Tensor = last.latents
        return found

    meter.restart()
    hidden = stage("language", lambda: think(preset.new))
    negative = stage("language", lambda: think(0, preset.negative))
    found = [stage("connector", partial(backend.connector, h)) for h in (hidden, negative)]
    times = timesteps(preset.steps)[:-1]
    prefixes = [stage("prefix", partial(backend.prefix, c, times, (side // 16) ** 2)) for c in found]
    latents = stage("denoiser", paint)
    pixels = stage("vae", lambda: backend.vae(latents))
    assert np.isfinite(pixels).all() and pixels.shape == (1, side, side, 3)
    return {"stages_s": spent, "total_s": sum(spent.values()), "peak_bytes": meter.peak(), "latents": latents.float()}


def make_backend(
    model: MindOmniModel, device: str, precision: Precision, resident: tuple[str, ...] | None = None
) -> TorchCudaBackend:
    """The fast path over a model, whose block weights it takes."""
    return TorchCudaBackend(model, device, options=FastOptions(precision=precision, resident=resident))
