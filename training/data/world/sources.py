"""Records of the world for every stage. The mixtures are data: shares of each kind of record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mindomni_rt.errors import BadRequestError

from ..record import Record
from .scene import BRIGHTNESS, Scene, all_scenes, render
from .text import caption, description, edit, question, riddle, slip

# Shares of stage 0's thoughts that are systematically wrong, and that lack a tag. Stage 3 corrects both.
_WRONG, _MALFORMED = 0.6, 0.12
MIXTURES: dict[str, dict[str, float]] = {
    "prior": {
        "caption": 0.3,
        "description": 0.06,
        "copy": 0.14,
        "thought": 0.28,
        "edit_thought": 0.1,
        "question": 0.12,
    },
    "pretrain": {"caption": 0.6, "description": 0.1, "copy": 0.3},
    "sft": {"riddle": 0.4, "edit": 0.22, "direct": 0.16, "caption": 0.14, "copy": 0.08},
    "rgpo": {"prompt": 1.0},
}


class WorldStream:
    """Records of a mixture; the i-th is a function of (seed, i) alone."""

    def __init__(self, mixture: str, seed: int) -> None:
        if mixture not in MIXTURES:
            raise BadRequestError(f"data.split = {mixture!r}: the world has {', '.join(MIXTURES)}")
        self._mixture, self._seed, self._position = mixture, seed, 0

    def next_batch(self, count: int) -> list[Record]:
        """The next records."""
        kinds, shares = zip(*MIXTURES[self._mixture].items(), strict=True)
        out = []
        for index in range(self._position, self._position + count):
            draw = np.random.default_rng([self._seed, index])
            kind = kinds[int(draw.choice(len(kinds), p=np.array(shares) / sum(shares)))]
            out.append(make(kind, draw, f"world:{self._mixture}:{index}"))
        self._position += count
        return out

    def state_dict(self) -> dict[str, int]:
        """The position: records given so far."""
        return {"position": self._position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from a position."""
        self._position = int(state["position"])


def make(kind: str, draw: np.random.Generator, source: str = "world") -> Record:
    """One record of a kind."""
    scenes = all_scenes()
    if kind == "prompt":
        scenes = [s for s in scenes if not s.held_out]
    scene = scenes[int(draw.integers(len(scenes)))]
    features = ("vit", "vit+vae")[int(draw.integers(2))]
    common: dict[str, Any] = {"source": source, "gt_prompt": caption(scene)}
    if kind in ("caption", "description"):
        text = caption(scene) if kind == "caption" else description(scene)
        return Record(instruction=text, output_image=_picture(scene, draw), **{**common, "gt_prompt": text})
    if kind == "copy":
        return Record(
            instruction="the same picture",
            input_images=(_picture(scene, draw),),
            output_image=_picture(scene, draw),
            edit_features=features,
            **common,
        )
    if kind == "question":
        asked, reply = question(scene, draw)
        return Record(instruction=asked, reply=reply, input_images=(_picture(scene, draw),), source=source)
    if kind in ("edit", "edit_thought"):
        return _edit(scene, draw, features, common, paint=kind == "edit")
    return _riddle(kind, scene, draw, common)


def _riddle(kind: str, scene: Scene, draw: np.random.Generator, common: dict[str, Any]) -> Record:
    task = riddle(scene, draw, held_out=False if kind == "prompt" else None)
    if kind == "prompt":
        return Record(instruction=task.instruction, **common)
    if kind == "direct":
        return Record(instruction=task.instruction, output_image=_picture(scene, draw), **common)
    if kind == "riddle":
        image = _picture(scene, draw)
        return Record(
            instruction=task.instruction, think_content=task.thought, answer=task.answer, output_image=image, **common
        )
    assert kind == "thought", kind
    thought, answer = task.thought, task.answer
    if draw.uniform() < _WRONG:
        thought, meant = slip(thought)
        answer = caption(meant)
    if draw.uniform() < _MALFORMED:  # without the closing tag of the thought
        return Record(instruction=task.instruction, think_content=f"{thought} <answer> {answer} </answer>", **common)
    return Record(instruction=task.instruction, think_content=thought, answer=answer, **common)


def _edit(scene: Scene, draw: np.random.Generator, features: str, common: dict[str, Any], paint: bool) -> Record:
    task = edit(scene, draw)
    assert task.source is not None
    return Record(
        instruction=task.instruction,
        think_content=task.thought,
        answer=task.answer,
        input_images=(_picture(task.source, draw),),
        output_image=_picture(scene, draw) if paint else None,
        edit_features=features,
        **common,
    )


def _picture(scene: Scene, draw: np.random.Generator) -> object:
    return render(scene, int(draw.choice(BRIGHTNESS)))
