"""Stage `denoiser` over compiled graphs: graphs are queued one after another, nothing is copied to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...inputs.positions import image_positions, image_tables
from ...sampling.schedule import Step
from ..base import DenoiseRequest
from .graphs import Graphs
from .runner import DeviceArray, PatchLatents, patchify


@dataclass(frozen=True)
class CompiledPrefix:
    """K/V of a branch and of the time tokens of its steps, and AdaLN's table: the outputs of graph `prefix`."""

    keys: DeviceArray
    values: DeviceArray
    time_keys: DeviceArray
    time_values: DeviceArray
    modulation: DeviceArray

    @property
    def length(self) -> int:
        return self.keys.shape[3]


class CompiledDenoiseSession:
    """`DenoiseSession` over graphs `denoiser`, `denoiser_first` and `update`."""

    def __init__(self, graphs: Graphs, request: DenoiseRequest) -> None:
        self._graphs, config = graphs, graphs.manifest.model.decoder
        self._patch, (self._height, self._width) = config.patch_size, request.latents.shape[-2:]
        patches = patchify(request.latents, self._patch)
        self._sizes = {"batch": patches.shape[0], "image_tokens": patches.shape[1]}
        grid = image_positions(config, self._height // self._patch, self._width // self._patch)
        positions = graphs.put(grid, graphs.dtype)
        self._branches: list[tuple[CompiledPrefix, Mapping[str, DeviceArray]]] = []
        for prefix in request.prefixes():
            assert isinstance(prefix, CompiledPrefix)
            cos, sin = image_tables(config, prefix.length, patches.shape[1])
            tables = {"cos": graphs.put(cos), "sin": graphs.put(sin), "positions": positions}
            self._branches.append((prefix, tables))
        self._latents = graphs.put(patches)
        self._velocities = [self._empty() for _ in self._branches]
        # Two of each: a step reads one and writes the other.
        self._next_latents, self._velocity, self._next_velocity = self._empty(), self._empty(), self._empty()
        self._numbers = graphs.empty((3, 1), "float32")

    def _empty(self) -> DeviceArray:
        return self._graphs.empty(self._latents.shape, "float32")

    def step(self, step: Step) -> None:
        for (prefix, tables), velocity in zip(
            self._branches[: step.branches], self._velocities[: step.branches], strict=True
        ):
            self._evaluate(prefix, tables, step, velocity)
        numbers = np.array([[step.scale], [step.weight], [step.previous_weight]], np.float32)
        self._graphs.runner.write(self._numbers, numbers)
        self._graphs.run(
            "update",
            self._sizes,
            {
                "latents": self._latents,
                "guided": self._velocities[0],
                # One branch alone is combined with itself, which changes nothing.
                "unguided": self._velocities[step.branches - 1],
                "previous": self._velocity,
                "scale": self._numbers.take(0),
                "weight": self._numbers.take(1),
                "previous_weight": self._numbers.take(2),
            },
            {"new_latents": self._next_latents, "velocity": self._next_velocity},
        )
        self._latents, self._next_latents = self._next_latents, self._latents
        self._velocity, self._next_velocity = self._next_velocity, self._velocity

    def mark(self) -> Callable[[], None]:
        return self._graphs.runner.mark()

    def _evaluate(
        self, prefix: CompiledPrefix, tables: Mapping[str, DeviceArray], step: Step, velocity: DeviceArray
    ) -> None:
        """One branch's velocity at the current latents."""
        time = {"time_keys": prefix.time_keys.take(step.index), "time_values": prefix.time_values.take(step.index)}
        self._graphs.run(
            "denoiser_first" if step.condition_only else "denoiser",
            {**self._sizes, "tokens": prefix.length},
            {
                "latents": self._latents,
                **tables,
                "keys": prefix.keys,
                "values": prefix.values,
                **({} if step.condition_only else time),
                "modulation": prefix.modulation.take(step.index),
            },
            {"velocity": velocity},
        )

    @property
    def latents(self) -> PatchLatents:
        return self._unpatched(self._latents)

    @property
    def velocity(self) -> PatchLatents:
        return self._unpatched(self._velocity)

    def _unpatched(self, array: DeviceArray) -> PatchLatents:
        return PatchLatents(self._graphs.runner, array, self._patch, self._height, self._width)

    def ahead(self, time: float) -> NDArray[np.float32]:
        latents, velocity = np.asarray(self.latents), np.asarray(self.velocity)
        return latents + np.float32(time) * velocity
