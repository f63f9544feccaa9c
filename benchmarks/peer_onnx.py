"""The peer that runs our own graphs: onnxruntime as its tutorial shows it, numpy in and out, default options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.backends.arrays import NUMPY, patchify, unpatchify
from mindomni_rt.backends.base import DenoiseRequest, LanguageRequest
from mindomni_rt.backends.onnx import load_onnx
from mindomni_rt.bundle import Bundle, open_bundle
from mindomni_rt.contracts import graph_specs, resolve
from mindomni_rt.errors import BadRequestError, MissingExtraError
from mindomni_rt.positions import image_positions, rope_tables, time_features
from mindomni_rt.schedule import timesteps

from .pairs import BOUNDS, Group, Match, Pair, after_first, read, timed

Arrays = dict[str, NDArray[Any]]
GUIDANCE = 3.0


class PlainBundle:
    """A bundle's graphs through `session.run`, which makes new outputs, caches among them, in every call."""

    def __init__(self, bundle: Bundle, provider: str) -> None:
        self.bundle, self.config = bundle, bundle.manifest.model
        self._provider, self._sessions = provider, dict[str, Any]()
        self._specs = graph_specs(self.config)
        self._dtype = NUMPY[bundle.manifest.dtype]

    def run(self, graph: str, feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        """Outputs by name."""
        import onnxruntime

        if graph not in self._sessions:
            path, options = self.bundle.path(self.bundle.manifest.graphs[graph].file), onnxruntime.SessionOptions()
            options.log_severity_level = 3  # it warns of every cache that it copies, and printing takes its time
            self._sessions[graph] = onnxruntime.InferenceSession(str(path), options, providers=[self._provider])
        session = self._sessions[graph]
        wanted = {i.name for i in session.get_inputs()}
        values = session.run(None, {name: a for name, a in feeds.items() if name in wanted})
        return dict(zip((o.name for o in session.get_outputs()), values, strict=True))

    def write(self, ids: NDArray[np.int64], new: int) -> Iterator[int]:
        """Greedy tokens after a prompt (S,)."""
        stack, spec = self.config.language.stack, self._specs["language"]
        sizes = {"capacity": len(ids) + max(new - 1, 0)}
        axes = {old: tuple(resolve(a, sizes) for a in spec.tensor(old).axes) for old, _ in spec.in_place}
        caches = {old: np.zeros(shape, self._dtype) for old, shape in axes.items()}
        cos, sin = rope_tables(stack.rope, stack.head_dim, np.arange(sizes["capacity"]), sizes["capacity"])
        seen = np.zeros((1, self.config.language.vocab_size), np.float32)
        seen[0, ids] = 1
        penalty, no_image = np.ones(1, np.float32), np.zeros((1, stack.hidden_size), self._dtype)
        filled, tokens = 0, ids[None]
        for _ in range(new):
            count = tokens.shape[1]
            feeds = {
                "token_ids": tokens,
                "source": np.arange(count),
                "image_embeds": no_image,
                "cos": cos[filled : filled + count],
                "sin": sin[filled : filled + count],
                "start": np.array([filled]),
                **caches,
            }
            out = self.run("language", feeds)
            caches = {old: out[made] for old, made in spec.in_place}
            chosen = self.run("choose", {"logits": out["logits"], "seen": seen, "penalty": penalty})
            tokens, seen, filled = chosen["token"], chosen["new_seen"], filled + count
            yield int(tokens[0, 0])

    def prefix(self, condition: NDArray[np.float32], times: NDArray[np.float64], image_tokens: int) -> Arrays:
        """K/V of a branch."""
        stack, length = self.config.decoder.stack, condition.shape[1]
        cos, sin = rope_tables(stack.rope, stack.head_dim, np.arange(length + 1), length + 1 + image_tokens)
        feeds = {
            "condition": condition.astype(self._dtype),
            "features": time_features(times, self.config.decoder.time_frequencies),
            "visible": np.tri(length, dtype=np.bool_),
        }
        tables = {"cos": cos[:length], "sin": sin[:length], "time_cos": cos[length:], "time_sin": sin[length:]}
        return self.run("prefix", {**feeds, **tables})

    def paint(self, prefixes: list[Arrays], latents: NDArray[np.float32], times: NDArray[np.float64]) -> Any:
        """Latents (1, 4, h, w) at the end of the loop."""
        decoder, (height, width) = self.config.decoder, latents.shape[-2:]
        stack, now = decoder.stack, patchify(latents, decoder.patch_size)
        positions = image_positions(decoder, height // decoder.patch_size, width // decoder.patch_size)
        positions, count, tables = positions.astype(self._dtype), now.shape[1], []
        for prefix in prefixes:
            first = prefix["keys"].shape[3] + 1
            places = np.arange(first, first + count)
            tables.append(rope_tables(stack.rope, stack.head_dim, places, first + count))
        scale = np.array([GUIDANCE], np.float32)
        for step, interval in enumerate(np.diff(times).astype(np.float32)):
            velocities = []
            for prefix, (cos, sin) in zip(prefixes, tables, strict=True):
                feeds = {"latents": now, "positions": positions, "cos": cos, "sin": sin}
                feeds |= {name: prefix[name] for name in ("keys", "values")}
                feeds |= {name: prefix[name][step] for name in ("time_keys", "time_values", "modulation")}
                velocities.append(self.run("denoiser", feeds)["velocity"])
            feeds = {"latents": now, "guided": velocities[0], "unguided": velocities[1], "scale": scale}
            now = self.run("euler", {**feeds, "interval": np.array([interval])})["new_latents"]
        return unpatchify(now, decoder.patch_size, height, width)


class _Work:
    """The same request for ours and for the plain way."""

    def __init__(self, folder: Path, device: str, prompt: int, new: int, lengths: tuple[int, int], steps: int) -> None:
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
        self.ids = draw.integers(6, config.language.vocab_size, prompt)
        width = config.decoder.stack.hidden_size
        self.conditions = [draw.standard_normal((1, n, width), np.float32) for n in lengths]
        self.latents = draw.standard_normal((1, config.decoder.latent_channels, 12, 12), np.float32)
        self.times = timesteps(steps)

    @property
    def tokens(self) -> int:
        """Image tokens: the side of a trained sample, 96 pixels."""
        return 36

    def write(self) -> Iterable[int]:
        """Ours, greedy."""
        count = len(self.ids)
        places = np.tile(np.arange(count), (3, 1))
        request = LanguageRequest(token_ids=self.ids, positions=places, next_position=count, max_new_tokens=self.new)
        return self.ours.language(request)

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
        latents = None
        for latents, _ in self.ours.denoiser(request):  # noqa: B007
            pass
        return latents


def onnx_group(
    folder: Path,
    device: str = "cpu",
    *,
    prompt: int = 24,
    new: int = 24,
    lengths: tuple[int, int] = (40, 12),
    steps: int = 4,
) -> Group:
    """The denoising loop and decoding of a bundle. Raises MissingExtraError, BadBundleError, BadRequestError."""
    work = _Work(folder, device, prompt, new, lengths, steps)
    plain = work.plain
    paint = partial(plain.paint, work.prefixes[1], work.latents, work.times)
    found, exact = np.asarray(paint(), np.float64), np.asarray(work.ours.numpy(work.paint()), np.float64)
    match = Match(
        error=float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
        bound=BOUNDS[work.dtype],
        tokens_equal=list(plain.write(work.ids, new)) == list(work.write()) if work.dtype == "float32" else None,
    )
    step = Pair(name="guided step", ours=timed(work.paint, steps), theirs=timed(paint, steps))
    decode = Pair(
        name="decoded token",
        ours=after_first(lambda mark: read(work.write(), mark), new - 1),
        theirs=after_first(lambda mark: read(plain.write(work.ids, new), mark), new - 1),
        rate="tokens/s",
    )
    threads = os.environ.get("OMP_NUM_THREADS") or "all cores"
    note = (
        f"{folder.name} on {work.device}; the same graphs: ours with bound buffers and {threads} as threads, the peer "
        f"with session.run, numpy arrays and default options (its log silenced). "
        f"96x96, {steps} steps; {prompt} prompt tokens, {new} written"
    )
    return Group(peer=work.name, match=match, pairs=(step, decode), note=note)
