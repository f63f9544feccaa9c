"""Static buffers of the denoising loop: one step as a captured graph, both branches in one launch.

The condition's K/V lie in buffers of a capacity; each branch uses its own length of it. Before a step the host queues
three small copies (this step's time K/V and modulation) and replays; nothing is read back until the loop ends, unless
a step cache asks whether to skip.

Axes: P branches, n images, B = P · n rows (branch-major), N image tokens, C hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...inputs.positions import image_positions, image_tables
from ...model.decoder import DiffusionDecoder, PrefixKV
from .attention import Attention, Segments
from .graph import GraphPool, Replay
from .stack import FastStack


@dataclass(frozen=True)
class Shape:
    """What a set of buffers is for: branches, and latents (images, 4, height, width)."""

    branches: int
    images: int
    height: int
    width: int


class StepBuffers:
    """Buffers and graphs for one `Shape` and prefixes of up to `capacity` tokens.

    `load` a request's prefixes, then `velocity` for each step.
    """

    def __init__(
        self,
        decoder: DiffusionDecoder,
        stack: FastStack,
        shape: Shape,
        capacity: int,
        attention: Attention,
        dtype: torch.dtype,
        device: str,
        pool: GraphPool | None = None,
    ) -> None:
        self._decoder, self._stack, self.shape, self._attention = decoder, stack, shape, attention
        self.capacity = capacity
        self._dtype, self.device, self._pool = dtype, device, pool
        config, sizes = decoder.config, decoder.config.stack
        self._patch = config.patch_size
        self.tokens = (shape.height // self._patch) * (shape.width // self._patch)
        rows, layers, heads, d = shape.branches * shape.images, sizes.num_layers, sizes.num_kv_heads, sizes.head_dim

        def empty(*size: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.zeros(size, dtype=kind, device=device)

        self.latents = empty(shape.images, config.latent_channels, shape.height, shape.width, kind=torch.float32)
        self.velocities = empty(rows, config.latent_channels, shape.height, shape.width, kind=torch.float32)
        self.keys = empty(layers, shape.branches, heads, capacity, d)
        self.values = torch.zeros_like(self.keys)
        self.time_keys, self.time_values = (
            empty(layers, shape.branches, heads, d),
            empty(layers, shape.branches, heads, d),
        )
        self.modulation = empty(2 * sizes.hidden_size)
        self.cos, self.sin = (empty(rows, self.tokens, d // 2, kind=torch.float32) for _ in range(2))
        self.lengths = empty(shape.branches, kind=torch.int32)
        self._host_lengths: tuple[int, ...] = (0,) * shape.branches
        grid = image_positions(config, shape.height // self._patch, shape.width // self._patch)
        self._positions = torch.from_numpy(grid).to(device, dtype)
        self._graphs: dict[Any, Replay] = {}

    def load(self, prefixes: list[PrefixKV], latents: np.ndarray) -> None:
        """Copies a request's condition K/V, image tables and noise into the buffers. Graphs bound to lengths go."""
        lengths = tuple(p.length for p in prefixes)
        if lengths != self._host_lengths and not self._attention.any_length:
            self._graphs.clear()  # SDPA concatenates segments of lengths known at capture
        self._host_lengths = lengths
        self.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        each = self.shape.images
        for branch, prefix in enumerate(prefixes):
            self.keys[:, branch, :, : prefix.length].copy_(prefix.keys[:, 0], non_blocking=True)
            self.values[:, branch, :, : prefix.length].copy_(prefix.values[:, 0], non_blocking=True)
            tables = image_tables(self._decoder.config, prefix.length, self.tokens)
            rows = slice(branch * each, (branch + 1) * each)
            self.cos[rows], self.sin[rows] = (torch.from_numpy(t).to(self.device) for t in tables)
        self.latents.copy_(torch.from_numpy(np.ascontiguousarray(latents, np.float32)))

    def at_step(self, times: Sequence[tuple[Tensor, Tensor, Tensor]], step: int) -> None:
        """Queues one step's time K/V and modulation: those of each branch for all steps are given."""
        for branch, (keys, values, _) in enumerate(times):
            self.time_keys[:, branch] = keys[step, :, 0]
            self.time_values[:, branch] = values[step, :, 0]
        self.modulation.copy_(times[0][2][step])

    def segments(self, layer: int, branches: int, with_image: bool) -> Segments:
        """What one layer's queries see of the first `branches`."""
        return Segments(
            self.keys[layer, :branches],
            self.values[layer, :branches],
            self.time_keys[layer, :branches],
            self.time_values[layer, :branches],
            self.lengths[:branches],
            self._host_lengths[:branches],
            with_image,
        )

    def embed(self, branches: int) -> Tensor:
        """Image tokens (branches · n, N, C) of the current latents."""
        x = self._decoder.image_features(self.latents.to(self._dtype), self._positions)
        return x.repeat(branches, 1, 1)

    def run(self, x: Tensor, branches: int, with_image: bool, first: int = 0, last: int | None = None) -> Tensor:
        """Tokens through some of the blocks."""
        rows = branches * self.shape.images

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attention(q, k, v, self.segments(layer, branches, with_image))

        out: Tensor = self._stack(x, self.cos[:rows], self.sin[:rows], attend, first, last)
        return out

    def finish(self, x: Tensor, branches: int) -> None:
        """Last hidden states -> `velocities`, in float32."""
        velocity = self._decoder.velocity(x, self.modulation, self.shape.height, self.shape.width)
        self.velocities[: branches * self.shape.images] = velocity.float()

    def graph(self, key: Any, step: Callable[[], None]) -> Replay:
        """A captured step by key; captured on first use, when every buffer it reads is filled.

        A new step runs once before its capture. The others' graphs leave for that and are captured anew: their pool
        beside the intermediate tensors of that run would be twice what a plan counts.
        """
        if key not in self._graphs:
            known = {name: graph.step for name, graph in self._graphs.items()}
            self._graphs.clear()
            self._graphs[key] = Replay(step, self.device, self._pool)
            self._graphs[key].prepare()
            for name, other in known.items():
                self._graphs[name] = Replay(other, self.device, self._pool, warm=True)
                self._graphs[name].prepare()
        return self._graphs[key]

    def velocity(self, branches: int, with_image: bool = True) -> Tensor:
        """Velocities (P, n, 4, h, w) float32 of the first `branches` at the current latents; a view of the buffer."""

        def step() -> None:
            self.finish(self.run(self.embed(branches), branches, with_image), branches)

        self.graph(("whole", branches, with_image), step)()
        return self.velocities.unflatten(0, (self.shape.branches, -1))[:branches]

    def use_attention(self, attention: Attention) -> None:
        """Another attention; graphs over the old one go."""
        if attention is not self._attention:
            self._attention = attention
            self._graphs.clear()

    def drop_graphs(self) -> None:
        """Weights have moved: what was captured points at where they were."""
        self._graphs.clear()
