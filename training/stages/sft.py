"""Stage 2: connector and decoder learn to generate images from thoughts (fine description) and answers (coarse one).

The MLLM is frozen and text has no loss, as published, unless `sft.text` is above 0. Records without a thought are
trained without thinking, so that the mode without thinking stays a fair baseline.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from mindomni_rt.model.mindomni import MindOmniModel

from ..config import SFT_RANK, Config
from ..errors import BadDataError
from . import losses
from .adapters import add_adapters
from .base import Draws, ImageBatch, LossTerms, Stage, StepCounts
from .contexts import Batch, Context, Contexts, context_of

if TYPE_CHECKING:
    from ..data.record import Record

LORA_TARGETS = ("qkv_proj", "o_proj")  # of the decoder, as released


@dataclass(frozen=True)
class SftBatch:
    """One micro-batch: images, and picture questions (only with a text loss).

    token_shares: for each of image_batches, the weight of its mean over tokens in the step's mean.
    """

    image_batches: list[ImageBatch]
    token_shares: list[float]
    reading: Batch | None
    reading_share: float


class Sft(Stage):
    """Flow loss, and distillation (ours) and cross-entropy at their weights, both 0 as published."""

    name: ClassVar[str] = "sft"

    def __init__(self, model: MindOmniModel, contexts: Contexts, config: Config) -> None:
        super().__init__(model, contexts, config)
        if config.sft.decoder == "lora":
            rank = SFT_RANK if config.lora.rank is None else config.lora.rank
            add_adapters(model.decoder.llm.layers, config.lora, rank, LORA_TARGETS, config.seed)
        # A decoder that trains in full needs a frozen copy as teacher. Outside the module tree: not part of the state.
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

    def count(self, records: Sequence[Record], draws: Draws) -> StepCounts:
        if not self.config.sft.text:
            return super().count(records, draws)
        kept = [r for r, d in zip(records, self.dropped(records, draws), strict=True) if not d]
        return replace(
            super().count(records, draws),
            tokens=sum(self.contexts.label_count(r) for r in kept if r.output_image is not None),
            replies=sum(self.contexts.label_count(r) for r in records if r.reply),
        )

    def prepare(self, records: Sequence[Record], draws: Draws) -> SftBatch:
        def make(record: Record, dropped: str) -> Context:
            if dropped:
                return self.contexts.paint(dropped, think=False)
            return context_of(self.contexts, record, think=bool(record.think_content), thought=True)

        own = self.count(records, draws)
        batches = self.image_batches(records, draws, make)
        shares = [self.share("tokens", int((b.batch.labels() != losses.IGNORE).sum()), own) for b in batches]
        read = [r for r in records if r.reply] if self.config.sft.text else []
        if not batches and not read:
            where = records[0].source or "a batch"
            raise BadDataError(
                f"{where}: nothing in it trains stage sft; expected an output_image, or a reply with sft.text above 0"
            )
        reading = [context_of(self.contexts, r, think=False, thought=False) for r in read]
        return SftBatch(
            batches,
            shares,
            self.contexts.batch(reading) if reading else None,
            self.share("replies", own.replies, own),
        )

    def passes(self, prepared: SftBatch) -> int:
        return 2 * len(prepared.image_batches) + (prepared.reading is not None)

    def terms(self, prepared: SftBatch) -> LossTerms:
        parts: dict[str, torch.Tensor] = {}
        with self.autocast():
            for images, share in zip(prepared.image_batches, prepared.token_shares, strict=True):
                self._image_terms(images, share, parts)
            if prepared.reading is not None:
                logits = self.model.language.logits(self.contexts.states(prepared.reading))
                self.add(parts, "read", losses.text_loss(logits, prepared.reading.labels()), prepared.reading_share)
        text = self.config.sft.text
        weights = {"flow": 1.0, "distill": self.config.distill.weight, "text": text, "read": text}
        return LossTerms(sum((weights[n] * p for n, p in parts.items()), torch.zeros(())), parts)

    def _image_terms(self, images: ImageBatch, token_share: float, parts: dict[str, torch.Tensor]) -> None:
        text = self.config.sft.text > 0
        with torch.set_grad_enabled(text):
            states = self.contexts.states(images.batch)
        condition, spans = self.contexts.condition(images.batch, states.detach())
        features: list[torch.Tensor] | None = [] if self.config.distill.weight else None
        self.add(parts, "flow", self.flow(images, condition, images.batch.lengths, spans, features), images.share)
        if features is not None:
            distance = losses.feature_kl(self.teacher_features(images, self.__dict__["teacher"]), features)
            self.add(parts, "distill", distance, images.share)
        if text:
            loss = losses.text_loss(self.model.language.logits(states), images.batch.labels())
            self.add(parts, "text", loss, token_share)
