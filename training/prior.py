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
from .contexts import Batch, Context, context_of
from .stage import Draws, Painting, Stage, Terms

if TYPE_CHECKING:
    from .data import Record


@dataclass(frozen=True)
class Schooling:
    """A step: what the decoder paints from its own text, and what the MLLM writes."""

    painting: Painting | None
    writing: Batch | None


class Prior(Stage):
    """Flow loss on the decoder alone and cross-entropy on the MLLM alone; they share no weight."""

    name: ClassVar[str] = "prior"

    def pattern(self) -> str:
        paint, text = r"decoder\..*", r"language\..*|vision\..*"
        return {"both": f"{paint}|{text}", "paint": paint, "text": text}[self.config.prior.rounds]

    def prepare(self, records: Sequence[Record], draws: Draws) -> Schooling:
        rounds = self.config.prior.rounds
        painting, writing = None, None
        if rounds != "text":
            # The conversation is never read here; it only carries the reference image's latents.
            def make(record: Record, dropped: str) -> Context:
                images, features = record.input_images, record.edit_features or None
                text = dropped or record.instruction
                return self.contexts.paint(text, think=False, images=images, edit_features=features)

            painting = self.painting(records, draws, make)
        if rounds != "paint":
            written = [
                context_of(self.contexts, r, think=True, thought=True)
                for r in records
                if r.reply or r.think_content
            ]
            writing = self.contexts.batch(written) if written else None
        if painting is None and writing is None:
            raise BadRequestError(f"stage prior: nothing to learn from this batch with prior.rounds = {rounds!r}")
        return Schooling(painting, writing)

    def terms(self, prepared: Schooling) -> Terms:
        weights = {"flow": self.config.prior.paint, "text": self.config.prior.text}
        parts: dict[str, torch.Tensor] = {}
        with self.autocast():
            if prepared.painting is not None:
                latents = [c.latents for c in prepared.painting.batch.contexts]
                condition, lengths, spans = self.contexts.text_condition(prepared.painting.captions, latents)
                parts["flow"] = self.flow(prepared.painting, condition, lengths, spans)
            if prepared.writing is not None:
                logits = self.model.language.logits(self.contexts.states(prepared.writing))
                parts["text"] = losses.text_loss(logits, prepared.writing.labels())
        return Terms(sum((weights[n] * p for n, p in parts.items()), torch.zeros(())), parts)
