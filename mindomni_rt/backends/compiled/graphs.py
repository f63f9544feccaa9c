"""A bundle's graphs on a runtime: memory, sizes checked against the profile, weights that stay or leave."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from numpy.typing import NDArray

from ...bundle.contracts import STAGES, graph_specs, resolve
from ...bundle.manifest import Manifest
from ...errors import BadRequestError
from .runner import NUMPY, DeviceArray, Runner, encode


class Graphs:
    """Runs graphs by name. resident: stages that stay loaded; the others are released when the next one runs."""

    def __init__(self, runner: Runner, manifest: Manifest, resident: Collection[str] = STAGES) -> None:
        self.runner, self.manifest, self.dtype = runner, manifest, manifest.dtype
        self.specs = graph_specs(manifest.model)
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
        spec = self.specs[graph]
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
        """Frees the weights of stages that are not to stay loaded."""
        stage = self.specs[graph].stage
        for other in [g for g in self._loaded if self.specs[g].stage not in (stage, *self._resident)]:
            self.runner.release(other)
            self._loaded.remove(other)
        self._loaded.add(graph)

    @staticmethod
    def _absent(graph: str) -> str:
        advice = {
            "features": "edit_features='vit+vae' needs a checkpoint with input_x_embedder",
            "vae_encode": "edit_features='vit+vae' needs a checkpoint whose VAE has an encoder",
        }
        return f"this bundle has no graph {graph!r}; {advice.get(graph, 'build it again with all stages')}"
