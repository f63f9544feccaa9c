"""A small CLIP for the consistency reward: pictures and short captions to one space. Trained on rendered pairs alone.

It is no verifier: its similarity can be fooled. Reward hacking shows as a reward that rises while the accuracy of the
exact verifier does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.files import require_regular, why

from ...outputs import save_tensors
from .scene import BRIGHTNESS, all_scenes, render
from .text import caption

_WORDS = sorted({w for s in all_scenes() for w in caption(s).split()})
_WIDTH = 64


class WorldClip(nn.Module):
    """images (B, H, W, 3) and captions to unit vectors (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (3, 16, 32, 64)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.image = nn.Linear(64 * 6 * 6, _WIDTH)
        self.words = nn.Embedding(len(_WORDS) + 1, _WIDTH)
        self.text = nn.Sequential(nn.Linear(_WIDTH, 128), nn.GELU(), nn.Linear(128, _WIDTH))
        self.scale = nn.Parameter(torch.tensor(2.5))

    def images(self, images: NDArray[Any]) -> Tensor:
        """(B, H, W, 3), uint8 or floats in [0, 1]."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(self.words.weight.device)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        x = F.interpolate(x.permute(0, 3, 1, 2) * 2 - 1, size=(48, 48), mode="area")
        for layer in self.layers:
            x = F.gelu(layer(x))
        return F.normalize(self.image(x.flatten(1)), dim=-1)

    def captions(self, captions: Sequence[str]) -> Tensor:
        """Bags of words; the world's captions have no order to lose."""
        table = {w: i for i, w in enumerate(_WORDS)}
        sums = torch.zeros(len(captions), len(_WORDS) + 1)
        for row, text in enumerate(captions):
            for word in text.lower().split():
                sums[row, table.get(word, len(_WORDS))] += 1
        return F.normalize(self.text(sums.to(self.words.weight) @ self.words.weight), dim=-1)

    @torch.no_grad()
    def similarity(self, images: NDArray[Any], captions: Sequence[str]) -> NDArray[np.float32]:
        """Cosine of each pair (B,), cut off at 0."""
        return (self.images(images) * self.captions(captions)).sum(-1).clamp(min=0).cpu().numpy()


def train_clip(seed: int = 0, steps: int = 600, batch: int = 96) -> WorldClip:
    """Contrastive training on all scenes, their pictures blurred by noise of random strength."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    model, scenes = WorldClip(), all_scenes()
    texts = [caption(s) for s in scenes]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        rows = draw.permutation(len(scenes))[:batch]
        level = int(draw.choice(BRIGHTNESS))
        pixels = np.stack([np.asarray(render(scenes[i], level), np.float32) / 255 for i in rows])
        pixels += draw.uniform(0, 0.15) * draw.standard_normal(pixels.shape).astype(np.float32)
        scores = model.images(np.clip(pixels, 0, 1)) @ model.captions([texts[i] for i in rows]).T * model.scale.exp()
        target = torch.arange(len(rows))
        loss = F.cross_entropy(scores, target) + F.cross_entropy(scores.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


@torch.no_grad()
def retrieval(model: WorldClip) -> float:
    """Share of the 96 pictures whose nearest caption is their own."""
    scenes = all_scenes()
    pixels = np.stack([np.asarray(render(s)) for s in scenes])
    scores = model.images(pixels) @ model.captions([caption(s) for s in scenes]).T
    return float((scores.argmax(1) == torch.arange(len(scenes))).float().mean())


def save_clip(model: WorldClip, folder: Path) -> None:
    """Writes folder/world_clip.safetensors. Raises StorageError."""
    save_tensors(folder / "world_clip.safetensors", model.state_dict())


def load_clip(folder: Path) -> WorldClip:
    """Reads what `save_clip` wrote. Raises BadCheckpointError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model, path = WorldClip(), folder / "world_clip.safetensors"
    try:
        require_regular(path)
        model.load_state_dict(load_file(str(path)))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BadCheckpointError(f"{path}: not a model of the world's rewards ({why(error)})") from error
    return model.eval().requires_grad_(False)
