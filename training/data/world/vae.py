"""A small autoencoder in SDXL's layout, trained on pictures of the world: 96x96x3 pixels to 12x12x4 latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mindomni_rt.checkpoint.config import VAEConfig
from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.files import require_regular, why
from mindomni_rt.model.vae import AutoencoderKL

from ...outputs import save_tensors
from .scene import BRIGHTNESS, CELL, all_scenes, render, verify

CONFIG = VAEConfig(block_out_channels=(8, 16, 32, 32), layers_per_block=1, norm_num_groups=4, scaling_factor=1.0)
_KL = 1e-5  # weight of the latents' divergence from a normal distribution: keeps their scale near one
_NOISE = 0.15  # added to latents while training, so that small errors of a diffusion model do not show
Report = Callable[[int, dict[str, float]], None]


def pictures(draw: np.random.Generator, count: int) -> Tensor:
    """(count, 3, 96, 96) in [-1, 1]: scenes, half of them with their cells shuffled."""
    scenes = all_scenes()
    out = np.empty((count, 96, 96, 3), np.float32)
    for i in range(count):
        pixels = (
            np.asarray(render(scenes[draw.integers(len(scenes))], int(draw.choice(BRIGHTNESS))), np.float32) / 127.5 - 1
        )
        if i % 2:
            cells = pixels.reshape(3, CELL, 3, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(9, CELL, CELL, 3)
            cells = cells[draw.permutation(9)]
            pixels = cells.reshape(3, 3, CELL, CELL, 3).transpose(0, 2, 1, 3, 4).reshape(96, 96, 3)
        out[i] = pixels
    return torch.from_numpy(out.transpose(0, 3, 1, 2).copy())


def train_vae(seed: int = 0, steps: int = 2000, batch: int = 8, report: Report | None = None) -> AutoencoderKL:
    """A trained autoencoder in eval mode; its config's scaling_factor brings latents to unit variance."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    model = AutoencoderKL(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1)
    for step in range(steps):
        pixels = pictures(draw, batch)
        mean, logvar = model.encode(pixels)
        latents = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean) + _NOISE * torch.randn_like(mean)
        found = model.decode(latents)
        divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)).mean()
        loss = F.l1_loss(found, pixels) + F.mse_loss(found, pixels) + _KL * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if report and (step % 50 == 49 or step == steps - 1):
            report(step + 1, {"loss": float(loss), "latent_std": float(mean.std())})
    model.eval().requires_grad_(False)
    with torch.no_grad():
        mean = model.encode(pictures(draw, 96))[0]
    model.config = replace(CONFIG, scaling_factor=round(1 / float(mean.std()), 5))
    return model


@torch.no_grad()
def check_vae(model: AutoencoderKL, seed: int = 1, rounds: int = 2) -> dict[str, float]:
    """Share of pictures that the verifier still reads after encoding and decoding: {"exact": …, "noisy": …}.

    noisy: with a tenth of the latents' deviation added.
    """
    draw = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    right = {"exact": 0, "noisy": 0}
    scenes = all_scenes() * rounds
    for scene in scenes:
        pixels = torch.from_numpy(
            np.asarray(render(scene, int(draw.choice(BRIGHTNESS))), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        )
        mean = model.encode(pixels)[0]
        noise = 0.1 * mean.std() * torch.randn(mean.shape, generator=generator)
        for name, latents in (("exact", mean), ("noisy", mean + noise)):
            found = (model.decode(latents)[0].permute(1, 2, 0) * 0.5 + 0.5).clamp(0, 1).numpy()
            right[name] += verify(found) == scene
    return {name: count / len(scenes) for name, count in right.items()}


def save_vae(model: AutoencoderKL, folder: Path) -> None:
    """Writes folder/world_vae.safetensors, with the scaling factor in the file's metadata. Raises StorageError."""
    metadata = {"scaling_factor": str(model.config.scaling_factor)}
    save_tensors(folder / "world_vae.safetensors", model.state_dict(), metadata)


def load_vae(folder: Path) -> AutoencoderKL:
    """Reads what `save_vae` wrote. Raises BadCheckpointError."""
    from safetensors import SafetensorError, safe_open

    path = folder / "world_vae.safetensors"
    model = AutoencoderKL(CONFIG)
    try:
        require_regular(path)
        with safe_open(str(path), framework="pt") as file:
            model.load_state_dict({n: file.get_tensor(n) for n in file.keys()})  # noqa: SIM118  not a mapping
            scale = float((file.metadata() or {})["scaling_factor"])
        model.config = replace(CONFIG, scaling_factor=scale)
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError) as error:
        raise BadCheckpointError(f"{path}: not the world's autoencoder ({why(error)})") from error
    return model.eval().requires_grad_(False)
