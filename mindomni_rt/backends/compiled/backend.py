"""The six stages over compiled graphs, whatever runs them: onnxruntime and TensorRT differ in a `Runner` alone.

Memory is allocated before a loop, with the shapes of `bundle.contracts`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.contracts import STAGES
from ...bundle.manifest import Manifest
from ...checkpoint.config import ModelConfig
from ...inputs.images import ImagePatches
from ...inputs.positions import image_positions, prefix_tables, rope_tables
from ...inputs.vision_layout import vision_layout
from ...sampling.tiling import tiled
from ...stages import VAE_TILE as TILE
from ..base import DenoiseRequest, LanguageRequest
from .denoise import CompiledDenoiseSession, CompiledPrefix
from .graphs import Graphs
from .language import CompiledLanguageSession
from .runner import DeviceArray, Runner, decode, patchify


class CompiledBackend(Graphs):
    """`Backend` over a bundle's graphs. resident: as in `Graphs`."""

    def __init__(self, runner: Runner, manifest: Manifest, resident: Collection[str] = STAGES) -> None:
        super().__init__(runner, manifest, resident)
        self.config: ModelConfig = manifest.model
        self.name, self.device = runner.name, runner.device
        first = {"first_step"} if "denoiser_first" in manifest.graphs else set()
        self.capabilities = frozenset({"draft_tokens", *first})

    def vision(self, image: ImagePatches) -> DeviceArray:
        layout = vision_layout(self.config.vision, image.grid)
        names = ("cos", "sin", "slots", "places", "mask")
        tables = {name: self.put(a) for name, a in zip(names, layout.arrays(), strict=True)}
        sizes = {"merged": len(layout.places) // self.config.vision.merge_size**2, "windows": len(layout.mask)}
        return self.run("vision", sizes, {"patches": self.put(image.patches, "float32"), **tables})["embeds"]

    def language(self, request: LanguageRequest) -> CompiledLanguageSession:
        return CompiledLanguageSession(self, request)

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
                {"latents": self.put(patches), "positions": self.image_positions(rows, columns)},
                {"features": condition.rows(start, start + count)},
            )
        return condition

    def prefix(
        self,
        condition: DeviceArray,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> CompiledPrefix:
        length = condition.shape[1]
        made = prefix_tables(self.config.decoder, length, times, image_tokens, blocks)
        tables = {
            "features": made.features,
            "cos": made.cos[:length],
            "sin": made.sin[:length],
            "time_cos": made.cos[length : length + 1],
            "time_sin": made.sin[length : length + 1],
            "visible": made.visible[:length, :length],
        }
        inputs = {"condition": condition, **{name: self.put(table) for name, table in tables.items()}}
        out = self.run("prefix", {"tokens": length, "steps": len(times)}, inputs)
        return CompiledPrefix(**out)

    def denoiser(self, request: DenoiseRequest) -> CompiledDenoiseSession:
        return CompiledDenoiseSession(self, request)

    def image_positions(self, rows: int, columns: int) -> DeviceArray:
        """The decoder's position table of an image of rows x columns tokens."""
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

    def finite(self, array: Any) -> bool:
        return bool(np.isfinite(self.numpy(array)).all())

    def close(self) -> None:
        for graph in self.manifest.graphs:
            self.runner.release(graph)
        self._loaded.clear()

    def synchronize(self) -> None:
        self.runner.synchronize()
