"""Images → VAE latents, each picture encoded once."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.files import write_whole
from mindomni_rt.inputs.images import load_image, vae_pixels
from mindomni_rt.model.vae import AutoencoderKL

from ..errors import StorageError

logger = logging.getLogger(__name__)

RECENT = 2048  # latents held in memory, 64 KB each at 512 pixels


class LatentCache:
    """Scaled latents of pictures: the newest in memory, all of them in `folder` if one is given.

    size: pixels a side of the images to paint, which are cut to a square; reference images keep their shape.
    """

    def __init__(self, vae: AutoencoderKL, size: int, device: torch.device, folder: str = "") -> None:
        self.vae, self.size, self.device = vae, size, device
        self.folder = Path(folder) if folder else None
        if self.folder:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StorageError(f"data.cache_latents = {folder!r}: {error.strerror or error}") from error
        self._recent: dict[str, Tensor] = {}
        self._vae = self._fingerprint() if self.folder else ""

    def _fingerprint(self) -> str:
        """Which autoencoder made the latents of a folder: two may share it."""
        if self.vae.encoder is None:
            return ""
        weight = self.vae.encoder.conv_in.weight.detach().float().cpu().numpy().tobytes()
        return hashlib.sha256(weight + repr(self.vae.config).encode()).hexdigest()[:16]

    def targets(self, images: Sequence[Any]) -> Tensor:
        """(B, 4, size/8, size/8) of images to paint."""
        return torch.stack(self._encoded([self._square(image) for image in images]))

    def reference(self, image: Any) -> Tensor:
        """(1, 4, h, w) of a reference image in its own shape."""
        return self._encoded([torch.from_numpy(vae_pixels(image))[0]])[0][None]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> scaled latents (B, 4, H/8, W/8), the mean of the VAE's posterior."""
        config = self.vae.config
        mean, _ = self.vae.encode(pixels.to(self.device, self.vae.post_quant_conv.weight.dtype))
        return (mean.float() - config.shift_factor) * config.scaling_factor

    def _square(self, source: Any) -> Tensor:
        """(3, size, size) in [-1, 1]: the shorter side to size, then a centre crop."""
        from PIL import ImageOps

        image = load_image(source)
        if image.size != (self.size, self.size):
            image = ImageOps.fit(image, (self.size, self.size))
        return torch.from_numpy((np.array(image, np.float32) / 127.5 - 1).transpose(2, 0, 1).copy())

    def _encoded(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        keys = [hashlib.sha256(f"{tuple(p.shape)}".encode() + p.numpy().tobytes()).hexdigest() for p in pixels]
        found = {key: self._find(key, self._shape(p)) for key, p in zip(keys, pixels, strict=True)}
        missing = {k: p for k, p in zip(keys, pixels, strict=True) if found[k] is None}
        # One at a time: rounding must not depend on which others are missing, or a resumed run would differ.
        for key, one in missing.items():
            latents = self.encode(one[None])[0].clone()
            found[key] = self._keep(key, latents)
            self._store(key, latents)
        out = []
        for key in keys:
            latents_or_none = found[key]
            assert latents_or_none is not None
            out.append(latents_or_none)
        return out

    def _shape(self, pixels: Tensor) -> tuple[int, ...]:
        """The latents' shape of pixels (3, H, W)."""
        config = self.vae.config
        return (config.latent_channels, *(side // config.downscale for side in pixels.shape[1:]))

    def _find(self, key: str, shape: tuple[int, ...]) -> Tensor | None:
        """Kept latents; None, so that they are made again, also for a file that is damaged."""
        if key in self._recent:
            return self._recent[key]
        path = self.folder / f"{self._vae}-{key}.npy" if self.folder else None
        if path is None or not path.exists():
            return None
        try:
            kept = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            logger.warning("%s does not read (%s); the latents are computed again", path, error)
            return None
        if kept.shape != shape or kept.dtype != np.float32 or not np.isfinite(kept).all():
            logger.warning("%s holds no latents of shape %s; they are computed again", path, shape)
            return None
        return self._keep(key, torch.from_numpy(kept).to(self.device))

    def _keep(self, key: str, latents: Tensor) -> Tensor:
        self._recent[key] = latents
        if len(self._recent) > RECENT:
            self._recent.pop(next(iter(self._recent)))
        return latents

    def _store(self, key: str, latents: Tensor) -> None:
        if self.folder is None:
            return
        # numpy does not report a full disk when it is given a path, so the bytes are made first.
        data = io.BytesIO()
        np.save(data, latents.cpu().numpy())
        path = self.folder / f"{self._vae}-{key}.npy"
        try:
            write_whole(path, data.getvalue())
        except OSError as error:
            raise StorageError(f"latents cannot be kept in {self.folder}: {error.strerror or error}") from error
