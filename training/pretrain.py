"""Stage 1: the connector learns to speak the decoder's language. MLLM, decoder and VAE stay frozen.

Loss: rectified flow + weight · feature KL to the same frozen decoder fed with its own text path, over all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from mindomni_rt.errors import BadRequestError

from . import losses
from .contexts import Context
from .stage import Draws, Painting, Stage, Terms

if TYPE_CHECKING:
    from .data import Record


class Pretrain(Stage):
    """Captions and reference images in, flow loss and distillation out."""

    name: ClassVar[str] = "pretrain"

    def pattern(self) -> str:
        return r"connector\..*"

    def prepare(self, records: Sequence[Record], draws: Draws) -> Painting:
        def make(record: Record, dropped: str) -> Context:
            if dropped:
                return self.contexts.paint(dropped, think=False)
            images, features = record.input_images, record.edit_features or None
            return self.contexts.paint(record.instruction, think=False, images=images, edit_features=features)

        painting = self.painting(records, draws, make)
        if painting is None:
            raise BadRequestError("stage pretrain: no record of this batch has an output_image")
        return painting

    def terms(self, prepared: Painting) -> Terms:
        weight = self.config.distill.weight
        with self.autocast():
            with torch.no_grad():
                states = self.contexts.states(prepared.batch)
            condition, spans = self.contexts.condition(prepared.batch, states)
            features: list[torch.Tensor] | None = [] if weight else None
            flow = self.flow(prepared, condition, prepared.batch.lengths, spans, features)
            if features is None:
                return Terms(flow, {"flow": flow})
            distill = losses.feature_kl(self.teacher_features(prepared), features)
        return Terms(flow + weight * distill, {"flow": flow, "distill": distill})
