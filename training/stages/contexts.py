"""Records → token ids → MLLM states → condition, in batches: the same conversations that the pipeline builds.

Axes: B batch, L tokens, C hidden, N image tokens. Rows are padded on the right, where causal attention does not look.

A thought ends with `</answer>` and holds no end-of-text token: the pipeline's condition stops there too, because the
state of the last sampled token is never computed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.errors import BadCheckpointError, BadRequestError
from mindomni_rt.inputs.images import ImagePatches, load_image, prepare_image
from mindomni_rt.inputs.positions import image_positions, mrope_positions, rope_tables
from mindomni_rt.inputs.prompts import LATENT_TOKEN, Chat, generate_messages, understand_messages
from mindomni_rt.inputs.vision_layout import vision_layout
from mindomni_rt.model.decoder import DiffusionDecoder
from mindomni_rt.model.mindomni import MindOmniModel

from ..data.latents import LatentCache
from .losses import IGNORE

if TYPE_CHECKING:
    from ..data.record import Record

Ints = NDArray[np.int64]
MAX_IMAGE_TOKENS = 1369
PICTURES = 256  # prepared reference images held in memory


def thought_text(think: str, answer: str) -> str:
    """The text that the model is to write: thought and answer in their tags, as the system prompt asks."""
    return f"<think> {think.strip()} </think><answer> {answer.strip()} </answer>"


@dataclass(frozen=True)
class Context:
    """One conversation: token_ids (L,) of which the first `prompt` were given, positions (3, L), images.

    latents (1, 4, h, w) of the reference image stand in the condition from token `latent_start` on, if given.
    """

    token_ids: Ints
    positions: Ints
    prompt: int
    patches: ImagePatches | None = None
    latents: Tensor | None = None
    latent_start: int = 0

    def extended(self, new: Sequence[int]) -> Context:
        """The same conversation with more text written."""
        first = int(self.positions[0, -1]) + 1
        places = np.broadcast_to(first + np.arange(len(new)), (3, len(new)))
        return Context(
            np.concatenate([self.token_ids, np.asarray(new, np.int64)]),
            np.concatenate([self.positions, places], axis=1),
            self.prompt,
            self.patches,
            self.latents,
            self.latent_start,
        )


@dataclass(frozen=True)
class Batch:
    """Padded contexts on the device: token_ids (B, L), tables (B, L, D/2) for the language model."""

    contexts: Sequence[Context]
    token_ids: Tensor
    cos: Tensor
    sin: Tensor
    lengths: list[int]
    eos: int

    def labels(self) -> Tensor:
        """(B, L): at each place the token that follows, if the model is to write it; IGNORE elsewhere.

        The end of text follows a thought although the context does not hold it.
        """
        labels = torch.full_like(self.token_ids, IGNORE)
        for row, context in enumerate(self.contexts):
            length = len(context.token_ids)
            labels[row, context.prompt - 1 : length - 1] = self.token_ids[row, context.prompt : length]
            if length > context.prompt and int(context.token_ids[-1]) != self.eos:
                labels[row, length - 1] = self.eos
        return labels


class Contexts:
    """Builds conversations for a model, with its chat template, sizes and token ids."""

    def __init__(
        self,
        model: MindOmniModel,
        chat: Chat,
        image_size: int,
        *,
        device: torch.device | str = "cpu",
        cache: str = "",
    ) -> None:
        self.model, self.chat, self.image_size, self.device = model, chat, image_size, torch.device(device)
        self.config: ModelConfig = model.config
        self.latents = LatentCache(model.vae, image_size, self.device, cache)
        self.eos = self.config.generation.eos_token_ids[0]
        self._pictures: dict[str, ImagePatches] = {}
        self._prompt = lru_cache(maxsize=4096)(self._prompt_ids)
        self._encode = lru_cache(maxsize=4096)(self._encode_text)

    # Conversations

    def paint(
        self,
        prompt: str,
        *,
        think: bool,
        images: Sequence[Any] = (),
        thought: str = "",
        edit_features: str | None = None,
    ) -> Context:
        """The conversation that asks for an image, followed by the text that the model wrote (`thought`)."""
        if len(images) > 1:
            raise BadRequestError(f"{len(images)} reference images: the model takes one")
        image = images[0] if images else None
        latents, count = None, 0
        if image is not None and (edit_features or self.config.edit_features) == "vit+vae":
            latents = self.latents.reference(image)
            count = latents.shape[-2] * latents.shape[-1] // self.config.decoder.patch_size**2
        messages = generate_messages(prompt, think, image is not None, count)
        context = self._conversation(messages, image, self._encode(thought) if thought else ())
        if latents is None:
            return context
        pad = self.chat.token_id(LATENT_TOKEN)
        if pad is None:
            raise BadCheckpointError(f"{self.chat.folder}: the tokenizer has no {LATENT_TOKEN}; VAE features need it")
        start = int(np.argmax(context.token_ids == pad))
        return Context(context.token_ids, context.positions, context.prompt, context.patches, latents, start)

    def reference(self, images: Sequence[Any], edit_features: str | None = None) -> Context:
        """Only the latents of a reference image, without a conversation, for the decoder's own text path."""
        wanted = images and (edit_features or self.config.edit_features) == "vit+vae"
        latents = self.latents.reference(images[0]) if wanted else None
        return Context(np.array([self.eos]), np.zeros((3, 1), np.int64), 1, latents=latents)

    def understand(self, prompt: str, images: Sequence[Any] = (), reply: str = "") -> Context:
        """The conversation that asks for words; a reply is followed by the end of text."""
        image = images[0] if images else None
        written = (*self._encode(reply), self.eos) if reply else ()
        return self._conversation(understand_messages(prompt, image is not None), image, written)

    def _conversation(self, messages: list[dict[str, Any]], image: Any, written: Sequence[int]) -> Context:
        patches = self._patches(image) if image is not None else None
        ids = self._prompt(json.dumps(messages), patches.tokens if patches else 0)
        tokens = np.array([*ids, *written], np.int64)
        grids = [patches.grid] if patches else []
        positions, _ = mrope_positions(tokens, grids, self.config.language, self.config.vision.merge_size)
        return Context(tokens, positions, len(ids), patches)

    def _prompt_ids(self, messages: str, image_tokens: int) -> tuple[int, ...]:
        return tuple(self.chat.encode(json.loads(messages), [image_tokens] if image_tokens else []))

    def _patches(self, source: Any) -> ImagePatches:
        image = load_image(source)
        key = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if key not in self._pictures:
            self._pictures[key] = prepare_image(image, self.config, MAX_IMAGE_TOKENS)
            if len(self._pictures) > PICTURES:
                self._pictures.pop(next(iter(self._pictures)))
        return self._pictures[key]

    def label_count(self, record: Record) -> int:
        """Tokens of a record that the MLLM learns to write: reply, or thought and answer, with the end of text."""
        if record.reply:
            return len(self._encode(record.reply)) + 1
        text = written_text(record)
        ids = self._encode(text) if text else ()
        return len(ids) + (ids[-1] != self.eos) if ids else 0

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.chat.tokenizer.encode(text, add_special_tokens=False).ids)

    # Batches

    def batch(self, contexts: Sequence[Context]) -> Batch:
        """Pads on the right and makes the rotary tables."""
        lengths = [len(c.token_ids) for c in contexts]
        longest = max(lengths)
        ids = np.full((len(contexts), longest), self.eos, np.int64)
        places = np.zeros((3, len(contexts), longest), np.int64)
        for row, context in enumerate(contexts):
            ids[row, : lengths[row]] = context.token_ids
            places[:, row, : lengths[row]] = context.positions
        stack = self.config.language.stack
        tables = rope_tables(stack.rope, stack.head_dim, places.reshape(3, -1), longest)
        cos, sin = (torch.from_numpy(t).view(len(contexts), longest, -1).to(self.device) for t in tables)
        return Batch(contexts, torch.from_numpy(ids).to(self.device), cos, sin, lengths, self.eos)

    def embed(self, batch: Batch) -> Tensor:
        """Token embeddings (B, L, C), image tokens of the prompt through the vision tower."""
        images = [c.patches for c in batch.contexts if c.patches is not None]
        x = self.model.language.embed(batch.token_ids)
        if not images:
            return x
        # An image token that the model wrote is a token like others, as in the pipeline.
        prompts = torch.tensor([c.prompt for c in batch.contexts], device=self.device)
        given = torch.arange(x.shape[1], device=self.device) < prompts[:, None]
        places = given & (batch.token_ids == self.config.language.image_token_id)
        return x.masked_scatter(places.unsqueeze(-1), self.vision(images).to(x.dtype))

    def vision(self, images: Sequence[ImagePatches]) -> Tensor:
        """(tokens of all images, C). A tower without layers of full attention takes images of one size together."""
        config = self.config.vision
        dtype = self.model.vision.patch_embed.proj.weight.dtype
        together = not config.full_attention_layers and len({i.grid for i in images}) == 1
        groups = [images] if together else [[i] for i in images]
        outputs = []
        for group in groups:
            layout = vision_layout(config, group[0].grid)
            cos, sin, slots, places, mask = layout.cos, layout.sin, layout.slots, layout.places, layout.mask
            patches = np.concatenate([i.patches for i in group])
            count = len(group)
            if count > 1:  # windows never cross images, so a batch of images is one with more windows
                offset = np.arange(count)[:, None]
                slots = (slots[None] + offset * len(places)).reshape(-1)
                places = (places[None] + offset * len(slots) // count).reshape(-1)
                cos, sin = np.tile(cos, (count, 1)), np.tile(sin, (count, 1))
                mask = np.tile(mask, (count, 1, 1, 1))
            tables = (
                torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for a in (cos, sin, slots, places, mask)
            )
            outputs.append(self.model.vision(torch.from_numpy(patches).to(self.device, dtype), *tables))
        return torch.cat(outputs)

    def states(self, batch: Batch) -> Tensor:
        """MLLM states before the final norm (B, L, C)."""
        return self.model.language(self.embed(batch), batch.cos, batch.sin)

    def condition(self, batch: Batch, states: Tensor) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        """Connector and VAE features of reference images: (B, L, C) for the decoder, and each row's image spans."""
        stack, longest = self.config.connector.stack, states.shape[1]
        tables = rope_tables(stack.rope, stack.head_dim, np.arange(longest), longest)
        cos, sin = (torch.from_numpy(t).to(self.device) for t in tables)
        return self._place_latents(batch, self.model.connector(states, cos, sin))

    def _place_latents(self, batch: Batch, condition: Tensor) -> tuple[Tensor, list[list[tuple[int, int]]]]:
        spans: list[list[tuple[int, int]]] = [[] for _ in batch.contexts]
        rows = [r for r, c in enumerate(batch.contexts) if c.latents is not None]
        if not rows:
            return condition, []
        filled, index = [], []
        for row in rows:
            context = batch.contexts[row]
            assert context.latents is not None
            features = self._input_features(context.latents, self.model.decoder)
            filled.append(features[0])
            start, end = context.latent_start, context.latent_start + features.shape[1]
            index.append(row * condition.shape[1] + torch.arange(start, end, device=self.device))
            spans[row].append((start, end))
        flat = condition.flatten(0, 1).index_copy(0, torch.cat(index), torch.cat(filled).to(condition.dtype))
        return flat.view_as(condition), spans

    def _input_features(self, latents: Tensor, decoder: DiffusionDecoder) -> Tensor:
        if decoder.input_x_embedder is None:
            raise BadCheckpointError("this checkpoint has no input_x_embedder: it takes no VAE features")
        rows, columns = (side // self.config.decoder.patch_size for side in latents.shape[-2:])
        positions = torch.from_numpy(image_positions(self.config.decoder, rows, columns)).to(self.device)
        return decoder.input_features(latents.to(self.device, decoder.input_x_embedder.proj.weight.dtype), positions)

    def text_condition(
        self,
        captions: Sequence[str],
        latents: Sequence[Tensor | None] = (),
        decoder: DiffusionDecoder | None = None,
    ) -> tuple[Tensor, list[int], list[list[tuple[int, int]]]]:
        """The decoder's own text path: (B, L, C), lengths, spans. Features of a reference image come first."""
        decoder = decoder or self.model.decoder
        table = getattr(decoder.llm, "embed_tokens", None)
        if table is None:
            raise BadCheckpointError(
                "the decoder has no llm.embed_tokens: distillation and stage `prior` need OmniGen's own text embedding"
            )
        rows = []
        spans: list[list[tuple[int, int]]] = [[] for _ in captions]
        for row, caption in enumerate(captions):
            ids = torch.tensor(self._encode(caption), device=self.device)
            if int(ids.max()) >= table.num_embeddings:
                raise BadCheckpointError("the tokenizer's ids do not fit the decoder's text embedding")
            x = table(ids)
            given = latents[row] if latents else None
            if given is not None:
                features = self._input_features(given, decoder)[0]
                spans[row].append((0, features.shape[0]))
                x = torch.cat([features.to(x.dtype), x])
            rows.append(x)
        lengths = [len(x) for x in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths, spans


def written_text(record: Record) -> str:
    """The thought and answer of a record as the model is to write them; "" without a thought.

    A record without an answer is a broken thought, and its text is kept as it stands.
    """
    if not record.think_content:
        return ""
    return thought_text(record.think_content, record.answer) if record.answer else f"<think> {record.think_content}"


def context_of(contexts: Contexts, record: Record, *, think: bool, thought: bool) -> Context:
    """A record's conversation: a picture question with its reply, or a request to paint with or without its thought."""
    if record.reply:
        return contexts.understand(record.instruction, record.input_images, record.reply)
    return contexts.paint(
        record.instruction,
        think=think,
        images=record.input_images,
        thought=written_text(record) if thought else "",
        edit_features=record.edit_features or None,
    )
