"""Stage 2: connector and decoder learn to paint from thoughts: the fine description is the thinking, the coarse one the
answer. The MLLM is frozen and there is no loss on text, as published, unless `sft.text` asks for it.

Records without a thought are painted without thinking: what keeps thinking off a fair baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from mindomni_rt.model.mindomni import MindOmniModel

from ..config import Config
from . import losses
from .adapters import add_adapters
from .base import Draws, Painting, Stage, Terms
from .contexts import Batch, Context, Contexts, context_of

if TYPE_CHECKING:
    from ..data.records import Record

LORA_TARGETS = ("qkv_proj", "o_proj")  # of the decoder, as released


@dataclass(frozen=True)
class Lesson:
    """A step: what is painted, and what is read (picture questions; only with a text loss)."""

    paintings: list[Painting]
    reading: Batch | None


class Sft(Stage):
    """Flow loss, distillation if its weight says so (ours: 0 as published), cross-entropy if its weight says so."""

    name: ClassVar[str] = "sft"

    def __init__(self, model: MindOmniModel, contexts: Contexts, config: Config) -> None:
        super().__init__(model, contexts, config)
        if config.sft.decoder == "lora":
            add_adapters(model.decoder.llm.layers, config.lora, LORA_TARGETS, config.seed)
        # A decoder that trains in full cannot be its own frozen teacher. Outside the module tree: no state of ours.
        copied = config.sft.decoder == "full" and config.distill.weight > 0
        self.__dict__["teacher"] = copy.deepcopy(model.decoder).requires_grad_(False) if copied else None

    def pattern(self) -> str:
        decoder = {
            "full": r"|decoder\.(?!llm\.embed_tokens).*",
            "lora": r"|decoder\..*\.lora_[AB]\..*",
            "none": "",
        }[self.config.sft.decoder]
        text = r"|language\..*" if self.config.sft.text else ""
        return rf"connector\..*{decoder}{text}"

    def prepare(self, records: Sequence[Record], draws: Draws) -> Lesson:
        def make(record: Record, dropped: str) -> Context:
            if dropped:
                return self.contexts.paint(dropped, think=False)
            return context_of(self.contexts, record, think=bool(record.think_content), thought=True)

        read = [r for r in records if r.reply] if self.config.sft.text else []
        reading = [context_of(self.contexts, r, think=False, thought=False) for r in read]
        return Lesson(self.paintings(records, draws, make), self.contexts.batch(reading) if reading else None)

    def passes(self, prepared: Lesson) -> int:
        return 2 * len(prepared.paintings) + (prepared.reading is not None)

    def terms(self, prepared: Lesson) -> Terms:
        parts: dict[str, torch.Tensor] = {}
        with self.autocast():
            for painting in prepared.paintings:
                self._paint(painting, parts)
            if prepared.reading is not None:
                logits = self.model.language.logits(self.contexts.states(prepared.reading))
                parts["read"] = losses.text_loss(logits, prepared.reading.labels())
        text = self.config.sft.text
        weights = {"flow": 1.0, "distill": self.config.distill.weight, "text": text, "read": text}
        return Terms(sum((weights[n] * p for n, p in parts.items()), torch.zeros(())), parts)

    def _paint(self, painting: Painting, parts: dict[str, torch.Tensor]) -> None:
        text = self.config.sft.text > 0
        with torch.set_grad_enabled(text):
            states = self.contexts.states(painting.batch)
        condition, spans = self.contexts.condition(painting.batch, states.detach())
        features: list[torch.Tensor] | None = [] if self.config.distill.weight else None
        self.add(parts, "flow", self.flow(painting, condition, painting.batch.lengths, spans, features), painting.share)
        if features is not None:
            distance = losses.feature_kl(self.teacher_features(painting, self.__dict__["teacher"]), features)
            self.add(parts, "distill", distance, painting.share)
        if text:
            loss = losses.text_loss(self.model.language.logits(states), painting.batch.labels())
            self.add(parts, "text", loss, painting.share)
