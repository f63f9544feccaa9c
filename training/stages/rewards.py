"""Rewards of stage 3: functions by name. A user's own is named `module:function` in `rgpo.rewards`."""

from __future__ import annotations

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mindomni_rt.errors import BadRequestError, MissingExtraError


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled text and the image generated from it. image (H, W, 3): uint8, or floats in [0, 1]."""

    prompt: str
    text: str
    image: NDArray[Any]
    gt_prompt: str
    token_ids: Sequence[int]


Reward = Callable[[Sequence[Rollout]], NDArray[Any]]
"""Rollouts to one number each (B,)."""
Maker = Callable[[str, str], Reward]
_REGISTRY: dict[str, Maker] = {}
_SMALL = "`mindomni train world FOLDER --only reward` trains the small one, into FOLDER/reward"
_FORMAT = re.compile(r"<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


def reward(name: str) -> Callable[[Maker], Maker]:
    """Registers a maker of a reward: it takes rgpo.reward_model (a folder, hub id or empty) and a device."""

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
        raise BadRequestError(f"reward 'consistency' needs rgpo.reward_model: a CLIP folder or hub id. {_SMALL}")
    if (Path(model) / "world_clip.safetensors").exists():
        from ..data.world.clip import load_clip

        small = load_clip(Path(model)).to(device)
        return lambda rollouts: small.similarity(np.stack([r.image for r in rollouts]), [r.gt_prompt for r in rollouts])
    owner, _, name = model.rpartition("/")
    hub_id = (
        bool(name) and owner.count("/") == 0 and not owner.startswith((".", "~")) and not Path(owner or "-").is_dir()
    )
    if not hub_id and not Path(model).is_dir():
        raise BadRequestError(f"rgpo.reward_model = {model!r}: no such folder. {_SMALL}")
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
        reason = str(error).splitlines()[0]
        raise BadRequestError(f"rgpo.reward_model = {model!r}: no CLIP model ({reason}). {_SMALL}") from error
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
    """A reward by name, ready to score; `module:function` is a user's own, also from the current folder.

    Raises BadRequestError for a name that is not known, or a module that does not import.
    """
    if name in _REGISTRY:
        return _checked(name, _REGISTRY[name](model, device))
    module, colon, function = name.partition(":")
    if not colon:
        raise BadRequestError(f"reward {name!r}: expected one of {', '.join(_REGISTRY)}, or module:function")
    found = getattr(_imported(name, module), function, None)
    if not callable(found):
        what = "has no attribute" if found is None else "holds no function"
        raise BadRequestError(f"reward {name!r}: module {module!r} {what} {function!r}")
    return _checked(name, found)


def _imported(name: str, module: str) -> Any:
    """A user's module. The current folder is searched too, also by an installed command."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module)
    except Exception as error:  # user code may raise anything
        raise BadRequestError(f"reward {name!r}: {_told(error)}") from error


def _checked(name: str, function: Reward) -> Reward:
    def score(rollouts: Sequence[Rollout]) -> NDArray[Any]:
        try:
            values = np.asarray(function(rollouts), np.float32)
        except Exception as error:  # user code may raise anything
            raise BadRequestError(f"reward {name!r} raised {_told(error)}") from error
        count = len(rollouts)
        if values.shape != (count,):
            found = f"an array of shape {values.shape}" if values.ndim != 1 else f"{len(values)} numbers"
            raise BadRequestError(f"reward {name!r} returned {found} for {count} rollouts; expected one number each")
        if not np.isfinite(values).all():
            wrong = int(np.flatnonzero(~np.isfinite(values))[0])
            raise BadRequestError(f"reward {name!r} returned {values[wrong]} for rollout {wrong + 1} of {count}")
        return values

    return score


def _told(error: Exception) -> str:
    """An error in one line: its type, message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and frames[-1].filename[0] != "<" else ""
    if isinstance(error, SyntaxError):
        where = f" ({error.filename}:{error.lineno})"
    text = " ".join(str(error.msg if isinstance(error, SyntaxError) else error).split())
    return f"{type(error).__name__}: {text}{where}"
