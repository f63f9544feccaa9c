"""Stage 3: reinforcement learning of the MLLM. Connector, decoder and VAE are frozen.

For each prompt, G thoughts are sampled, an image is generated from each, and rewards are compared within the group.
The loss is

    clipped objective + beta_text · D_T + beta_image · D_I

with D_T an estimate of the KL of tokens (k3) and D_I the feature KL between the frozen decoder under the policy's
condition and under the reference's, both on pure noise at a random time of the sampler's grid. The reference is the
model with its adapters off (a frozen copy without adapters). The image only decides the reward: no gradient flows
through the sampler.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindomni_rt.inputs.prompts import DEFAULT_NEGATIVE
from mindomni_rt.model.language import LanguageModel
from mindomni_rt.model.mindomni import MindOmniModel
from mindomni_rt.sampling.schedule import timesteps

from ..config import Config
from . import losses, rollouts
from .adapters import adapters_off, add_adapters
from .base import Draws, LossTerms, Sample, Stage
from .contexts import Batch, Context, Contexts

if TYPE_CHECKING:
    from ..data.record import Record
    from .rewards import Rollout

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Reward = Callable[[Sequence["Rollout"]], NDArray[Any]]


@dataclass(frozen=True)
class Replay:
    """Plain captions that enter D_I too (ours), with their noise and times."""

    batch: Batch
    noise: Tensor
    times: Tensor


@dataclass
class RolloutBatch:
    """Rollouts of a micro-batch: conversations without repetition, labels, advantages, and the reference's values.

    Axes: U distinct conversations, B rollouts, L tokens.
    """

    batch: Batch  # of U
    rows: list[int]  # (B,): each rollout's conversation
    mask: Tensor  # (B, L): True where the policy chose the next token
    labels: Tensor  # (B, L)
    advantages: Tensor  # (B,)
    reference_log_probs: Tensor  # (B, L)
    noise: Tensor  # (U, 4, h, w)
    times: Tensor  # (U,)
    reference_maps: list[Tensor]  # features of all maps, or the one velocity
    replay: Replay | None
    old_log_probs: Tensor | None = None
    figures: dict[str, float] = field(default_factory=dict)
    scored: list[Rollout] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)


class Rgpo(Stage):
    """Reasoning generation policy optimization."""

    name: ClassVar[str] = "rgpo"

    def __init__(
        self, model: MindOmniModel, contexts: Contexts, config: Config, rewards: Mapping[str, Reward] | None = None
    ) -> None:
        super().__init__(model, contexts, config)
        self.updates = config.rgpo.updates
        own, asked = model.config.recommended, config.rgpo
        self.image_steps = own.num_inference_steps if asked.image_steps is None else asked.image_steps
        self.guidance = own.guidance_scale if asked.guidance is None else asked.guidance
        self.rewards = dict(rewards or {})
        if config.lora.rank:
            add_adapters(model.language.layers, config.lora, config.lora.rank, LORA_TARGETS, config.seed)
        full = copy.deepcopy(model.language).requires_grad_(False) if not config.lora.rank else None
        self.__dict__["reference"] = full  # outside the module tree: no state of ours

    def pattern(self) -> str:
        return r"language\..*\.lora_[AB]\..*" if self.config.lora.rank else r"language\..*"

    # Rollouts

    @torch.no_grad()
    def prepare(self, records: Sequence[Record], draws: Draws) -> RolloutBatch:
        settings = self.config.rgpo
        began = time.perf_counter()
        repeated = [r for r in records for _ in range(settings.group)]
        prompts = [
            c
            for r in records
            for c in [self.contexts.paint(r.instruction, think=True, images=r.input_images)] * settings.group
        ]
        with self.autocast():
            written = rollouts.write(
                self.contexts,
                prompts,
                settings.max_new_tokens,
                settings.temperature,
                draws.generator(f"text{draws.first}"),
                repetition_penalty=1.0,  # tokens are sampled from the distribution that the loss differentiates
                forbidden=self.contexts.config.language.image_token_id,
            )
            # As in the pipeline, the condition ends before the last token, whose state is never computed.
            full = [c.extended(w.token_ids[:-1]) for c, w in zip(prompts, written, strict=True)]
            distinct, rows = _distinct(full, written)
            batch = self.contexts.batch(distinct)
            # Equal conversations give equal images from the same noise.
            unpainted, which = (distinct, rows) if settings.same_noise else (full, list(range(len(full))))
            images = self._paint(unpainted, draws)[which]
        painted = time.perf_counter()
        scored = self._rollouts(repeated, written, images)
        figures, totals = self._score(scored)
        advantages = losses.group_advantages(totals, settings.group, settings.scale_advantages)
        rewarded = time.perf_counter()
        labels, mask = self._labels(batch, full, [w.token_ids for w in written])
        noise = draws.noise(self._latent_shape(), "image_kl").to(self.contexts.device)
        grid = torch.from_numpy(timesteps(self.image_steps)[:-1]).float()
        times = grid[(draws.uniform("image_times") * len(grid)).long()].to(self.contexts.device)
        replay = self._replay(records, noise, times)
        asked = [rows.index(row) // settings.group for row in range(len(distinct))]  # each conversation's prompt
        noise, times = noise[asked], times[asked]
        with self.autocast(), self._as_reference():
            states = self.contexts.states(batch)
            log_probs, _ = self._log_probs(states[rows], labels, mask)
            maps = self._maps(batch, states, noise, times, rows) + self._replayed(replay)
        lengths = torch.tensor([float(len(w.token_ids)) for w in written])
        figures |= {
            "completion/length": lengths.mean().item(),
            "completion/longest": lengths.max().item(),
            "completion/truncated": float(np.mean([w.cut for w in written])),
            "completion/distinct": len(distinct) / len(rows),
            "time/rollout": painted - began,
            "time/reward": rewarded - painted,
            "time/reference": time.perf_counter() - rewarded,
        }
        return RolloutBatch(
            batch, rows, mask, labels, advantages.to(self.contexts.device), log_probs, noise, times, maps, replay,
            figures=figures, scored=scored, totals=totals.tolist(),
        )  # fmt: skip

    def _latent_shape(self) -> tuple[int, int, int]:
        side = self.contexts.image_size // self.contexts.config.vae.downscale
        return (self.contexts.config.decoder.latent_channels, side, side)

    def _paint(self, contexts: Sequence[Context], draws: Draws) -> NDArray[np.uint8]:
        settings, count = self.config.rgpo, len(contexts)
        generator = draws.generator("paint" if settings.same_noise else f"paint{draws.first}")
        noise = torch.randn(1 if settings.same_noise else count, *self._latent_shape(), generator=generator)
        negative = self.contexts.paint(DEFAULT_NEGATIVE, think=False) if self.guidance != 1 else None
        latents = rollouts.paint_contexts(
            self.contexts,
            contexts,
            noise.expand(count, -1, -1, -1),
            self.image_steps,
            self.guidance,
            negative,
        )
        return rollouts.decode(self.contexts, latents)

    def _rollouts(
        self, records: Sequence[Record], written: Sequence[rollouts.Completion], images: NDArray[np.uint8]
    ) -> list[Rollout]:
        from .rewards import Rollout

        return [
            Rollout(
                prompt=r.instruction,
                text=self.contexts.chat.decode(w.token_ids),
                image=i,
                gt_prompt=r.gt_prompt or r.instruction,
                token_ids=w.token_ids,
            )
            for r, w, i in zip(records, written, images, strict=True)
        ]

    def _score(self, scored: list[Rollout]) -> tuple[dict[str, float], Tensor]:
        """Figures of every reward, and the weighted sums."""
        settings = self.config.rgpo
        total = torch.zeros(len(scored))
        figures: dict[str, float] = {}
        for name, weight in settings.weighted():
            values = torch.from_numpy(np.asarray(self.rewards[name](scored), np.float32))
            figures[f"reward/{name}"] = values.mean().item()
            figures[f"reward/{name}_std"] = values.std().item()
            total = total + weight * values
        spread = total.view(-1, settings.group).std(1)
        figures |= {
            "reward/total": total.mean().item(),
            "reward/group_std": spread.mean().item(),
            "reward/zero_std_groups": (spread < 1e-6).float().mean().item(),
        }
        return figures, total

    def _labels(
        self, batch: Batch, contexts: Sequence[Context], written: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        labels = batch.token_ids.new_zeros(len(contexts), batch.token_ids.shape[1])
        mask = torch.zeros_like(labels, dtype=torch.bool)
        for row, (context, tokens) in enumerate(zip(contexts, written, strict=True)):
            places = slice(context.prompt - 1, context.prompt - 1 + len(tokens))
            labels[row, places] = torch.tensor(list(tokens), device=labels.device)
            mask[row, places] = True
        return labels, mask

    def samples(self, prepared: RolloutBatch) -> list[Sample]:
        return [
            Sample(i // self.config.rgpo.group, r.prompt, r.text, r.gt_prompt, round(total, 4), r.image)
            for i, (r, total) in enumerate(zip(prepared.scored, prepared.totals, strict=True))
        ]

    # The loss

    def passes(self, prepared: RolloutBatch) -> int:
        return 1 + (prepared.replay is not None)

    def terms(self, prepared: RolloutBatch) -> LossTerms:
        settings, batch = self.config.rgpo, prepared.batch
        with self.autocast():
            states = self.contexts.states(batch)
            log_probs, entropy = self._log_probs(states[prepared.rows], prepared.labels, prepared.mask)
            if prepared.old_log_probs is None:
                prepared.old_log_probs = log_probs.detach()
            policy = losses.clipped_objective(
                log_probs,
                prepared.old_log_probs,
                prepared.advantages,
                prepared.mask,
                settings.clip_low,
                settings.clip_high,
            )
            tokens = losses.kl_tokens(log_probs, prepared.reference_log_probs, settings.text_estimator)
            parts = {"policy": policy.loss, "kl_text": losses.sequence_mean(tokens, prepared.mask)}
            total = parts["policy"] + settings.beta_text * parts["kl_text"]
            weighs = torch.is_grad_enabled() and settings.beta_image > 0
            with torch.set_grad_enabled(weighs):  # logged at weight 0 too
                parts["kl_image"] = self._image_term(prepared, states)
            if settings.beta_image:
                total = total + settings.beta_image * parts["kl_image"]
        figures = {
            **prepared.figures,
            "policy/ratio": policy.ratio.item(),
            "policy/clip_fraction": policy.clip_fraction.item(),
            "policy/entropy": entropy,
        }
        return LossTerms(total, parts, figures)

    def _image_term(self, prepared: RolloutBatch, states: Tensor) -> Tensor:
        maps = self._maps(prepared.batch, states, prepared.noise, prepared.times, prepared.rows)
        maps += self._replayed(prepared.replay)
        if self.config.rgpo.image_term == "features":
            return losses.feature_kl(prepared.reference_maps, maps)
        pairs = zip(maps, prepared.reference_maps, strict=True)
        return torch.stack([losses.flow_loss(a, b) for a, b in pairs]).mean()

    def _maps(self, batch: Batch, states: Tensor, noise: Tensor, times: Tensor, rows: Sequence[int]) -> list[Tensor]:
        """What D_I compares, for each of `rows`: feature maps of all layers, or the velocity, on pure noise."""
        condition, spans = self.contexts.condition(batch, states)
        features: list[Tensor] = []
        velocity = self.model.decoder(condition, noise, times, batch.lengths, spans, features)
        found = features if self.config.rgpo.image_term == "features" else [velocity]
        return [each[list(rows)] for each in found]

    def _log_probs(self, states: Tensor, labels: Tensor, mask: Tensor) -> tuple[Tensor, float]:
        """log p of the chosen tokens (B, L), zero elsewhere, and the mean entropy where they were chosen."""
        logits = losses.without_token(
            self.model.language.logits(states[mask]), self.contexts.config.language.image_token_id
        )
        logits = logits / self.config.rgpo.temperature
        chosen = losses.token_log_probs(logits, labels[mask])
        spread = losses.entropy(logits.detach()).mean().item()
        out = torch.zeros(mask.shape, dtype=chosen.dtype, device=chosen.device)
        return out.masked_scatter(mask, chosen), spread

    def _as_reference(self) -> AbstractContextManager[None]:
        reference: LanguageModel | None = self.__dict__["reference"]
        return adapters_off(self.model.language) if reference is None else _swapped(self.model, reference)

    # Ours: captions in the image KL

    def _replay(self, records: Sequence[Record], noise: Tensor, times: Tensor) -> Replay | None:
        captions = [r.gt_prompt for r in records if r.gt_prompt][: self.config.rgpo.replay]
        if not captions:
            return None
        batch = self.contexts.batch([self.contexts.paint(c, think=False) for c in captions])
        return Replay(batch, noise[: len(captions)], times[: len(captions)])

    def _replayed(self, replay: Replay | None) -> list[Tensor]:
        if replay is None:
            return []
        states, count = self.contexts.states(replay.batch), len(replay.batch.contexts)
        return self._maps(replay.batch, states, replay.noise, replay.times, range(count))


def _distinct(contexts: Sequence[Context], written: Sequence[rollouts.Completion]) -> tuple[list[Context], list[int]]:
    """Conversations without repetition, and for each given one its index among them.

    A confident policy samples the same thought many times; it is computed once. The last token counts although it is
    in no conversation, because it has a probability of its own.
    """
    keys = [(c.token_ids.tobytes(), w.token_ids[-1], id(c.patches)) for c, w in zip(contexts, written, strict=True)]
    place = {key: row for row, key in enumerate(dict.fromkeys(keys))}
    return list(dict(zip(keys, contexts, strict=True)).values()), [place[key] for key in keys]


class _swapped(AbstractContextManager[None]):
    """The model with another language model in its place."""

    def __init__(self, model: MindOmniModel, language: LanguageModel) -> None:
        self.model, self.other = model, language

    def __enter__(self) -> None:
        self.model.language, self.other = self.other, self.model.language

    def __exit__(self, *error: object) -> None:
        self.model.language, self.other = self.other, self.model.language
