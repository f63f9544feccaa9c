"""The reference backend: PyTorch on the CPU or one CUDA device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...checkpoint.config import DecoderConfig, ModelConfig
from ...checkpoint.layout import LoadReport
from ...errors import BadRequestError, OutOfMemoryError, UnsupportedDeviceError
from ...inputs.images import ImagePatches
from ...inputs.positions import image_positions, image_tables, prefix_tables, rope_tables
from ...inputs.vision_layout import vision_layout
from ...memory.machine import read_machine
from ...model.attention import Workspace
from ...model.decoder import PrefixKV
from ...model.mindomni import MindOmniModel, load_model
from ..base import ADAPTERS, PROMPT_BATCHES, DenoiseRequest, DenoiseSession, LanguageRequest, LanguageSession, Prefix
from .adapters import Adapters
from .denoise import Branch, TorchDenoiseSession, real_keys
from .device import with_index
from .language import TorchLanguageSession
from .widen import widen

logger = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str = "auto", dtype: str | None = None) -> tuple[str, str]:
    """(device, dtype) by name: "auto" is CUDA where there is one, "cuda" becomes "cuda:N" of the current device; dtype
    None is bfloat16 there and float32 on the CPU.

    Raises BadRequestError, UnsupportedDeviceError.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UnsupportedDeviceError(f"device {device!r}: the torch backend runs on cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UnsupportedDeviceError("device 'cuda': this PyTorch finds no CUDA device; use device='cpu'")
    dtype = dtype or ("bfloat16" if kind == "cuda" else "float32")
    if dtype not in DTYPES:
        raise BadRequestError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    return with_index(device), dtype


def load_torch(path: Path, device: str = "auto", dtype: str | None = None) -> TorchBackend:
    """A checkpoint folder on the reference backend; arguments as in `choose_device`.

    Raises BadCheckpointError, BadRequestError, UnsupportedDeviceError.
    """
    device, dtype = choose_device(device, dtype)
    # The VAE stays in float32: that is what the released code computes, and SDXL's overflows in float16.
    model, report = load_model(path, DTYPES[dtype], device, vae_dtype=torch.float32)
    logger.info("%s", report)
    if device == "cpu" and read_machine(with_gpus=False).widens(dtype):
        logger.info("weights in %s, computed in float32: this CPU has no fast %s products", dtype, dtype)
        widen(model)
    return TorchBackend(model, device=device, report=report)


class TorchPrefix:
    """`PrefixKV` and the AdaLN table of its schedule (T, 2C)."""

    def __init__(self, kv: PrefixKV, modulation: Tensor) -> None:
        self.kv, self.modulation = kv, modulation

    @property
    def length(self) -> int:
        return self.kv.length


def joined_prefixes(prefixes: Sequence[Prefix]) -> tuple[PrefixKV, Tensor]:
    """K/V of several prompts as one batch, zeros behind the shorter ones, and the modulation that they share."""
    found = [p for p in prefixes if isinstance(p, TorchPrefix)]
    assert len(found) == len(prefixes)
    if len(found) == 1:
        return found[0].kv, found[0].modulation
    longest = max(p.length for p in found)
    keys, values = (
        torch.cat([functional.pad(kv, (0, 0, 0, longest - kv.shape[3])) for kv in each], dim=1)
        for each in ([p.kv.keys for p in found], [p.kv.values for p in found])
    )
    time_keys, time_values = (
        torch.cat(each, dim=2) for each in ([p.kv.time_keys for p in found], [p.kv.time_values for p in found])
    )
    return PrefixKV(keys, values, time_keys, time_values), found[0].modulation


def _positions(config: DecoderConfig, device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(image_positions(config, rows, columns)).to(device).to(dtype)


class TorchBackend:
    """The six stages on PyTorch modules. Runs wherever they are; float32 on the CPU is the reference."""

    name = "torch"
    capabilities = frozenset({"draft_tokens", "first_step", ADAPTERS, PROMPT_BATCHES})

    def __init__(self, model: MindOmniModel, device: str = "cpu", report: LoadReport | None = None) -> None:
        self.model, self.device, self.report = model, device, report
        self.config: ModelConfig = model.config
        self.torch_dtype = model.language.norm.weight.dtype  # of activations; weights may be narrower (`widen`)
        self.dtype = str(model.language.embed_tokens.weight.dtype).removeprefix("torch.")
        # Of a function, not of a method: a backend that is dropped goes at once, with its weights.
        positions = partial(_positions, self.config.decoder, torch.device(device), self.torch_dtype)
        self.image_positions: Callable[[int, int], Tensor] = lru_cache(maxsize=4)(positions)

    @cached_property
    def adapters(self) -> Adapters:
        """LoRA adapters on this model's weights."""
        return Adapters(self.model)

    def tensors(self, *arrays: NDArray[Any]) -> tuple[Tensor, ...]:
        """Host tables on the device."""
        return tuple(torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in arrays)

    @torch.inference_mode()
    def vision(self, image: ImagePatches) -> Tensor:
        layout = vision_layout(self.config.vision, image.grid)
        (patches,) = self.tensors(image.patches)
        return self.model.vision(patches.to(self.torch_dtype), *self.tensors(*layout.arrays()))

    def language(self, request: LanguageRequest) -> LanguageSession:
        return TorchLanguageSession(self.model.language, request, self.device)

    @torch.inference_mode()
    def connector(self, hidden: Tensor, image_latents: Sequence[tuple[int, Tensor]] = ()) -> Tensor:
        stack, length = self.config.connector.stack, hidden.shape[1]
        tables = self.tensors(*rope_tables(stack.rope, stack.head_dim, np.arange(length), length))
        condition = self.model.connector(hidden, *tables)
        for start, latents in image_latents:
            rows, columns = (side // self.config.decoder.patch_size for side in latents.shape[-2:])
            condition[:, start : start + rows * columns] = self.input_features(latents)
        return condition

    def input_features(self, latents: Tensor) -> Tensor:
        """Tokens (1, N, C) of a reference image's latents (1, 4, h, w) for the condition."""
        rows, columns = (side // self.config.decoder.patch_size for side in latents.shape[-2:])
        return self.model.decoder.input_features(latents.to(self.torch_dtype), self.image_positions(rows, columns))

    @torch.inference_mode()
    def prefix(
        self,
        condition: Tensor,
        times: NDArray[np.float64],
        image_tokens: int,
        blocks: Sequence[tuple[int, int]] = (),
    ) -> TorchPrefix:
        tables = prefix_tables(self.config.decoder, condition.shape[1], times, image_tokens, blocks)
        features, *rest = self.tensors(tables.features, tables.cos, tables.sin, tables.visible)
        features = features.to(self.torch_dtype)
        return TorchPrefix(self.prefix_kv(condition, features, *rest), self.model.decoder.modulation(features))

    def prefix_kv(self, condition: Tensor, features: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> PrefixKV:
        """`DiffusionDecoder.prefix`; how K and V are stored is the backend's choice."""
        return self.model.decoder.prefix(condition, features, cos, sin, visible)

    @torch.inference_mode()
    def denoiser(self, request: DenoiseRequest) -> DenoiseSession:
        (latents,) = self.tensors(request.latents)
        patch, stack = self.config.decoder.patch_size, self.config.decoder.stack
        positions = self.image_positions(latents.shape[-2] // patch, latents.shape[-1] // patch)
        branches = []
        for prefixes in request.branches():
            tables = [image_tables(self.config.decoder, p.length, len(positions)) for p in prefixes]
            # One prompt's tables have no batch axis: they serve any number of images.
            cos, sin = self.tensors(*(tables[0] if len(tables) == 1 else map(np.stack, zip(*tables, strict=True))))
            kv, modulation = joined_prefixes(prefixes)
            length = kv.length + 1 + len(positions)
            branches.append(
                Branch(
                    decoder=self.model.decoder,
                    prefix=kv,
                    modulation=modulation,
                    cos=cos,
                    sin=sin,
                    positions=positions,
                    workspace=Workspace(len(latents), stack.num_kv_heads, length, stack.head_dim, kv.keys),
                    mask=real_keys([p.length for p in prefixes], length, kv.keys.device),
                )
            )
        return TorchDenoiseSession(branches, latents)

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

    def finite(self, array: Tensor) -> bool:
        return bool(array.isfinite().all())

    def close(self) -> None:
        for name in set(vars(self)) - {"name", "device", "dtype", "torch_dtype", "config"}:
            delattr(self, name)

    def synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
