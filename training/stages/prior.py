"""Stage 0 (ours), for a model from scratch: what the published model takes from pretrained weights.

`paint` trains the decoder on captions through its own text embedding (OmniGen's text-to-image and reference-image
prior: the teacher of stage 1). `text` trains the MLLM to write thoughts and answer questions about pictures
(Qwen2.5-VL's instruct prior), vision tower included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from mindomni_rt.errors import BadRequestError

from . import losses
from .base import Draws, ImageBatch, LossTerms, Stage, StepCounts
from .contexts import Batch, Context, context_of

if TYPE_CHECKING:
    from ..data.record import Record


@dataclass(frozen=True)
class PriorBatch:
    """One micro-batch: images for the decoder's own text path, and the texts that the MLLM learns to write."""

    image_batches: list[ImageBatch]
    writing: Batch | None
    writing_share: float = 1.0


class Prior(Stage):
    """Flow loss on the decoder alone and cross-entropy on the MLLM alone; they share no weight."""

    name: ClassVar[str] = "prior"

    def pattern(self) -> str:
        paint, text = r"decoder\..*", r"language\..*|vision\..*"
        return {"both": f"{paint}|{text}", "paint": paint, "text": text}[self.config.prior.rounds]

    def count(self, records: Sequence[Record], draws: Draws) -> StepCounts:
        written = sum(self.contexts.label_count(r) for r in records)
        return replace(super().count(records, draws), tokens=written)

    def prepare(self, records: Sequence[Record], draws: Draws) -> PriorBatch:
        rounds = self.config.prior.rounds
        image_batches: list[ImageBatch] = []
        writing, share = None, 1.0
        if rounds != "text":

            def make(record: Record, dropped: str) -> Context:
                images = () if dropped else record.input_images
                return self.contexts.reference(images, record.edit_features or None)

            image_batches = self.image_batches(records, draws, make)
        if rounds != "paint":
            own = self.count(records, draws)
            written = [
                context_of(self.contexts, r, think=True, thought=True) for r in records if r.reply or r.think_content
            ]
            writing = self.contexts.batch(written) if written else None
            share = self.share("tokens", own.tokens, own)
        if not image_batches and writing is None:
            raise BadRequestError(
                f"stage prior: no record of this batch has something to train on with prior.rounds = {rounds!r}"
            )
        return PriorBatch(image_batches, writing, share)

    def passes(self, prepared: PriorBatch) -> int:
        return 2 * len(prepared.image_batches) + (prepared.writing is not None)

    def terms(self, prepared: PriorBatch) -> LossTerms:
        weights = {"flow": self.config.prior.paint, "text": self.config.prior.text}
        parts: dict[str, torch.Tensor] = {}
        with self.autocast():
            for images in prepared.image_batches:
                latents = [c.latents for c in images.batch.contexts]
                condition, lengths, spans = self.contexts.text_condition(images.captions, latents)
                self.add(parts, "flow", self.flow(images, condition, lengths, spans), images.share)
            if prepared.writing is not None:
                logits = self.model.language.logits(self.contexts.states(prepared.writing))
                loss = losses.text_loss(logits, prepared.writing.labels())
                self.add(parts, "text", loss, prepared.writing_share)
        return LossTerms(sum((weights[n] * p for n, p in parts.items()), torch.zeros(())), parts)
