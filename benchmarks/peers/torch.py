"""The peers that run on PyTorch: transformers for the language model, diffusers for the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from itertools import pairwise, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.backends.base import DenoiseRequest
from mindomni_rt.backends.fast.backend import FastOptions, TorchCudaBackend
from mindomni_rt.backends.torch.backend import TorchBackend
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.sampling.decode import generate_tokens
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import guide, timesteps

from ..gpu.baselines import language_generate, omnigen_decoder, omnigen_inputs, omnigen_step, transformers_language
from ..gpu.measure import relative_error
from ..gpu.stages import Preset, conditions, denoise_request, language_request, noise
from .pairs import BOUNDS, Group, Match, Pair, after_first, read, timed

GUIDANCE = 3.0


def backend_of(model: MindOmniModel, device: torch.device) -> TorchBackend:
    """Ours as `load` chooses it: the fast path on CUDA, the reference on the CPU. Takes the model's block weights on
    CUDA, so a peer that shares them has to be made before."""
    if device.type == "cpu":
        return TorchBackend(model)
    dtype = str(model.language.embed_tokens.weight.dtype).removeprefix("torch.")
    return TorchCudaBackend(model, str(device), options=FastOptions(precision=Precision.uniform(dtype)))


def language_group(preset: Preset, model: MindOmniModel, device: torch.device) -> Group:
    """Prefill and greedy decoding. Raises ImportError without transformers.

    Hidden states of the prompt are compared behind the peer's final norm, which ours leaves out; texts token by token.
    """
    theirs = transformers_language(model.language)
    ours = backend_of(model, device)
    request, first = language_request(preset, preset.new), language_request(preset, 1)
    ids = torch.from_numpy(request.token_ids).to(device)[None]
    with torch.inference_mode():
        expected = theirs.model(input_ids=ids).last_hidden_state
        hidden = theirs.model.language_model.norm(ours.language(language_request(preset, 0)).hidden())
        error = relative_error(expected, hidden)
    text = language_generate(theirs, ids, preset.new, False)[0, ids.shape[1] :].tolist()
    written = list(generate_tokens(ours.language(request)))
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, written, strict=True)))
    exact = preset.dtype == "float32"
    match = Match(error=error, bound=BOUNDS[preset.dtype], tokens_equal=equal == preset.new if exact else None)

    prefill = Pair(
        name="prefill and first token",
        ours=timed(lambda: list(generate_tokens(ours.language(first)))),
        theirs=timed(lambda: language_generate(theirs, ids, 1, False)),
    )
    decode = Pair(
        name="decoded token",
        ours=after_first(lambda mark: read(generate_tokens(ours.language(request)), mark), preset.new - 1),
        theirs=after_first(lambda mark: language_generate(theirs, ids, preset.new, False, mark), preset.new - 1),
        rate="tokens/s",
    )
    note = f"{preset.prompt} prompt tokens, {preset.new} written, greedy; the peer's generate() with its defaults"
    extra = {"equal_tokens": equal, "tokens": preset.new}
    return Group(
        peer=f"transformers {version('transformers')}", match=match, pairs=(prefill, decode), note=note, extra=extra
    )


def decoder_group(preset: Preset, model: MindOmniModel, device: torch.device) -> Group:
    """The denoising loop with guidance. Raises ImportError without diffusers.

    Velocities of both branches at the first time are compared, and in float32 the latents at the loop's end too.
    """
    # The longest first: see `omnigen_inputs`.
    found = sorted(conditions(preset, device), key=lambda c: -c.shape[1])
    theirs = omnigen_decoder(model.decoder, found)
    ours = backend_of(model, device)
    side, times = preset.sides[0], timesteps(preset.steps)
    inputs = omnigen_inputs([c.shape[1] for c in found], (side // 16) ** 2, device)
    start = torch.from_numpy(noise(side)).to(device)

    def prefixes() -> list[Any]:
        return [ours.prefix(c, times[:-1], (side // 16) ** 2) for c in found]

    def our_loop(ready: Sequence[Any]) -> Tensor:
        *_, last = denoise(ours, denoise_request(preset, ready, side))
        found: Tensor = last.latents
        return found

    def their_loop() -> Tensor:
        latents = start
        with torch.inference_mode():
            for now, following in pairwise(times):
                guided, unguided = omnigen_step(theirs, latents, float(now), inputs).float().split(1)
                latents = latents + float(following - now) * guide(guided, unguided, GUIDANCE)
        return latents

    ready = prefixes()
    both = omnigen_step(theirs, start, 0.0, inputs)
    error = max(
        relative_error(velocity[None], _first_velocity(ours, prefix, times, side))
        for velocity, prefix in zip(both, ready, strict=True)
    )
    latents = relative_error(their_loop(), our_loop(ready).clone())
    exact = preset.dtype == "float32"
    match = Match(error=max(error, latents) if exact else error, bound=BOUNDS[preset.dtype])
    step = Pair(
        name="guided step", ours=timed(lambda: our_loop(ready), preset.steps), theirs=timed(their_loop, preset.steps)
    )
    whole = Pair(name="loop with its prefix", ours=timed(lambda: our_loop(prefixes())), theirs=timed(their_loop))
    lengths = " + ".join(str(c.shape[1]) for c in found)
    note = (
        f"{side}x{side}, {preset.steps} steps, conditions of {lengths} tokens; ours computes their K/V once, before "
        "the loop (counted in the second row); the peer runs them again in every step, under a dense mask"
    )
    extra = {"error_velocities": error, "error_latents": latents}
    return Group(peer=f"diffusers {version('diffusers')}", match=match, pairs=(step, whole), note=note, extra=extra)


def _first_velocity(ours: TorchBackend, prefix: Any, times: np.ndarray, side: int) -> Tensor:
    """Velocity (1, 4, h, w) of one branch alone at the first time."""
    request = DenoiseRequest(latents=noise(side), times=times, guided=prefix, unguided=None, guidance_scale=1.0)
    velocity: Tensor = next(denoise(ours, request)).velocity
    return velocity.clone()
