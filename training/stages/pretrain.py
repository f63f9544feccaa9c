"""Stage 1: the connector learns to map MLLM states to the decoder's input. MLLM, decoder and VAE are frozen.

Loss: rectified flow + weight · feature KL to the same frozen decoder fed with its own text path, over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from ..errors import BadDataError
from . import losses
from .base import Draws, ImageBatch, LossTerms, Stage
from .contexts import Context

if TYPE_CHECKING:
    from ..data.record import Record


class Pretrain(Stage):
    """Flow loss and distillation on captions and reference images."""

    name: ClassVar[str] = "pretrain"

    def pattern(self) -> str:
        return r"connector\..*"

    def prepare(self, records: Sequence[Record], draws: Draws) -> list[ImageBatch]:
        def make(record: Record, dropped: str) -> Context:
            if dropped:
                return self.contexts.paint(dropped, think=False)
            images, features = record.input_images, record.edit_features or None
            return self.contexts.paint(record.instruction, think=False, images=images, edit_features=features)

        image_batches = self.image_batches(records, draws, make)
        if not image_batches:
            where = records[0].source or "a batch"
            raise BadDataError(f"{where}: nothing in it trains stage pretrain; expected an output_image")
        return image_batches

    def terms(self, prepared: list[ImageBatch]) -> LossTerms:
        weight = self.config.distill.weight
        parts: dict[str, torch.Tensor] = {}
        with self.autocast():
            for images in prepared:
                with torch.no_grad():
                    states = self.contexts.states(images.batch)
                condition, spans = self.contexts.condition(images.batch, states)
                features: list[torch.Tensor] | None = [] if weight else None
                flow = self.flow(images, condition, images.batch.lengths, spans, features)
                self.add(parts, "flow", flow, images.share)
                if features is not None:
                    distance = losses.feature_kl(self.teacher_features(images), features)
                    self.add(parts, "distill", distance, images.share)
        total = parts["flow"] + weight * parts["distill"] if weight else parts["flow"]
        return LossTerms(total, parts)
