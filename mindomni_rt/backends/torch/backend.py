"""The reference backend: PyTorch on the CPU or one CUDA device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...checkpoint.config import ModelConfig
from ...checkpoint.layout import LoadReport
from ...errors import BadRequestError, OutOfMemoryError, UnsupportedDeviceError
from ...inputs.images import ImagePatches
from ...inputs.positions import image_positions, rope_tables, time_features
from ...model.attention import Workspace
from ...model.cache import StaticCache
from ...model.decoder import PrefixKV
from ...model.mindomni import MindOmniModel, load_model
from ...sampling.drafts import PromptLookup
from ...sampling.random import choose_token
from ...sampling.schedule import Solver, guide, within
from ..base import DenoiseRequest, LanguageRequest

logger = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def load_torch(
    path: Path,
    device: str = "auto",
    dtype: str | None = None,
    *,
    precision: str | None = None,
    memory_budget: str | float | None = None,
    fast: bool | None = None,
) -> TorchBackend:
    """A checkpoint folder on a device. device "auto" takes CUDA where there is one.

    dtype by name; None is bfloat16 on CUDA and float32 on the CPU. fast: our kernels, static buffers and CUDA graphs;
    None is on for CUDA. precision and memory_budget as in `load`; they need the fast path.
    Raises BadCheckpointError, BadRequestError, OutOfMemoryError, UnsupportedDeviceError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UnsupportedDeviceError(f"device {device!r}: the torch backend runs on cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("device 'cuda': this PyTorch finds no CUDA device; use device='cpu'")
    dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if dtype not in _DTYPES:
        raise BadRequestError(f"dtype {dtype!r}: expected one of {', '.join(_DTYPES)}")
    fast = kind == "cuda" if fast is None else fast
    if not fast:
        if precision is not None or memory_budget is not None:
            raise BadRequestError("precision and memory_budget need the fast path: device='cuda', or fast=True")
        # The VAE stays in float32: that is what the released code computes, and SDXL's overflows in float16.
        model, report = load_model(path, _DTYPES[dtype], device, vae_dtype=torch.float32)
        logger.info("%s", report)
        return TorchBackend(model, device=device, report=report)
    from ..fast.load import load_fast

    return load_fast(path, device, dtype, precision, memory_budget)


@dataclass(frozen=True)
class _Images:
    """Tables of a denoising loop that do not change from step to step."""

    cos: Tensor
    sin: Tensor
    workspace: Workspace


class TorchPrefix:
    """`PrefixKV` and the AdaLN table of its schedule (T, 2C)."""

    def __init__(self, kv: PrefixKV, modulation: Tensor) -> None:
        self.kv, self.modulation = kv, modulation

    @property
    def length(self) -> int:
        return self.kv.length


class TorchLanguageRun:
    """Prefill, then one token at a time over a static cache; hidden states are kept in place."""

    def __init__(self, backend: TorchBackend, request: LanguageRequest) -> None:
        self._backend, self._request = backend, request
        stack = backend.config.language.stack
        count = len(request.token_ids)
        capacity = count + max(request.max_new_tokens - 1, 0)
        self._hidden = torch.empty(1, capacity, stack.hidden_size, dtype=backend.torch_dtype, device=backend.device)
        self._cache = StaticCache(stack, capacity, 1, backend.torch_dtype, backend.device)
        self._filled = 0

    @property
    def hidden(self) -> Tensor:
        if not self._filled:  # no text was asked for
            self._prefill()
        return self._hidden[:, : self._filled]

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        request, model = self._request, self._backend.model.language
        ids = torch.from_numpy(np.asarray(request.token_ids, np.int64)).to(self._backend.device)[None]
        return self._advance(model.embed(ids, request.image_embeds), *self._tables(request.positions))

    def _tables(self, positions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        stack = self._backend.config.language.stack
        cos, sin = self._backend.tensors(*rope_tables(stack.rope, stack.head_dim, positions, positions.shape[-1]))
        return cos, sin

    def _advance(self, x: Tensor, cos: Tensor, sin: Tensor, all_rows: bool = False) -> Tensor:
        """Runs embeddings x through the stack, keeps their hidden states, returns the last one's logits, or all."""
        start, end = self._filled, self._filled + x.shape[1]
        hidden = self._backend.model.language(x, cos, sin, self._cache, start)
        self._hidden[:, start:end] = hidden
        self._filled = end
        return self._backend.model.language.logits(hidden if all_rows else hidden[:, -1])

    def __iter__(self) -> Iterator[int]:
        request = self._request
        if request.max_new_tokens < 1:
            self._prefill()
            return
        with torch.inference_mode():
            logits = self._prefill()
            cos, sin = self._tables(request.next_position + np.arange(request.max_new_tokens))
        text = [int(t) for t in request.token_ids]
        lookup = PromptLookup(text)
        chosen = [self._choose(logits[0], text, 0)]
        told = 0
        while True:
            for token in chosen:
                text.append(token)
                lookup.push(token)
                told += 1
                yield token
                if token in request.eos_token_ids or told == request.max_new_tokens or request.cancelled():
                    self._filled = len(text) - 1  # what a guess computed past the end is not part of the text
                    return
            room = request.max_new_tokens - told - 1
            draft = lookup.draft(min(request.draft_tokens, room)) if request.draft_tokens else []
            with torch.inference_mode():
                ids = torch.tensor([[text[-1], *draft]], device=self._backend.device)
                x = self._backend.model.language.embed(ids)
                rows = self._advance(
                    x, cos[told - 1 : told + len(draft)], sin[told - 1 : told + len(draft)], all_rows=True
                )
            chosen = []
            for place in range(len(draft) + 1):
                chosen.append(self._choose(rows[0, place], text + chosen, told + place))
                if place < len(draft) and draft[place] != chosen[place]:
                    break
            self._filled += len(chosen) - len(draft) - 1

    def _choose(self, logits: Tensor, seen: Sequence[int], index: int) -> int:
        request = self._request
        uniform = float(request.uniforms[index]) if request.temperature > 0 else 0.0
        scores = logits.float().cpu().numpy()
        return choose_token(scores, seen, request.repetition_penalty, request.temperature, uniform)


class TorchBackend:
    """The six stages on PyTorch modules. Runs wherever they are; float32 on the CPU is the reference."""

    name = "torch"
    features = frozenset({"solver", "guidance_interval", "draft_tokens"})

    def __init__(self, model: MindOmniModel, device: str = "cpu", report: LoadReport | None = None) -> None:
        self.model, self.device, self.report = model, device, report
        self.config: ModelConfig = model.config
        self.torch_dtype = model.language.embed_tokens.weight.dtype
        self.dtype = str(self.torch_dtype).removeprefix("torch.")
        self._positions: Callable[[int, int], Tensor] = lru_cache(maxsize=4)(self._image_positions)

    def tensors(self, *arrays: NDArray[Any]) -> tuple[Tensor, ...]:
        """Host tables on the device."""
        return tuple(torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in arrays)

    @torch.inference_mode()
    def vision(self, image: ImagePatches) -> Tensor:
        from ...inputs.vision_layout import vision_layout

        layout = vision_layout(self.config.vision, image.grid)
        (patches,) = self.tensors(image.patches)
        return self.model.vision(patches.to(self.torch_dtype), *self.tensors(*layout.arrays()))

    def language(self, request: LanguageRequest) -> TorchLanguageRun:
        return TorchLanguageRun(self, request)

    @torch.inference_mode()
    def connector(self, hidden: Tensor, image_latents: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        stack, length = self.config.connector.stack, hidden.shape[1]
        tables = self.tensors(*rope_tables(stack.rope, stack.head_dim, np.arange(length), length))
        condition = self.model.connector(hidden, *tables)
        for start, latents in image_latents:
            rows, columns = (side // self.config.decoder.patch_size for side in latents.shape[-2:])
            features = self.model.decoder.input_features(latents.to(self.torch_dtype), self._positions(rows, columns))
            condition[:, start : start + rows * columns] = features
        return condition

    @torch.inference_mode()
    def prefix(
        self,
        condition: Tensor,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> TorchPrefix:
        stack, length, steps = self.config.decoder.stack, condition.shape[1], len(times)
        place = np.concatenate([np.arange(length), np.full(steps, length)])
        tables = rope_tables(stack.rope, stack.head_dim, place, length + 1 + image_tokens)
        cos, sin, features = self.tensors(*tables, time_features(times, self.config.decoder.time_frequencies))
        features = features.to(self.torch_dtype)
        kv = self.model.decoder.prefix(condition, features, cos, sin, blocks)
        return TorchPrefix(kv, self.model.decoder.modulation(features))

    @torch.inference_mode()
    def denoiser(self, request: DenoiseRequest) -> Iterator[tuple[Tensor, Tensor]]:
        (latents,) = self.tensors(request.latents)  # integrated in float32 whatever the model computes in
        height, width = latents.shape[-2:]
        patch = self.config.decoder.patch_size
        positions = self._positions(height // patch, width // patch)
        branches = [b for b in (request.guided, request.unguided) if isinstance(b, TorchPrefix)]
        tables = [self._image_tables(b, positions.shape[0], latents.shape[0]) for b in branches]
        solver, before = Solver(request.solver), 0
        for step, (now, following) in enumerate(zip(request.times[:-1], request.times[1:], strict=True)):
            if request.cancelled():
                return
            quirk = step == 0 and request.first_step == "condition_only"
            count = len(branches) if within(float(now), request.guidance_interval) else 1
            velocities = [
                self._velocity(b, t, step, latents, positions, quirk)
                for b, t in zip(branches[:count], tables[:count], strict=True)
            ]
            velocity = velocities[0]
            if len(velocities) == 2:
                velocity = guide(velocities[0], velocities[1], request.guidance_scale)
            if count != before:
                solver.forget()
            before, length = count, float(following - now)
            latents = latents + length * solver.direction(velocity, length)
            yield latents, velocity

    def _velocity(
        self, branch: TorchPrefix, images: _Images, step: int, latents: Tensor, positions: Tensor, quirk: bool
    ) -> Tensor:
        kv = branch.kv
        return self.model.decoder.denoise(
            latents.to(self.torch_dtype),
            kv.keys,
            kv.values,
            kv.time_keys[step],
            kv.time_values[step],
            branch.modulation[step],
            images.cos,
            images.sin,
            positions,
            condition_only=quirk,
            workspace=images.workspace,
        ).float()

    def _image_tables(self, branch: TorchPrefix, count: int, batch: int) -> _Images:
        stack, first = self.config.decoder.stack, branch.length + 1
        tables = rope_tables(stack.rope, stack.head_dim, np.arange(first, first + count), first + count)
        workspace = Workspace(batch, stack.num_kv_heads, first + count, stack.head_dim, branch.kv.keys)
        cos, sin = self.tensors(*tables)
        return _Images(cos, sin, workspace)

    def _image_positions(self, rows: int, columns: int) -> Tensor:
        return self.tensors(image_positions(self.config.decoder, rows, columns))[0].to(self.torch_dtype)

    @torch.inference_mode()
    def vae(self, latents: Tensor) -> NDArray[np.float32]:
        config = self.config.vae
        scaled = latents.float() / config.scaling_factor + config.shift_factor
        try:
            # One image at a time: decoding is the peak of memory, and a batch gains nothing on large images.
            kind = self.model.vae.post_quant_conv.weight.dtype
            pixels = [self.model.vae.decode(row[None].to(kind)).float() for row in scaled]
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfMemoryError("no memory left to decode the image; choose a smaller size") from error
        images = torch.cat(pixels).mul_(0.5).add_(0.5).clamp_(0, 1)
        return images.permute(0, 2, 3, 1).float().cpu().numpy()

    @torch.inference_mode()
    def vae_encode(self, pixels: NDArray[np.float32]) -> Tensor:
        config = self.config.vae
        if self.model.vae.encoder is None:
            raise BadRequestError("this checkpoint's VAE has no encoder; use edit_features='vit'")
        kind = self.model.vae.post_quant_conv.weight.dtype
        mean = self.model.vae.encode(self.tensors(pixels)[0].to(kind))[0].float()
        return (mean - config.shift_factor) * config.scaling_factor

    def numpy(self, array: Tensor) -> NDArray[np.float32]:
        return array.detach().float().cpu().numpy()

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
