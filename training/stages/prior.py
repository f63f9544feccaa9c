"""Stage 0, ours: what the published models bring along and a model from scratch does not have.

`paint` trains the decoder on captions through its own text embedding (OmniGen's text-to-image and reference-image
prior: the teacher of stage 1). `text` trains the MLLM to write thoughts and answer questions about pictures
(Qwen2.5-VL's instruct prior), vision tower included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from mindomni_rt.errors import BadRequestError

from . import losses
from .base import Draws, Painting, Stage, Terms
from .contexts import Batch, Context, context_of

if TYPE_CHECKING:
    from ..data.records import Record


@dataclass(frozen=True)
class Schooling:
    """A step: what the decoder paints from its own text, and what the MLLM writes."""

    paintings: list[Painting]
    writing: Batch | None


class Prior(Stage):
    """Flow loss on the decoder alone and cross-entropy on the MLLM alone; they share no weight."""

    name: ClassVar[str] = "prior"

    def pattern(self) -> str:
        paint, text = r"decoder\..*", r"language\..*|vision\..*"
        return {"both": f"{paint}|{text}", "paint": paint, "text": text}[self.config.prior.rounds]

    def prepare(self, records: Sequence[Record], draws: Draws) -> Schooling:
        rounds = self.config.prior.rounds
        paintings: list[Painting] = []
        writing = None
        if rounds != "text":

            def make(record: Record, dropped: str) -> Context:
                images = () if dropped else record.input_images
                return self.contexts.reference(images, record.edit_features or None)

            paintings = self.paintings(records, draws, make)
        if rounds != "paint":
            written = [
                context_of(self.contexts, r, think=True, thought=True) for r in records if r.reply or r.think_content
            ]
            writing = self.contexts.batch(written) if written else None
        if not paintings and writing is None:
            raise BadRequestError(f"stage prior: nothing to learn from this batch with prior.rounds = {rounds!r}")
        return Schooling(paintings, writing)

    def passes(self, prepared: Schooling) -> int:
        return 2 * len(prepared.paintings) + (prepared.writing is not None)

    def terms(self, prepared: Schooling) -> Terms:
        weights = {"flow": self.config.prior.paint, "text": self.config.prior.text}
        parts: dict[str, torch.Tensor] = {}
        with self.autocast():
            for painting in prepared.paintings:
                latents = [c.latents for c in painting.batch.contexts]
                condition, lengths, spans = self.contexts.text_condition(painting.captions, latents)
                self.add(parts, "flow", self.flow(painting, condition, lengths, spans), painting.share)
            if prepared.writing is not None:
                logits = self.model.language.logits(self.contexts.states(prepared.writing))
                parts["text"] = losses.text_loss(logits, prepared.writing.labels())
        return Terms(sum((weights[n] * p for n, p in parts.items()), torch.zeros(())), parts)
