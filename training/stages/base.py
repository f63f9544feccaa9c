"""The base of a training stage: which parameters train, what is sampled for a step, and the loss terms.

A stage is an nn.Module over the whole model, so that an engine which shards parameters sees every use of them inside
one forward call: `stage("terms", prepared)`.

A mean over images or tokens is taken over those of the whole step: `begin_step` counts them over all micro-batches and
processes, and `share` weighs the mean of each micro-batch by its part of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mindomni_rt.model.decoder import DiffusionDecoder
from mindomni_rt.model.mindomni import MindOmniModel

from ..config import Config
from . import losses
from .adapters import adapters_off
from .contexts import Batch, Context, Contexts

if TYPE_CHECKING:
    from ..data.record import Record

_MASK = 0x7FFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Draws:
    """Every random number of a micro-batch: a function of (seed, step, part, name), so resuming needs no RNG state.

    count: records of the micro-batch in all processes together; this process holds [first, first + here).
    """

    seed: int
    step: int
    part: int = 0
    count: int = 1
    first: int = 0
    here: int = 1

    def generator(self, name: str) -> torch.Generator:
        """A CPU generator for one purpose."""
        mixed = self.seed
        for value in (self.step, self.part, *name.encode()):
            mixed = (mixed * 6364136223846793005 + value + 1442695040888963407) & _MASK
        return torch.Generator().manual_seed(mixed)

    def times(self, name: str = "times") -> Tensor:
        """Logit-normal times (here,) in (0, 1)."""
        return losses.logit_normal(self.count, self.generator(name))[self.first : self.first + self.here]

    def noise(self, shape: Sequence[int], name: str = "noise") -> Tensor:
        """Standard normal (here, *shape)."""
        return torch.randn(self.count, *shape, generator=self.generator(name))[self.first : self.first + self.here]

    def uniform(self, name: str) -> Tensor:
        """Uniform (here,) in [0, 1)."""
        return torch.rand(self.count, generator=self.generator(name))[self.first : self.first + self.here]


@dataclass
class LossTerms:
    """A scalar to minimise, its terms before their weights, and other figures for the log."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One rollout for the log. image (H, W, 3) uint8; group: the place of its prompt in the micro-batch."""

    group: int
    prompt: str
    text: str
    gt_prompt: str
    reward: float
    image: NDArray[Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data, without the image."""
        return {k: v for k, v in self.__dict__.items() if k != "image"}


@dataclass(frozen=True)
class StepCounts:
    """What the means of a step are taken over: images, tokens that the MLLM learns to write, tokens of replies.

    pieces: micro-batches times processes, whose gradients are averaged.
    """

    images: int = 0
    tokens: int = 0
    replies: int = 0
    pieces: int = 1


@dataclass(frozen=True)
class ImageBatch:
    """Input of the flow loss: conversations, latents (B, 4, h, w), times (B,), noise, captions for the teacher."""

    batch: Batch
    latents: Tensor
    times: Tensor
    noise: Tensor
    captions: list[str]
    share: float  # weight of this batch's mean over images in the step's mean


class Stage(nn.Module):
    """Base of the stages. Subclasses define `pattern` (what trains), `prepare` (without gradient) and `terms`."""

    name: ClassVar[str]

    def __init__(self, model: MindOmniModel, contexts: Contexts, config: Config) -> None:
        super().__init__()
        self.model, self.contexts, self.config = model, contexts, config
        self.updates = 1
        self.step_counts: StepCounts | None = None

    def pattern(self) -> str:
        """A regular expression: parameters whose whole name matches it are trained."""
        raise NotImplementedError

    def prepare(self, records: Sequence[Record], draws: Draws) -> Any:
        """The part of a micro-batch that needs no gradient."""
        raise NotImplementedError

    def terms(self, prepared: Any) -> LossTerms:
        """The loss of what `prepare` returned."""
        raise NotImplementedError

    def count(self, records: Sequence[Record], draws: Draws) -> StepCounts:
        """What the loss terms of a micro-batch are means over; `records` are all that `draws` covers."""
        return StepCounts(images=sum(r.output_image is not None for r in records))

    def begin_step(self, parts: Sequence[tuple[Sequence[Record], Draws]], processes: int) -> None:
        """Counts images and tokens of a step over the micro-batches of all processes.

        Without it (`parts` empty) each call of `prepare` is a step of its own.
        """
        each = [self.count(records, draws) for records, draws in parts]
        self.step_counts = (
            StepCounts(
                images=sum(c.images for c in each),
                tokens=sum(c.tokens for c in each),
                replies=sum(c.replies for c in each),
                pieces=len(parts) * processes,
            )
            if parts
            else None
        )

    def share(self, kind: str, count: int, own: StepCounts) -> float:
        """The weight of a mean over `count` images or tokens, so that the mean over all pieces is the step's mean.

        kind: a field of StepCounts. own: the counts of this call's records, for a call outside of a step.
        """
        counts = self.step_counts or own
        return counts.pieces * count / max(1, getattr(counts, kind))

    def passes(self, prepared: Any) -> int:
        """Forward passes that `terms` makes of what `prepare` made. All processes must make the same number."""
        return len(prepared) if isinstance(prepared, list) else 1

    def forward(self, action: str, *arguments: Any) -> Any:
        return getattr(self, action)(*arguments)

    def samples(self, prepared: Any) -> list[Sample]:
        """Sampled texts and images of a step, for the log; none in stages that sample nothing."""
        return []

    def apply_to(self, function: Callable[[Stage], Any]) -> Any:
        """Calls a function of this stage inside `forward`, where sharded weights are gathered."""
        return function(self)

    def choose_trainable(self) -> dict[str, nn.Parameter]:
        """Freezes all parameters but those of `pattern`, which become float32; returns these by name."""
        pattern = re.compile(self.pattern())
        for name, parameter in self.model.named_parameters():
            trains = pattern.fullmatch(name) is not None
            parameter.requires_grad_(trains)
            if trains and parameter.dtype != torch.float32:
                parameter.data = parameter.data.float()
        chosen = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        assert chosen, f"stage {self.name}: nothing matches {self.pattern()}"
        return chosen

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 where the configuration asks for it."""
        device = self.contexts.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.config.wants_bf16(device) else nullcontext()

    # Shared by the stages with a flow loss

    @staticmethod
    def add(parts: dict[str, Tensor], name: str, value: Tensor, share: float = 1.0) -> None:
        """Adds a share of a term."""
        parts[name] = parts[name] + share * value if name in parts else share * value

    def dropped(self, records: Sequence[Record], draws: Draws) -> list[str]:
        """For each record the text that replaces its conversation (`data.drop`), or "" where it is kept."""
        prompts = self.config.data.drop_prompts
        hit = (draws.uniform("drop") < self.config.data.drop).tolist()
        return [
            prompts[(draws.step + draws.first + i) % len(prompts)] if hit[i] and r.output_image is not None else ""
            for i, r in enumerate(records)
        ]

    def image_batches(
        self, records: Sequence[Record], draws: Draws, make: Callable[[Record, str], Context]
    ) -> list[ImageBatch]:
        """Batches of the records that have an image: one with latents of a reference image, one without.

        `make(record, dropped)` builds the conversation; dropped is the text that stands for "no condition", or "".
        A reference adds many tokens, so padding the others to its length would dominate the cost.
        """
        rows = [i for i, r in enumerate(records) if r.output_image is not None]
        if not rows:
            return []
        dropped = self.dropped(records, draws)
        own = StepCounts(images=len(rows))
        made = {i: make(records[i], dropped[i]) for i in rows}
        latents = dict(zip(rows, self.contexts.latents.targets([records[i].output_image for i in rows]), strict=True))
        times, noise = draws.times(), draws.noise(tuple(latents[rows[0]].shape))
        device = self.contexts.device
        # Several processes must make the same calls of a sharded model, so there is one batch then.
        groups = [rows]
        if draws.here == draws.count:
            groups = [[i for i in rows if (made[i].latents is None) == alone] for alone in (True, False)]
        return [
            ImageBatch(
                self.contexts.batch([made[i] for i in group]),
                torch.stack([latents[i] for i in group]),
                times[group].to(device),
                noise[group].to(device),
                [dropped[i] or records[i].gt_prompt or records[i].instruction for i in group],
                self.share("images", len(group), own),
            )
            for group in groups
            if group
        ]

    def flow(
        self,
        images: ImageBatch,
        condition: Tensor,
        lengths: Sequence[int],
        spans: Sequence[Sequence[tuple[int, int]]],
        features: list[Tensor] | None = None,
    ) -> Tensor:
        """The flow loss of a condition."""
        x, target = losses.noisy_latents(images.latents, images.noise, images.times)
        velocity = self.model.decoder(condition, x, images.times, lengths, spans, features)
        return losses.flow_loss(velocity, target)

    @torch.no_grad()
    def teacher_features(self, images: ImageBatch, teacher: DiffusionDecoder | None = None) -> list[Tensor]:
        """Feature maps of the frozen decoder fed with its own text path, at the same noise and times.

        teacher: a frozen copy where the decoder itself trains; adapters on it are switched off.
        """
        latents = [c.latents for c in images.batch.contexts]
        decoder = teacher or self.model.decoder
        features: list[Tensor] = []
        with adapters_off(decoder):
            condition, lengths, spans = self.contexts.text_condition(images.captions, latents, decoder)
            x, _ = losses.noisy_latents(images.latents, images.noise, images.times)
            decoder(condition, x, images.times, lengths, spans, features)
        return features


_CHUNK = 2**22  # numbers summed at a time


def digest(module: nn.Module) -> dict[str, int]:
    """A checksum of each tensor, by name: 64 bits that change when any bit of the tensor does."""
    return {name: _checksum(tensor) for name, tensor in module.state_dict().items()}


def _checksum(tensor: Tensor) -> int:
    raw = tensor.detach().contiguous().reshape(-1)
    words = raw.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[raw.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    weights = torch.arange(min(len(words), _CHUNK), device=raw.device) * 2654435762 + 1  # odd: no bit is lost
    for chunk in words.split(_CHUNK):
        total = total * 6364136223846793005 + ((chunk.to(torch.int64) + 1) * weights[: len(chunk)]).sum()
    return int(total)


def base_digest(model: MindOmniModel) -> dict[str, str]:
    """A checksum of each part of a model as it was loaded, adapters left out: "vision", "language", …"""
    parts: dict[str, str] = {}
    for part, module in model.named_children():
        sums = {n.replace(".base_layer.", "."): s for n, s in digest(module).items() if ".lora_" not in n}
        parts[part] = hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:16]
    return parts
