"""Rewards of stage 3: small functions in a registry. A user's own is named `module:function` in the configuration."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.errors import BadRequestError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled thought and what it painted. image (H, W, 3): uint8, or floats in [0, 1]."""

    prompt: str
    text: str
    image: NDArray[Any]
    gt_prompt: str
    token_ids: Sequence[int]


Reward = Callable[[Sequence[Rollout]], NDArray[Any]]
"""Rollouts to one number each (B,)."""
Maker = Callable[[str, str], Reward]
_REGISTRY: dict[str, Maker] = {}
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def reward(name: str) -> Callable[[Maker], Maker]:
    """Registers a maker of rewards: it gets rgpo.reward_model (a folder, hub id or empty) and a
    device, and returns the function."""

    def register(make: Maker) -> Maker:
        assert name not in _REGISTRY, name
        _REGISTRY[name] = make
        return make

    return register


@reward("format")
def _format(model: str, device: str) -> Reward:
    """1 where the text holds a closed thought followed by a closed answer, else 0."""
    return lambda rollouts: np.array([float(bool(_FORMAT.search(r.text))) for r in rollouts], np.float32)


@reward("consistency")
def _consistency(model: str, device: str) -> Reward:
    """Cosine of image and gt_prompt under CLIP, cut off at 0: the world's own small one, or transformers'."""
    if not model:
        raise BadRequestError("reward 'consistency' needs rgpo.reward_model: a CLIP folder or hub id")
    if (Path(model) / "world_clip.safetensors").exists():
        from ..data.world.clip import load_clip

        small = load_clip(Path(model)).to(device)
        return lambda rollouts: small.similarity(np.stack([r.image for r in rollouts]), [r.gt_prompt for r in rollouts])
    return _transformers_clip(model, device)


def _transformers_clip(model: str, device: str) -> Reward:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "train") from error
    import torch
    from torch.nn import functional as F

    try:
        clip = transformers.CLIPModel.from_pretrained(model).eval()
        processor = transformers.CLIPProcessor.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise BadRequestError(f"rgpo.reward_model = {model!r}: not a CLIP model ({error})") from error
    clip.to(device)

    @torch.no_grad()
    def score(rollouts: Sequence[Rollout]) -> NDArray[Any]:
        images = [(r.image if r.image.dtype == np.uint8 else (r.image * 255).astype(np.uint8)) for r in rollouts]
        inputs = processor(
            text=[r.gt_prompt for r in rollouts], images=images, return_tensors="pt", padding=True, truncation=True
        ).to(device)
        out = clip(**inputs)
        cosine = (F.normalize(out.image_embeds, dim=-1) * F.normalize(out.text_embeds, dim=-1)).sum(-1)
        return np.asarray(cosine.clamp(min=0).float().cpu().numpy())

    return score


def make(name: str, model: str = "", device: str = "cpu") -> Reward:
    """A reward by name, ready to score; `package.module:function` is a user's own. Raises BadRequestError."""
    if name in _REGISTRY:
        return _checked(name, _REGISTRY[name](model, device))
    module, colon, function = name.partition(":")
    if not colon:
        raise BadRequestError(f"reward {name!r}: expected one of {', '.join(_REGISTRY)}, or module:function")
    try:
        return _checked(name, getattr(importlib.import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise BadRequestError(f"reward {name!r}: {error}") from error


def _checked(name: str, function: Reward) -> Reward:
    def score(rollouts: Sequence[Rollout]) -> NDArray[Any]:
        values = np.asarray(function(rollouts), np.float32)
        if values.shape != (len(rollouts),) or not np.isfinite(values).all():
            raise BadRequestError(
                f"reward {name!r} returned {values.shape} for {len(rollouts)} rollouts; expected one finite number each"
            )
        return values

    return score
