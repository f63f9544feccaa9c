"""What a running request tells its caller: one stream of typed events, which every interface consumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from .checks import shown
from .errors import BadRequestError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class TextEvent:
    """A piece of generated text. kind: "thinking", "answer" or "text" (outside tags); round 1 is a cascade's second.

    prompt: the place of its prompt in a list of them.
    """

    text: str
    kind: str = "text"
    round: int = 0
    prompt: int = 0


@dataclass(frozen=True)
class StepEvent:
    """A denoising step that is done (1 … total), with a preview of the image so far when one was asked for."""

    step: int
    total: int
    preview: list[Image] | None = None


@dataclass(frozen=True)
class ImageEvent:
    """The end of a request that paints: its result. prompt: the place of its prompt in a list of them."""

    result: GenerationResult
    prompt: int = 0


@dataclass(frozen=True)
class AnswerEvent:
    """The end of a request that only writes: its result."""

    result: GenerationResult


Event = TextEvent | StepEvent | ImageEvent | AnswerEvent


FinishReason = Literal["stop", "length", "cancelled"]
"""Why text ended: an end token, max_new_tokens, or the caller."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of writing, parsed by itself: its text, the parts between tags, why it ended; its prompt's tokens."""

    text: str
    thinking: str = ""
    answer: str = ""
    finish_reason: FinishReason = "stop"
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationResult:
    """What a request made. Two results are equal if the same request made the same; timings do not count.

    images: PIL images, or float32 (n, H, W, 3) in [0, 1] with output="numpy". text: all that was written (the prompt
    itself without thinking). thinking, answer: the parts between tags of the last round. rounds: each round of thinking
    by itself, two with cascade, none without thinking. finish_reason: of the last round; "length" where a round was cut
    at max_new_tokens. seed: image i was painted from seed + i, or None where latents were given. timings: seconds by
    stage, with "total", of all prompts that were painted together. token_ids: the generated ones, all rounds.
    settings: what made it, as stored in a picture. latents: the final ones, float32 (n, 4, H/8, W/8); None for a
    request that only writes. A result holds nothing of the pipeline: its weights go when the pipeline does.
    """

    images: list[Image] | NDArray[np.float32] = field(default_factory=list)
    text: str = ""
    thinking: str = ""
    answer: str = ""
    seed: int | None = None
    timings: dict[str, float] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    finish_reason: FinishReason = "stop"
    rounds: tuple[Round, ...] = ()
    latents: NDArray[np.float32] | None = field(default=None, repr=False)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GenerationResult):
            return NotImplemented
        plain = ("text", "thinking", "answer", "seed", "token_ids", "settings", "finish_reason", "rounds")
        if any(getattr(self, name) != getattr(other, name) for name in plain):
            return False
        if isinstance(self.images, list) or isinstance(other.images, list):
            return type(self.images) is type(other.images) and bool(self.images == other.images)
        return np.array_equal(self.images, other.images)

    __hash__ = None  # type: ignore[assignment]  # as other containers that compare by value

    def _repr_png_(self) -> bytes | None:
        """The first image in a notebook."""
        from .inputs.saving import png_bytes

        images = self._pictures()
        return png_bytes(images[0]) if images else None

    def _repr_html_(self) -> str:
        """Thinking, answer and images in a notebook."""
        from .notebook import as_html

        texts = [t for r in self.rounds for t in (("thinking", r.thinking), ("answer", r.answer or r.text))]
        facts = [] if self.seed is None else [f"seed {self.seed}"]
        facts += [f"{self.timings['total']:.1f} s"] if "total" in self.timings else []
        return as_html(texts, self._pictures(), facts)

    def _pictures(self) -> list[Image]:
        from .inputs.saving import to_pil

        return to_pil(self.images) if isinstance(self.images, np.ndarray) else self.images

    def save(self, path: str | Path) -> list[Path]:
        """Writes the images as PNG, JPEG or WebP, by the name's ending, each with the settings that made it inside.

        Several images get "-0", "-1", … before the ending. Returns the paths. `mindomni_rt.read_settings` reads the
        settings back. Raises BadRequestError if a file cannot be written or there is no image.
        """
        from .inputs.saving import numbered, save_image

        if not isinstance(path, (str, Path)):
            raise BadRequestError(f"path {shown(path)}: expected the name of a file")
        if not len(self.images):
            raise BadRequestError("this result holds no image to save")
        images = self._pictures()
        paths = numbered(Path(path), len(images))
        for index, (image, target) in enumerate(zip(images, paths, strict=True)):
            seed = None if self.seed is None else self.seed + index
            save_image(image, target, {**self.settings, "seed": seed, "num_images": 1, "text": self.text})
        return paths
