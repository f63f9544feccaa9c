"""The peers that run on PyTorch: transformers for the language model, diffusers for the decoder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mindomni_rt.backends.compiled.backend import CompiledBackend
from mindomni_rt.backends.compiled.onnx import load_onnx
from mindomni_rt.backends.torch.backend import TorchBackend
from mindomni_rt.backends.torch.widen import widen
from mindomni_rt.bundle.manifest import open_bundle
from mindomni_rt.errors import BadRequestError
from mindomni_rt.memory.machine import read_machine
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.sampling.schedule import guide, timesteps

from ..machine import free_memory
from ..measure import relative_error
from ..stages import GUIDANCE, Preset, Stages, dtype_of, make_backend, mean_velocity, noise, random_conditions
from .baselines import language_generate, omnigen_decoder, omnigen_inputs, omnigen_step, transformers_language
from .pairs import BOUNDS, ROUNDED, Group, Match, Pair, after_first, timed


def backend_of(model: MindOmniModel, device: torch.device, bundle: Path | None = None) -> Any:
    """Ours as `load` chooses it: the fast path on CUDA, the reference on the CPU, with 16-bit weights widened where the
    CPU has no products of them. Changes the model, so a peer that shares its weights has to be made before.

    bundle: ONNX graphs of the same checkpoint instead. Raises BadRequestError for another model's.
    """
    if bundle is not None:
        opened = open_bundle(bundle)
        if opened.manifest.model != model.config:
            raise BadRequestError(f"--rounded {bundle}: a bundle of another model than the checkpoint")
        return load_onnx(opened, device.type)
    if device.type != "cpu":
        return make_backend(model, str(device))
    if read_machine(with_gpus=False).widens(dtype_of(model)):
        widen(model)
    return TorchBackend(model)


def _in_float32(theirs: Any, run: Callable[[Any], Tensor]) -> Tensor:
    """What the peer computes in float32: a copy that shares the 16-bit weights and widens them product by product."""
    shared = {id(p): p for p in theirs.parameters()}
    wide = copy.deepcopy(theirs, shared)
    widen(wide)
    found = run(wide).cpu()
    free_memory()
    return found


def _match(dtype: str, theirs: Tensor, ours: Tensor, exact: Tensor | None, rounded: bool, **more: Any) -> Match:
    """By distances from `exact`, and without one (float32) by the distance from the peer. Rounded weights cannot be as
    near as the peer, so they are not held against it."""
    if exact is None:
        return Match(error=relative_error(theirs, ours), bound=BOUNDS[dtype], **more)
    baseline = None if rounded else relative_error(theirs.cpu(), exact)
    bound = ROUNDED if rounded else BOUNDS[dtype]
    return Match(error=relative_error(ours.cpu(), exact), bound=bound, baseline=baseline, exact=False, **more)


def _kept(stages: Stages, found: Any) -> Tensor:
    """A result as a tensor that later work does not change."""
    return found.clone() if isinstance(found, Tensor) else torch.from_numpy(stages.backend.numpy(found).copy())


def _given(stages: Stages, condition: Tensor) -> Any:
    """A condition as the backend takes it."""
    backend = stages.backend
    if isinstance(backend, CompiledBackend):
        return backend.put(condition.float().numpy(), backend.manifest.dtype)
    return condition.to(backend.torch_dtype)


def language_group(preset: Preset, model: MindOmniModel, device: torch.device, bundle: Path | None = None) -> Group:
    """Prefill and greedy decoding. Raises ImportError without transformers.

    Hidden states of the prompt are compared behind the peer's final norm, which ours leaves out; texts token by token.
    """
    theirs = transformers_language(model.language, preset.config)
    stages = Stages(backend_of(model, device, bundle), preset.work())
    ids = torch.from_numpy(stages.text(preset.prompt)).to(device)[None]
    same = preset.dtype == "float32" and bundle is None

    @torch.inference_mode()
    def their_states(peer: Any) -> Tensor:
        return peer.model(input_ids=ids).last_hidden_state

    with torch.inference_mode():
        ours = model.language.norm(_kept(stages, stages.hidden()))
    text = language_generate(theirs, ids, preset.new, False)[0, ids.shape[1] :].tolist()
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, stages.write(), strict=True)))
    match = _match(
        preset.dtype,
        their_states(theirs),
        ours,
        None if same else _in_float32(theirs, their_states),
        rounded=bundle is not None,
        tokens_equal=equal == preset.new if same else None,
    )

    generate, rest = partial(language_generate, theirs, ids, preset.new), preset.new - 1
    prefill = timed(lambda: stages.write(new=1)), timed(lambda: language_generate(theirs, ids, 1, False))
    token, plain = after_first(stages.write, rest), after_first(partial(generate, False), rest)
    pairs = [Pair("prefill and first token", *prefill), Pair("decoded token", token, plain, rate="tokens/s")]
    if device.type == "cuda":  # compiling takes longer than a toy run
        compiled = after_first(partial(generate, True), rest)
        pairs.append(Pair("decoded token, static cache and compiled", token, compiled))
    return Group(
        peer=f"transformers {version('transformers')}",
        match=match,
        pairs=pairs,
        note=f"{preset.prompt} prompt tokens, {preset.new} written, greedy; the peer's generate() with its defaults",
        extra={"equal_tokens": equal, "tokens": preset.new},
    )


def decoder_group(preset: Preset, model: MindOmniModel, device: torch.device, bundle: Path | None = None) -> Group:
    """The denoising loop with guidance. Raises ImportError without diffusers.

    First velocities are compared, the mean of both branches, and in float32 the latents at the loop's end too.
    """
    # The longest first: see `omnigen_inputs`.
    work = preset.work()
    conditions = sorted(random_conditions(preset.config, work, preset.torch_dtype, device), key=lambda c: -c.shape[1])
    theirs = omnigen_decoder(model.decoder, conditions)
    stages, times = Stages(backend_of(model, device, bundle), work), timesteps(preset.steps)
    own = [_given(stages, c) for c in conditions]
    inputs = omnigen_inputs([c.shape[1] for c in conditions], work.image_tokens, device)
    start = torch.from_numpy(noise(preset.config, work)).to(device)

    def their_loop() -> Tensor:
        latents = start
        with torch.inference_mode():
            for now, following in pairwise(times):
                guided, unguided = omnigen_step(theirs, latents, float(now), inputs).float().split(1)
                latents = latents + float(following - now) * guide(guided, unguided, GUIDANCE)
        return latents

    def their_velocity(peer: Any) -> Tensor:
        return mean_velocity(omnigen_step(peer, start, 0.0, inputs))

    ready, same = stages.prefixes(own), preset.dtype == "float32" and bundle is None
    ours = _kept(stages, stages.first_velocity(ready))
    exact = None if same else _in_float32(theirs, their_velocity)
    match = _match(preset.dtype, their_velocity(theirs), ours, exact, rounded=bundle is not None)
    latents = relative_error(their_loop(), _kept(stages, stages.paint(ready)))
    extra = {"error_velocities": match.error, "error_latents": latents}
    if same:
        match = Match(error=max(match.error, latents), bound=match.bound)
    step = timed(lambda: stages.paint(ready), preset.steps), timed(their_loop, preset.steps)
    whole = timed(lambda: stages.paint(stages.prefixes(own))), timed(their_loop)
    pairs = Pair("guided step", *step), Pair("loop with its prefix", *whole)
    lengths = " + ".join(str(c.shape[1]) for c in conditions)
    note = (
        f"{work.width}x{work.height}, {preset.steps} steps, conditions of {lengths} tokens; ours computes their K/V "
        "once, before the loop (the second row includes it); the peer recomputes them in every step, under a dense mask"
    )
    return Group(peer=f"diffusers {version('diffusers')}", match=match, pairs=pairs, note=note, extra=extra)
