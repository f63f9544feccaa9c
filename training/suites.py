"""Exact accuracy on the synthetic world: the suites of prompts that runs and `training evaluate` score.

The prompts hold scenes and sums that reinforcement learning never asks for. Every picture is judged by the exact
verifier, every text by what it says. Text is decoded greedily with the checkpoint's repetition penalty, as the
pipeline does; images are sampled by Euler steps. A seed decides prompts and noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs.prompts import DEFAULT_NEGATIVE, split_thought
from mindomni_rt.scores import Score

from .data.world.scene import BRIGHTNESS, Scene, all_scenes, render, verify
from .data.world.text import QUESTIONS, Task, answer_to, caption, edit, parse, riddle
from .stages import rollouts
from .stages.contexts import Context, Contexts
from .stages.rewards import Rollout, make

_BATCH = 48
SUITES = ("riddles", "direct", "captions", "edits", "edits_vit", "questions", "teacher")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run a model: sampler steps, guidance, seed of prompts and noise, prompts a suite."""

    n: int = 96
    steps: int = 10
    guidance: float = 1.0
    seed: int = 0
    max_new_tokens: int = 48
    reward_model: str = ""


def evaluate(contexts: Contexts, suites: Sequence[str] = SUITES, settings: Settings | None = None) -> dict[str, Any]:
    """Scores of each suite by name. Raises BadRequestError for an unknown suite or n < 1."""
    settings = settings or Settings()
    if settings.n < 1:
        raise BadRequestError(f"n = {settings.n}: expected at least 1")
    out: dict[str, Any] = {}
    for suite in suites:
        if suite not in _RUN:
            raise BadRequestError(f"suite {suite!r}: expected some of {', '.join(SUITES)}")
        out[suite] = {
            name: value.to_dict() if isinstance(value, Score) else round(value, 4)
            for name, value in _RUN[suite](contexts, settings).items()
        }
    return out


def held_out_riddles(n: int, seed: int) -> list[Task]:
    """Riddles of scenes and sums that reinforcement learning never asks for."""
    draw = np.random.default_rng([seed, 1])
    scenes = [s for s in all_scenes() if s.held_out]
    return [riddle(scenes[int(draw.integers(len(scenes)))], draw, held_out=True) for _ in range(n)]


Result = dict[str, Score | float]


def _riddles(contexts: Contexts, settings: Settings) -> Result:
    tasks = held_out_riddles(settings.n, settings.seed)
    prompts = [contexts.paint(t.instruction, think=True) for t in tasks]
    return _thinking(contexts, settings, tasks, prompts)


def _edits(contexts: Contexts, settings: Settings, features: str = "vit+vae") -> Result:
    draw = np.random.default_rng([settings.seed, 2])
    scenes = all_scenes()
    tasks = [edit(scenes[int(draw.integers(len(scenes)))], draw) for _ in range(settings.n)]
    prompts = [
        contexts.paint(t.instruction, think=True, images=(_shown(t.source, draw),), edit_features=features)
        for t in tasks
    ]
    return _thinking(contexts, settings, tasks, prompts)


def _thinking(contexts: Contexts, settings: Settings, tasks: Sequence[Task], prompts: Sequence[Context]) -> Result:
    written = [
        w
        for start in range(0, len(prompts), _BATCH)
        for w in rollouts.write(contexts, prompts[start : start + _BATCH], settings.max_new_tokens)
    ]
    texts = [contexts.chat.decode(w.token_ids) for w in written]
    images = _paint(contexts, settings, [p.extended(w.token_ids[:-1]) for p, w in zip(prompts, written, strict=True)])
    answers = [parse(split_thought(text)[1]) for text in texts]
    n = len(tasks)
    shaped = make("format")
    scored = [
        Rollout(prompt=t.instruction, text=x, image=i, gt_prompt=t.answer, token_ids=w.token_ids)
        for t, x, i, w in zip(tasks, texts, images, written, strict=True)
    ]
    out: Result = {
        "image": Score(
            right=sum(verify(i / np.float32(255)) == t.scene for i, t in zip(images, tasks, strict=True)), n=n
        ),
        "text": Score(right=sum(a == t.scene for a, t in zip(answers, tasks, strict=True)), n=n),
        "image_of_text": Score(
            right=sum(a is not None and verify(i / np.float32(255)) == a for i, a in zip(images, answers, strict=True)),
            n=n,
        ),
        "format": Score(right=int(shaped(scored).sum()), n=n),
        "tokens": float(np.mean([len(w.token_ids) for w in written])),
    }
    if settings.reward_model:
        out["consistency"] = float(make("consistency", settings.reward_model)(scored).mean())
    return out


def _direct(contexts: Contexts, settings: Settings) -> Result:
    tasks = held_out_riddles(settings.n, settings.seed)
    prompts = [contexts.paint(t.instruction, think=False) for t in tasks]
    return _painted(contexts, settings, prompts, [t.scene for t in tasks])


def _captions(contexts: Contexts, settings: Settings) -> Result:
    scenes = _scenes(settings)
    prompts = [contexts.paint(caption(s), think=False) for s in scenes]
    return _painted(contexts, settings, prompts, scenes)


def _painted(contexts: Contexts, settings: Settings, prompts: Sequence[Context], scenes: Sequence[Scene]) -> Result:
    images = _paint(contexts, settings, prompts)
    right = sum(verify(i / np.float32(255)) == s for i, s in zip(images, scenes, strict=True))
    return {"image": Score(right=right, n=len(scenes))}


@torch.no_grad()
def _teacher(contexts: Contexts, settings: Settings) -> Result:
    """The decoder through its own text path: what distillation takes its target from."""
    right, scenes = 0, _scenes(settings)
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        noise = _noise(contexts, settings, start, len(part))
        condition, lengths, spans = contexts.text_condition([caption(s) for s in part])
        tokens = noise.shape[-2] * noise.shape[-1] // contexts.config.decoder.patch_size**2
        batch = rollouts.prefixes(contexts.model.decoder, condition, lengths, spans, settings.steps, tokens)
        images = rollouts.decode(contexts, rollouts.paint(contexts, batch, noise, settings.steps))
        right += sum(verify(i / np.float32(255)) == s for i, s in zip(images, part, strict=True))
    return {"image": Score(right=right, n=len(scenes))}


def _questions(contexts: Contexts, settings: Settings) -> Result:
    draw = np.random.default_rng([settings.seed, 3])
    scenes = _scenes(settings)
    asked = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(scenes))]
    prompts = [contexts.understand(q, (_shown(s, draw),)) for q, s in zip(asked, scenes, strict=True)]
    written = rollouts.write(contexts, prompts, 12)
    replies = [contexts.chat.decode(w.token_ids).strip() for w in written]
    out: Result = {}
    right = [r == answer_to(q, s) for r, q, s in zip(replies, asked, scenes, strict=True)]
    for question in QUESTIONS:
        rows = [r for r, q in zip(right, asked, strict=True) if q == question]
        if rows:
            out[question] = Score(right=sum(rows), n=len(rows))
    return {"text": Score(right=sum(right), n=len(right)), **out}


def _scenes(settings: Settings) -> list[Scene]:
    """n scenes, each of the 96 as often as the others."""
    scenes = all_scenes()
    order = np.random.default_rng([settings.seed, 4]).permutation(len(scenes))
    return [scenes[int(order[i % len(scenes)])] for i in range(settings.n)]


def _shown(scene: Scene | None, draw: np.random.Generator) -> Any:
    assert scene is not None
    return render(scene, int(draw.choice(BRIGHTNESS)))


def _noise(contexts: Contexts, settings: Settings, start: int, count: int) -> torch.Tensor:
    side = contexts.image_size // contexts.config.vae.downscale
    generator = torch.Generator().manual_seed(settings.seed * 1000 + start)
    return torch.randn(count, contexts.config.decoder.latent_channels, side, side, generator=generator)


@torch.no_grad()
def _paint(contexts: Contexts, settings: Settings, conversations: Sequence[Context]) -> NDArray[np.uint8]:
    negative = contexts.paint(DEFAULT_NEGATIVE, think=False) if settings.guidance != 1 else None
    images = []
    for start in range(0, len(conversations), _BATCH):
        part = conversations[start : start + _BATCH]
        noise = _noise(contexts, settings, start, len(part))
        latents = rollouts.paint_contexts(contexts, part, noise, settings.steps, settings.guidance, negative)
        images.append(rollouts.decode(contexts, latents))
    return np.concatenate(images)


_RUN: dict[str, Callable[[Contexts, Settings], Result]] = {
    "riddles": _riddles,
    "direct": _direct,
    "captions": _captions,
    "edits": _edits,
    "edits_vit": lambda contexts, settings: _edits(contexts, settings, "vit"),
    "questions": _questions,
    "teacher": _teacher,
}
