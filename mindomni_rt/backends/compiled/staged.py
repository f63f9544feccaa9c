"""The six stages over compiled graphs, whatever runs them: onnxruntime and TensorRT differ in a `Runner` alone.

Memory is made before a loop and by contract; inside the denoise loop graphs are queued one after another and nothing
is copied to the host. The greedy decode loop keeps its scores there too and copies one number a token, which tells the
end of the text; drawing with a temperature copies the row of scores.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.contracts import STAGES, TILE, graph_specs, resolve
from ...bundle.manifest import Manifest
from ...checkpoint.config import ModelConfig
from ...errors import BadRequestError
from ...inputs.images import ImagePatches
from ...inputs.positions import image_positions, rope_tables, time_features
from ...inputs.vision_layout import vision_layout
from ...sampling.random import choose_token
from ..base import DenoiseRequest, LanguageRequest
from ..tiling import tiled
from .runner import NUMPY, DeviceArray, PatchLatents, Runner, decode, encode, patchify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagedPrefix:
    """K/V of a branch and of the time tokens of its steps, and AdaLN's table: the outputs of graph `prefix`."""

    keys: DeviceArray
    values: DeviceArray
    time_keys: DeviceArray
    time_values: DeviceArray
    modulation: DeviceArray

    @property
    def length(self) -> int:
        return self.keys.shape[3]


class StagedLanguageRun:
    """Prefill, then one token at a time over caches that never move."""

    def __init__(self, backend: StagedBackend, request: LanguageRequest) -> None:
        self._backend, self._request = backend, request
        count, wanted = len(request.token_ids), max(request.max_new_tokens - 1, 0)
        limit = backend.limit("capacity")
        if limit is not None and count > limit:
            raise BadRequestError(
                f"the prompt has {count} tokens, this bundle's cache holds {limit}; shorten it, lower "
                "max_image_tokens, or build a bundle with a larger profile"
            )
        self._room = wanted if limit is None else min(wanted, limit - count)
        if self._room < wanted:
            logger.warning("max_new_tokens cut from %d to the %d that the cache holds", wanted + 1, self._room + 1)
        stack = backend.config.language.stack
        self._sizes = {"capacity": limit or count + self._room}
        self._hidden = backend.empty((1, count + self._room, stack.hidden_size), backend.dtype)
        spec = graph_specs(backend.config)["language"]
        self._caches = {
            source: backend.empty(tuple(resolve(a, self._sizes) for a in spec.tensor(source).axes), backend.dtype)
            for source, _ in spec.in_place
        }
        self._in_place = spec.in_place
        self._logits = backend.empty((1, backend.config.language.vocab_size), "float32")
        self._no_image = backend.empty((1, stack.hidden_size), backend.dtype)
        self._filled = 0

    @property
    def hidden(self) -> DeviceArray:
        if not self._filled:  # no text was asked for
            self._prefill()
        return self._hidden.rows(0, self._filled)

    def _prefill(self) -> None:
        request = self._request
        ids = np.asarray(request.token_ids, np.int64)
        source = np.arange(len(ids))
        images = self._no_image
        if request.image_embeds is not None:
            images = request.image_embeds
            places = np.flatnonzero(ids == self._backend.config.language.image_token_id)
            source[places] = len(ids) + np.arange(len(places))
        inputs: dict[str, NDArray[Any]] = {"token_ids": ids[None], "source": source, **self._tables(request.positions)}
        self._advance(len(ids), {k: self._backend.put(v) for k, v in inputs.items()}, images)

    def _tables(self, positions: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        stack = self._backend.config.language.stack
        cos, sin = rope_tables(stack.rope, stack.head_dim, positions, positions.shape[-1])
        return {"cos": cos, "sin": sin}

    def _advance(self, count: int, inputs: dict[str, DeviceArray], images: DeviceArray) -> None:
        """Runs `count` tokens through the stack: hidden states and K/V land at their places, scores in `_logits`."""
        if "start" not in inputs:
            inputs["start"] = self._backend.put(np.array([self._filled], np.int64))
        end = self._filled + count
        self._backend.run(
            "language",
            {"sequence": count, "images": images.shape[0], **self._sizes},
            {**inputs, "image_embeds": images, **self._caches},
            {
                "logits": self._logits,
                "hidden": self._hidden.rows(self._filled, end),
                **{new: self._caches[old] for old, new in self._in_place},
            },
        )
        self._filled = end

    def __iter__(self) -> Iterator[int]:
        request, backend = self._request, self._backend
        self._prefill()
        if request.max_new_tokens < 1:
            return
        ahead = self._tables(request.next_position + np.arange(self._room + 1))
        tables = {name: backend.put(table) for name, table in ahead.items()}
        source, start = backend.put(np.zeros(1, np.int64)), backend.empty((1,), "int64")
        chosen = backend.empty((1, 1), "int64")
        pick = self._drawn(chosen) if request.temperature > 0 else self._greedy(chosen)
        for index in range(self._room + 1):
            token = next(pick)
            yield token
            if token in request.eos_token_ids or index == self._room or request.cancelled():
                return
            backend.runner.write(start, np.array([self._filled], np.int64))
            # One row of each table: positions (rows, D/2) seen as (1, rows, D/2) so that a row is a view.
            rows = {k: t.reshape(1, *t.shape).rows(index, index + 1).reshape(1, t.shape[1]) for k, t in tables.items()}
            self._advance(1, {"token_ids": chosen, "source": source, "start": start, **rows}, self._no_image)

    def _greedy(self, chosen: DeviceArray) -> Iterator[int]:
        """The best token after each advance, left in `chosen` as well: one number a token comes to the host."""
        request, backend = self._request, self._backend
        seen = np.zeros(self._logits.shape, np.float32)
        seen[0, np.asarray(request.token_ids, np.int64)] = 1
        device_seen = backend.put(seen)
        penalty = backend.put(np.array([request.repetition_penalty], np.float32))
        while True:
            inputs = {"logits": self._logits, "seen": device_seen, "penalty": penalty}
            backend.run("choose", {}, inputs, {"token": chosen, "new_seen": device_seen})
            yield int(backend.runner.get(chosen)[0, 0])

    def _drawn(self, chosen: DeviceArray) -> Iterator[int]:
        """A token drawn after each advance, on the host: so that every backend draws the same one."""
        request, runner = self._request, self._backend.runner
        seen = list(map(int, request.token_ids))
        for uniform in request.uniforms:
            scores = runner.get(self._logits)[0]
            token = choose_token(scores, seen, request.repetition_penalty, request.temperature, float(uniform))
            seen.append(token)
            runner.write(chosen, np.array([[token]], np.int64))
            yield token


class StagedBackend:
    """`Backend` over a bundle's graphs. resident: stages that stay loaded; the others leave when the next one runs."""

    def __init__(self, runner: Runner, manifest: Manifest, resident: Collection[str] = STAGES) -> None:
        self.runner, self.manifest = runner, manifest
        self.config: ModelConfig = manifest.model
        self.name, self.device, self.dtype = runner.name, runner.device, manifest.dtype
        self._specs = graph_specs(self.config)
        self._resident = frozenset(resident)
        self._loaded: set[str] = set()

    def limit(self, axis: str) -> int | None:
        """The most that the bundle's engines serve of an axis, None without a limit."""
        found = self.manifest.profile.ranges.get(axis)
        return found[2] if found else None

    def put(self, array: NDArray[Any], dtype: str | None = None) -> DeviceArray:
        """A host array in the runtime's memory. dtype None keeps the array's own."""
        name = dtype or next(n for n, t in NUMPY.items() if t == array.dtype)
        out = self.runner.empty(array.shape, name)
        self.runner.write(out, encode(array, name))
        return out

    def empty(self, shape: tuple[int, ...], dtype: str) -> DeviceArray:
        return self.runner.empty(shape, dtype)

    def run(
        self,
        graph: str,
        sizes: Mapping[str, int],
        inputs: Mapping[str, DeviceArray],
        outputs: Mapping[str, DeviceArray] | None = None,
    ) -> dict[str, DeviceArray]:
        """Runs a graph with free axes of these sizes; outputs that are not given are made."""
        if graph not in self.manifest.graphs:
            raise BadRequestError(self._absent(graph))
        self.manifest.profile.check(graph, sizes)
        spec = self._specs[graph]
        given = dict(outputs or {})
        for tensor in spec.outputs:
            shape = tuple(resolve(axis, sizes) for axis in tensor.axes)
            dtype = self.dtype if tensor.dtype == "model" else tensor.dtype
            if tensor.name not in given:
                given[tensor.name] = self.runner.empty(shape, dtype)
            assert given[tensor.name].shape == shape, (graph, tensor.name, given[tensor.name].shape, shape)
        self._make_room(graph)
        self.runner.run(graph, inputs, given)
        return given

    def _make_room(self, graph: str) -> None:
        """Lets go of the weights of stages that are not to stay."""
        stage = self._specs[graph].stage
        for other in [g for g in self._loaded if self._specs[g].stage not in (stage, *self._resident)]:
            self.runner.release(other)
            self._loaded.remove(other)
        self._loaded.add(graph)

    @staticmethod
    def _absent(graph: str) -> str:
        advice = {
            "denoiser_first": "first_step='condition_only' needs a bundle built with --first-step condition_only",
            "features": "edit_features='vit+vae' needs a checkpoint with input_x_embedder",
            "vae_encode": "edit_features='vit+vae' needs a checkpoint whose VAE has an encoder",
        }
        return f"this bundle has no graph {graph!r}; {advice.get(graph, 'build it again with all stages')}"

    def vision(self, image: ImagePatches) -> DeviceArray:
        layout = vision_layout(self.config.vision, image.grid)
        names = ("cos", "sin", "slots", "places", "mask")
        tables = {name: self.put(a) for name, a in zip(names, layout.arrays(), strict=True)}
        sizes = {"merged": len(layout.places) // self.config.vision.merge_size**2, "windows": len(layout.mask)}
        return self.run("vision", sizes, {"patches": self.put(image.patches, "float32"), **tables})["embeds"]

    def language(self, request: LanguageRequest) -> StagedLanguageRun:
        return StagedLanguageRun(self, request)

    def connector(self, hidden: DeviceArray, image_latents: Sequence[tuple[int, Any]] = ()) -> DeviceArray:
        stack, length = self.config.connector.stack, hidden.shape[1]
        cos, sin = rope_tables(stack.rope, stack.head_dim, np.arange(length), length)
        inputs = {"hidden": hidden, "cos": self.put(cos), "sin": self.put(sin)}
        condition = self.run("connector", {"tokens": length}, inputs)["condition"]
        patch = self.config.decoder.patch_size
        for start, latents in image_latents:
            patches = patchify(np.asarray(latents, np.float32), patch)
            rows, columns = (side // patch for side in latents.shape[-2:])
            count = rows * columns
            self.run(
                "features",
                {"image_tokens": count},
                {"latents": self.put(patches), "positions": self._positions(rows, columns)},
                {"features": condition.rows(start, start + count)},
            )
        return condition

    def prefix(
        self,
        condition: DeviceArray,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> StagedPrefix:
        stack, length = self.config.decoder.stack, condition.shape[1]
        cos, sin = rope_tables(stack.rope, stack.head_dim, np.arange(length + 1), length + 1 + image_tokens)
        visible = np.tri(length, dtype=np.bool_)
        for start, end in blocks:
            visible[start:end, start:end] = True
        tables = {
            "features": time_features(times, self.config.decoder.time_frequencies),
            "cos": cos[:length],
            "sin": sin[:length],
            "time_cos": cos[length:],
            "time_sin": sin[length:],
            "visible": visible,
        }
        inputs = {"condition": condition, **{name: self.put(table) for name, table in tables.items()}}
        out = self.run("prefix", {"tokens": length, "steps": len(times)}, inputs)
        return StagedPrefix(**out)

    def denoiser(self, request: DenoiseRequest) -> Iterator[tuple[PatchLatents, PatchLatents]]:
        patch = self.config.decoder.patch_size
        height, width = request.latents.shape[-2:]
        patches = patchify(request.latents, patch)
        sizes = {"batch": patches.shape[0], "image_tokens": patches.shape[1]}
        branches = [b for b in (request.guided, request.unguided) if b is not None]
        assert all(isinstance(b, StagedPrefix) for b in branches)
        positions = self._positions(height // patch, width // patch)
        tables = [{**self._image_tables(b.length, patches.shape[1]), "positions": positions} for b in branches]
        now, following = self.put(patches), self.empty(patches.shape, "float32")
        velocities = [self.empty(patches.shape, "float32") for _ in branches]
        combined = self.empty(patches.shape, "float32")
        intervals = self.put(np.diff(request.times).astype(np.float32)[:, None])
        scale = self.put(np.array([request.guidance_scale if len(branches) == 2 else 1.0], np.float32))
        for step in range(len(request.times) - 1):
            if request.cancelled():
                return
            for branch, fixed, velocity in zip(branches, tables, velocities, strict=True):
                first = step == 0 and request.first_step == "condition_only"
                self._step(branch, step, first, sizes, {"latents": now, **fixed}, velocity)  # type: ignore[arg-type]
            self.run(
                "euler",
                sizes,
                {
                    "latents": now,
                    "guided": velocities[0],
                    "unguided": velocities[-1],
                    "scale": scale,
                    "interval": intervals.take(step),
                },
                {"new_latents": following, "velocity": combined},
            )
            now, following = following, now
            yield tuple(PatchLatents(self.runner, a, patch, height, width) for a in (now, combined))  # type: ignore[misc]

    def _step(
        self,
        branch: StagedPrefix,
        step: int,
        first: bool,
        sizes: Mapping[str, int],
        inputs: Mapping[str, DeviceArray],
        velocity: DeviceArray,
    ) -> None:
        time = {"time_keys": branch.time_keys.take(step), "time_values": branch.time_values.take(step)}
        self.run(
            "denoiser_first" if first else "denoiser",
            {**sizes, "tokens": branch.length},
            {
                **inputs,
                "keys": branch.keys,
                "values": branch.values,
                **({} if first else time),
                "modulation": branch.modulation.take(step),
            },
            {"velocity": velocity},
        )

    def _image_tables(self, length: int, count: int) -> dict[str, DeviceArray]:
        stack = self.config.decoder.stack
        places = np.arange(length + 1, length + 1 + count)
        cos, sin = rope_tables(stack.rope, stack.head_dim, places, length + 1 + count)
        return {"cos": self.put(cos), "sin": self.put(sin)}

    def _positions(self, rows: int, columns: int) -> DeviceArray:
        return self.put(image_positions(self.config.decoder, rows, columns), self.dtype)

    def vae(self, latents: Any) -> NDArray[np.float32]:
        config = self.config.vae
        scaled = np.asarray(latents, np.float32) / np.float32(config.scaling_factor) + np.float32(config.shift_factor)
        # One image at a time: decoding is the peak of memory, and a batch gains nothing on large images.
        pixels = np.concatenate([tiled(self._decode, row[None], self._tile) for row in scaled])
        return np.clip(pixels.transpose(0, 2, 3, 1) * 0.5 + 0.5, 0, 1).astype(np.float32, copy=False)

    def _decode(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        sizes = {"rows": latents.shape[-2], "columns": latents.shape[-1]}
        return self.runner.get(self.run("vae", sizes, {"latents": self.put(latents)})["pixels"])

    @property
    def _tile(self) -> int:
        return min(TILE, self.limit("rows") or TILE)

    def vae_encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        config = self.config.vae
        mean = tiled(self._encode, np.asarray(pixels, np.float32), self._tile, config.downscale)
        return (mean - np.float32(config.shift_factor)) * np.float32(config.scaling_factor)

    def _encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        factor = self.config.vae.downscale
        sizes = {"rows": pixels.shape[-2] // factor, "columns": pixels.shape[-1] // factor}
        return self.runner.get(self.run("vae_encode", sizes, {"pixels": self.put(pixels)})["latents"])

    def numpy(self, array: Any) -> NDArray[np.float32]:
        if isinstance(array, DeviceArray):
            return np.asarray(decode(self.runner.get(array), array.dtype), np.float32)
        return np.array(array, np.float32)

    def synchronize(self) -> None:
        self.runner.synchronize()
