"""A bundle's graphs as a plain user of onnxruntime runs them: numpy arrays in, numpy arrays out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.backends.compiled.runner import NUMPY, patchify, unpatchify
from mindomni_rt.bundle.contracts import graph_specs, resolve
from mindomni_rt.bundle.manifest import Bundle
from mindomni_rt.inputs.positions import image_positions, rope_tables, time_features

from ..stages import GUIDANCE

Arrays = dict[str, NDArray[Any]]


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
                "scored": np.array([count - 1]),
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
            feeds |= {"previous": velocities[0], "weight": np.array([interval]), "previous_weight": scale * 0}
            now = self.run("update", feeds)["new_latents"]
        return unpatchify(now, decoder.patch_size, height, width)
