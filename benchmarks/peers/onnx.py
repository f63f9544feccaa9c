"""The peer that runs our own graphs: onnxruntime as its tutorial shows it, numpy in and out, default options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
from mindomni_rt.backends.compiled.onnx import load_onnx
from mindomni_rt.bundle.manifest import open_bundle
from mindomni_rt.errors import BadRequestError, MissingExtraError
from mindomni_rt.sampling.decode import generate_tokens
from mindomni_rt.sampling.denoise import denoise
from mindomni_rt.sampling.schedule import timesteps

from .pairs import BOUNDS, Group, Match, Pair, after_first, read, timed
from .plain_bundle import GUIDANCE, Arrays, PlainBundle


class _Work:
    """The same request for ours and for the plain way."""

    def __init__(
        self, folder: Path, device: str, prompts: Sequence[int], new: int, lengths: tuple[int, int], steps: int
    ) -> None:
        """prompts: token counts."""
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "bench") from error
        bundle = open_bundle(folder)
        if bundle.manifest.dtype == "bfloat16":
            raise BadRequestError(f"{folder}: numpy has no bfloat16; expected a bundle of fp32 or fp16")
        provider = "CUDAExecutionProvider"
        if device == "cpu" or provider not in onnxruntime.get_available_providers():
            device, provider = "cpu", "CPUExecutionProvider"
        self.ours, self.plain = load_onnx(bundle, device), PlainBundle(bundle, provider)
        self.name, self.device, self.dtype = f"onnxruntime {onnxruntime.__version__}", device, bundle.manifest.dtype
        draw, config = np.random.default_rng(0), bundle.manifest.model
        self.new, self.steps = new, steps
        most = config.language.max_positions - new
        self.prompts = [draw.integers(6, config.language.vocab_size, min(n, most)) for n in prompts]
        width = config.decoder.stack.hidden_size
        self.conditions = [draw.standard_normal((1, n, width), np.float32) for n in lengths]
        self.latents = draw.standard_normal((1, config.decoder.latent_channels, 12, 12), np.float32)
        self.times = timesteps(steps)

    @property
    def tokens(self) -> int:
        """Image tokens: the side of a trained sample, 96 pixels."""
        return 36

    def write(self, ids: NDArray[np.int64]) -> Iterable[int]:
        """Ours, greedy."""
        count = len(ids)
        places = np.tile(np.arange(count), (3, 1))
        request = LanguageRequest(token_ids=ids, positions=places, next_position=count, max_new_tokens=self.new)
        return generate_tokens(self.ours.language(request))

    @cached_property
    def prefixes(self) -> tuple[list[Any], list[Arrays]]:
        """Ours and the plain ones, of both branches."""
        put = [self.ours.put(c, self.dtype) for c in self.conditions]
        ours = [self.ours.prefix(c, self.times[:-1], self.tokens) for c in put]
        return ours, [self.plain.prefix(c, self.times[:-1], self.tokens) for c in self.conditions]

    def paint(self) -> Any:
        """Our last latents, on the device."""
        guided, unguided = self.prefixes[0]
        request = DenoiseRequest(
            latents=self.latents, times=self.times, guided=guided, unguided=unguided, guidance_scale=GUIDANCE
        )
        *_, last = denoise(self.ours, request)
        return last.latents


def onnx_group(
    folder: Path,
    device: str = "cpu",
    *,
    prompts: Sequence[int] = (24, 900),
    new: int = 24,
    lengths: tuple[int, int] = (40, 12),
    steps: int = 4,
) -> Group:
    """The denoising loop and decoding of a bundle. Raises MissingExtraError, BadBundleError, BadRequestError."""
    work = _Work(folder, device, prompts, new, lengths, steps)
    plain = work.plain
    paint = partial(plain.paint, work.prefixes[1], work.latents, work.times)
    found, exact = np.asarray(paint(), np.float64), np.asarray(work.ours.numpy(work.paint()), np.float64)
    same = all(list(plain.write(ids, new)) == list(work.write(ids)) for ids in work.prompts)
    match = Match(
        error=float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
        bound=BOUNDS[work.dtype],
        tokens_equal=same if work.dtype == "float32" else None,
    )
    pairs = [Pair(name="guided step", ours=timed(work.paint, steps), theirs=timed(paint, steps))]
    for ids in work.prompts:
        ours, theirs = partial(work.write, ids), partial(plain.write, ids, new)
        pair = Pair(
            name=f"decoded token after {len(ids)}",
            ours=after_first(partial(_read, ours), new - 1),
            theirs=after_first(partial(_read, theirs), new - 1),
            rate="tokens/s",
        )
        pairs.append(pair)
    threads = os.environ.get("OMP_NUM_THREADS") or "one for each core"
    note = (
        f"{folder.name} on {work.device}; the same graphs: ours with bound buffers (threads: {threads}), the peer "
        f"with session.run, numpy arrays and default options (its log silenced). "
        f"96x96, {steps} steps; {new} tokens written. The peer copies the whole cache for each token"
    )
    return Group(peer=work.name, match=match, pairs=pairs, note=note)


def _read(write: Callable[[], Iterable[int]], mark: Callable[[], None]) -> list[int]:
    return read(write(), mark)
