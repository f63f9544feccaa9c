"""Think, connect, paint, decode: the one place where the six stages meet.

| stage       | in → out                                                          |
| `vision`    | image patches → image embeddings                                  |
| `language`  | tokens (+ image embeddings) → next tokens, pre-norm hidden states |
| `connector` | hidden states → condition                                         |
| `prefix`    | condition + the time tokens of all steps → K/V of both            |
| `denoiser`  | latents, K/V → velocity                                           |
| `vae`       | latents → pixels                                                  |
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray

from .adapters import AdapterCalls
from .backends.base import (
    OPTIONAL,
    PROMPT_BATCHES,
    Array,
    Backend,
    Buffered,
    DenoiseRequest,
    LanguageRequest,
    Prefix,
)
from .batch import as_requests, groups
from .calls import Calls
from .checkpoint.config import RecommendedConfig
from .clock import Clock
from .errors import BadCheckpointError, BadRequestError, not_finite
from .events import AnswerEvent, Event, FinishReason, GenerationResult, ImageEvent, Round, StepEvent, TextEvent
from .inputs.images import ImagePatches, open_image, prepare_image, to_pil, vae_pixels
from .inputs.positions import mrope_positions
from .inputs.prompts import (
    CASCADE_SEPARATOR,
    LATENT_TOKEN,
    Chat,
    Message,
    TextStream,
    ThoughtParser,
    cascade_prompt,
    generate_messages,
    split_thought,
    understand_messages,
)
from .memory.fit import Fit
from .memory.guard import named_memory_errors
from .memory.layers import Workload, parameters
from .memory.planner import gigabytes
from .request import (
    CompleteRequest,
    GenerateOptions,
    Request,
    UnderstandRequest,
    as_request,
    check_cancel,
    complete,
)
from .sampling.decode import generate_tokens
from .sampling.denoise import check, denoise
from .sampling.random import batch_noise, uniforms
from .sampling.schedule import timesteps
from .stages import PARTS, STAGES
from .turn import Turn

logger = logging.getLogger(__name__)
NEGATIVE_CACHE = 2  # prefixes kept; one is 0.4 MB a token at full size in 16 bits


@dataclass
class Thought:
    """Where thinking led: text, token ids, and the hidden states that the connector takes."""

    text: str
    hidden: Array
    token_ids: list[int] = field(default_factory=list)
    image_latents: list[tuple[int, Array]] = field(default_factory=list)
    rounds: tuple[Round, ...] = ()


@dataclass(frozen=True)
class _Job:
    """One request of a batch on its way: its place, and where its thinking led."""

    place: int
    request: CompleteRequest
    seed: int
    thought: Thought
    guided: Prefix

    def latents(self) -> NDArray[np.float32]:
        """The noise to start from."""
        if self.request.latents is not None:
            return self.request.latents
        return batch_noise(self.seed, self.request.num_images, self.request.latent_shape[1:])


def _at(place: int, events: Generator[Event, None, Thought]) -> Generator[Event, None, Thought]:
    """The events of the prompt at a place of a list."""
    try:
        while True:
            event = next(events)
            yield replace(event, prompt=place) if isinstance(event, TextEvent) else event
    except StopIteration as end:
        thought: Thought = end.value
        return thought
    finally:
        events.close()


def _work(group: Sequence[CompleteRequest]) -> Workload:
    """The sizes of requests of equal settings that are painted together. Lengths of texts are guessed."""
    first = group[0]
    return Workload(
        height=first.height, width=first.width, steps=first.num_inference_steps,
        images=sum(request.num_images for request in group), guidance=first.guidance_scale != 1,
    )  # fmt: skip


def _with_picture(sizes: Workload, patches: ImagePatches) -> Workload:
    """Sizes with a picture's patches, and its tokens beside those that are guessed of the text."""
    rows, columns = patches.grid[1:]
    return replace(sizes, patches=(rows, columns), prompt_tokens=sizes.prompt_tokens + patches.tokens)


def _with_text(sizes: Workload, language: LanguageRequest) -> Workload:
    """Sizes with a prompt's length, and room for the text, of which a guess is written."""
    most = language.max_new_tokens + language.draft_tokens
    return replace(
        sizes, prompt_tokens=len(language.token_ids), new_tokens=min(most, sizes.new_tokens), max_new_tokens=most
    )


def _with_thoughts(group: Sequence[CompleteRequest], thoughts: Sequence[Thought]) -> Workload:
    """Sizes once the texts are written; their buffers stay as they were made."""
    lengths = [thought.hidden.shape[1] for thought in thoughts]
    prompts = [t.rounds[-1].prompt_tokens if t.rounds else n for t, n in zip(thoughts, lengths, strict=True)]
    rooms = [one.draft_tokens + (one.max_new_tokens if one.think else 0) for one in group]
    return replace(
        _work(group), prompt_tokens=max(prompts), new_tokens=max(lengths) - max(prompts) + 1, max_new_tokens=max(rooms)
    )


def _short(count: int) -> str:
    """A number of parameters: 12.5 B, 2.4 M."""
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _with_named_errors(events: Generator[Event, None, None]) -> Generator[Event, None, None]:
    advice = "Choose a smaller size or fewer images, close other programs, or load a bundle in int4"
    with named_memory_errors("answering this request", advice):
        yield from events


class Pipeline(Calls, AdapterCalls):
    """A loaded model. `mindomni_rt.load` makes one; `stream` and the calls that wait for it use it.

    The steps `think`, `connect`, `paint` and `decode` are public and usable alone. Requests of several threads wait for
    each other, because the model's buffers are shared; the steps used alone do not. `with` closes the pipeline.
    """

    def __init__(self, backend: Backend, folder: Path, fit: Fit | None = None) -> None:
        """fit: how the model was loaded, which says what fits into the memory beside it; None does not look."""
        self.backend, self._fit = backend, fit
        self.config, self._model = backend.config, folder.resolve().name
        self.chat = Chat(folder / "mllm" if (folder / "mllm").is_dir() else folder)
        self._negatives: OrderedDict[tuple[Any, ...], Prefix] = OrderedDict()
        self._turn = Turn()

    def __repr__(self) -> str:
        """Model and size, where and in what it computes, and what of it stays loaded."""
        size = sum(part.total for part in parameters(self.config).values())
        device = getattr(self.backend, "device", "cpu")
        options = getattr(self.backend, "options", None)  # of the fast path
        precision = getattr(options, "precision", None)
        stays = self._fit.stays if self._fit else getattr(options, "resident", None)
        whole = stays is None or set(stays) in (set(STAGES), set(PARTS))
        plan = "all loaded" if whole else f"stays loaded: {', '.join(stays or ()) or 'nothing'}"
        if self._fit and self._fit.peak:
            plan += f", predicted peak {gigabytes(self._fit.peak)}"
        return (
            f"<Pipeline {self._model} ({_short(size)} parameters): {self.backend.name} on {device}, "
            f"{precision or self.backend.dtype}; {plan}>"
        )

    def stream(
        self,
        request: str | Request | UnderstandRequest,
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """A request as events: text while it is written, each denoising step, then the image or the answer.

        request: a prompt with the fields of `Request` as options, a `Request`, or an `UnderstandRequest`. Setting
        `cancel` from another thread ends the request at the next token or step with GenerationCancelled; closing the
        generator ends it too. Mistakes in the request raise BadRequestError at the call, before the first event.
        """
        if isinstance(request, UnderstandRequest):
            asked = as_request(UnderstandRequest, request, options)
            return self._events(self._understand(asked, cancel), cancel)
        return self._painting([as_request(Request, request, options)], cancel)

    def stream_batch(
        self,
        prompts: Sequence[str | Request],
        *,
        cancel: threading.Event | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Generator[Event, None, None]:
        """`generate_batch` as events. `TextEvent` and `ImageEvent` tell the place of their prompt."""
        return self._painting(as_requests(prompts, options), cancel)

    def _painting(self, asked: Sequence[Request], cancel: threading.Event | None) -> Generator[Event, None, None]:
        """Checks what only this model can: its options and its memory."""
        requests = [self.complete(one) for one in asked]
        lacking = sorted({n for one in requests for n in one.optional() if n not in self.backend.capabilities})
        if lacking:
            raise BadRequestError(
                f"{', '.join(lacking)}: backend {self.backend.name!r} on this device has no such option; "
                f"{OPTIONAL[lacking[0]]}"
            )
        if self._fit is not None:
            for one in requests:
                self._fit.check(_work([one]))
        return self._events(self._generate(requests, cancel), cancel)

    def _events(
        self, events: Generator[Event, None, None], cancel: threading.Event | None
    ) -> Generator[Event, None, None]:
        return self._turn.during(_with_named_errors(events), check_cancel(cancel))

    @contextmanager
    def _changed_weights(self) -> Iterator[None]:
        with self._turn.alone():
            try:
                yield
            finally:
                self._negatives.clear()

    @property
    def recommended(self) -> RecommendedConfig:
        """The model's own size, steps and guidance: what a request takes where it leaves them unset."""
        return self.config.recommended

    def complete(self, request: Request) -> CompleteRequest:
        """The request with what it leaves unset filled in from `recommended`; a complete one is returned as it is.

        A size outside of what the model was trained for is logged.
        """
        return complete(request, self.recommended)

    def close(self) -> None:
        """Frees the model's memory once the running request has ended. Later requests raise BadRequestError."""
        with self._turn.last():
            self._negatives.clear()
            self.backend.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _generate(
        self, requests: Sequence[CompleteRequest], cancel: threading.Event | None
    ) -> Generator[Event, None, None]:
        fit, together = self._fit, PROMPT_BATCHES in self.backend.capabilities
        for group in groups(requests, together, lambda some: fit is None or fit.fits(_work(some))):
            yield from self._paint_group(group, cancel)

    def _paint_group(
        self, group: Sequence[tuple[int, CompleteRequest]], cancel: threading.Event | None
    ) -> Generator[Event, None, None]:
        """Requests of equal settings: each thinks by itself, then all are painted in one loop."""
        clock, first = Clock(self.backend), group[0][1]
        if first.guidance_scale != 1:
            self._negative_request(first)  # a negative prompt that is too long is found before any work
        thoughts, seeds = list[Thought](), list[int]()
        for place, request in group:
            seed = request.seed if request.seed is not None else secrets.randbits(32)
            thoughts.append((yield from _at(place, self.think(request, seed=seed, cancel=cancel, clock=clock))))
            seeds.append(seed)
        self._check_memory(_with_thoughts([one for _, one in group], thoughts))
        jobs, unguided = self._connect_all(group, seeds, thoughts, clock)
        each = tuple(job.guided for job in jobs for _ in range(job.request.num_images))
        latents = np.concatenate([job.latents() for job in jobs])
        final = yield from self.paint(
            first, latents, jobs[0].guided if len(jobs) == 1 else each, unguided, cancel=cancel, clock=clock
        )
        pixels = self.decode(final, clock)
        at = 0
        for job in jobs:
            rows = slice(at, at + job.request.num_images)
            at = rows.stop
            own = final if len(jobs) == 1 else final[rows]
            yield ImageEvent(self._result(job, pixels[rows], own, clock), job.place)

    def _result(self, job: _Job, pixels: NDArray[np.float32], latents: Array, clock: Clock) -> GenerationResult:
        request, thought = job.request, job.thought
        last = thought.rounds[-1] if thought.rounds else Round(text=request.prompt, answer=request.prompt)
        return GenerationResult(
            images=to_pil(pixels) if request.output == "pil" else pixels,
            text=thought.text,
            thinking=last.thinking,
            answer=last.answer,
            finish_reason=last.finish_reason,
            rounds=thought.rounds,
            seed=None if request.latents is not None else job.seed,
            timings=clock.report(),
            token_ids=thought.token_ids,
            latents=self.backend.numpy(latents),
            settings={
                **request.settings(),
                "seed": job.seed,
                "backend": self.backend.name,
                "dtype": self.backend.dtype,
                **({"adapters": self.adapters} if self.adapters else {}),
            },
        )

    def think(
        self, request: Request, *, seed: int = 0, cancel: threading.Event | None = None, clock: Clock | None = None
    ) -> Generator[Event, None, Thought]:
        """Prompt (and image) → text and hidden states. Without thinking, one prefill and no text."""
        request, clock = self.complete(request), clock or Clock(self.backend)
        sizes, patches, pixels = self._picture(request, clock)
        embeds = latents = None
        if patches is not None:
            with clock("vision"):
                embeds = self._finite("vision", self.backend.vision(patches))
        if pixels is not None:
            with clock("vae"):
                latents = self.backend.vae_encode(pixels)
        latent_tokens = 0 if pixels is None else self._tokens_of(*pixels.shape[2:])
        rounds: list[Round] = []
        prompt = request.prompt
        for index in range(2 if request.cascade else 1):
            messages = generate_messages(prompt, request.think, patches is not None, latent_tokens)
            tokens = request.max_new_tokens if request.think else 0
            language = self.language_request(
                messages, patches, embeds, tokens, request.temperature, seed, cancel, request.draft_tokens, True
            )
            self._check_memory(_with_text(sizes, language))
            written, hidden = yield from self._write(language, index, clock)
            rounds += [written] if request.think else []
            prompt = cascade_prompt(written.text) or prompt
        spans = []
        if latents is not None:
            pad = self.chat.token_id(LATENT_TOKEN)
            spans = [(int(np.argmax(language.token_ids == pad)), latents)]
        text = CASCADE_SEPARATOR.join(r.text for r in rounds) if request.think else request.prompt
        return Thought(text, hidden, [t for r in rounds for t in r.token_ids], spans, tuple(rounds))

    def _check_memory(self, sizes: Workload) -> None:
        """Raises OutOfMemoryError before the work of a request that, as much of it as is known, does not fit. Buffers
        that earlier ones left go where it does not fit beside them."""
        if self._fit is None:
            return
        self._fit.check(sizes)
        if isinstance(self.backend, Buffered) and not self._fit.fits(sizes, self.backend.kept()):
            logger.info("buffers of earlier requests make room for this one")
            self.backend.release()

    def _picture(
        self, request: CompleteRequest, clock: Clock
    ) -> tuple[Workload, ImagePatches | None, NDArray[np.float32] | None]:
        """The request's sizes, and its picture as the vision tower and the VAE take it; memory is checked for both."""
        sizes = _work([request])
        if request.image is None:
            return sizes, None, None
        with clock("vision"):
            picture = open_image(request.image)
            patches = prepare_image(picture, self.config, request.max_image_tokens)
        sizes, pixels = _with_picture(sizes, patches), None
        if (request.edit_features or self.config.edit_features) == "vit+vae":
            if self.chat.token_id(LATENT_TOKEN) is None:
                raise BadRequestError("this checkpoint knows no VAE features; use edit_features='vit'")
            with clock("vae"):
                pixels = vae_pixels(picture, max_tokens=self.config.language.max_positions // 2)
            height, width = pixels.shape[2:]
            tokens = sizes.prompt_tokens + self._tokens_of(height, width)
            sizes = replace(sizes, encoded=(height, width), prompt_tokens=tokens)
        self._check_memory(sizes)
        return sizes, patches, pixels

    def _write(
        self, language: LanguageRequest, index: int, clock: Clock
    ) -> Generator[Event, None, tuple[Round, Array]]:
        """Runs stage `language` to its end and yields each piece of text. Returns the round and its hidden states."""
        stream, parser = TextStream(self.chat), ThoughtParser()
        tokens: list[int] = []
        with clock("language"):
            session = self.backend.language(language)
            for token in generate_tokens(session):
                if not tokens:
                    clock.mark("first_token")
                tokens.append(token)
                piece = "" if token in language.eos_token_ids else stream.push(token)
                for kind, text in parser.push(piece):
                    with clock.paused():
                        yield TextEvent(text, kind, index)
            hidden = session.hidden(len(tokens))
            self._finite("language", hidden)
        cut = bool(tokens) and tokens[-1] not in language.eos_token_ids
        if cut:
            logger.warning("text was cut at max_new_tokens = %d, inside its %s", language.max_new_tokens, parser.kind)
        for kind, text in parser.push(stream.finish()) + parser.finish():
            yield TextEvent(text, kind, index)
        thinking, answer = split_thought(stream.text)
        reason: FinishReason = "length" if cut else "stop"
        written = Round(
            text=stream.text,
            thinking=thinking,
            answer=answer,
            finish_reason=reason,
            token_ids=tokens,
            prompt_tokens=len(language.token_ids),
        )
        return written, hidden

    def connect(self, thought: Thought, request: Request, clock: Clock | None = None) -> Prefix:
        """Hidden states → condition → K/V of the guided branch."""
        request, clock = self.complete(request), clock or Clock(self.backend)
        condition = self._condition(clock, thought.hidden, thought.image_latents)
        return self._prefix(condition, request, clock, thought.image_latents)

    def connect_negative(self, request: Request, clock: Clock | None = None) -> Prefix:
        """The unguided branch: the negative prompt without thinking or image. Kept across calls."""
        request, clock = self.complete(request), clock or Clock(self.backend)
        hidden = self._negative_hidden(request, clock)
        condition = None if hidden is None else self._condition(clock, hidden)
        return self._negative_prefix(condition, request, clock)

    def _connect_all(
        self,
        group: Sequence[tuple[int, CompleteRequest]],
        seeds: Sequence[int],
        thoughts: Sequence[Thought],
        clock: Clock,
    ) -> tuple[list[_Job], Prefix | None]:
        """`connect` and `connect_negative` stage by stage: of parts that take turns, each is loaded once."""
        first = group[0][1]
        guidance = first.guidance_scale != 1
        hidden = self._negative_hidden(first, clock) if guidance else None
        conditions = [self._condition(clock, thought.hidden, thought.image_latents) for thought in thoughts]
        negative = None if hidden is None else self._condition(clock, hidden)
        jobs = []
        for (place, request), seed, thought, condition in zip(group, seeds, thoughts, conditions, strict=True):
            prefix = self._prefix(condition, request, clock, thought.image_latents)
            jobs.append(_Job(place, request, seed, thought, prefix))
        return jobs, self._negative_prefix(negative, first, clock) if guidance else None

    def _negative_key(self, request: CompleteRequest, tokens: int) -> tuple[Any, ...]:
        """Everything the K/V depend on; LongRoPE's choice of factors is the only trace of the image's size."""
        rope = self.config.decoder.stack.rope
        long = tokens + 1 + self._image_tokens(request) > rope.original_max_positions
        return request.negative_prompt, request.num_inference_steps, long and rope.kind == "longrope"

    def _negative_hidden(self, request: CompleteRequest, clock: Clock) -> Array | None:
        """Hidden states of the negative prompt; None where its prefix is known."""
        language = self._negative_request(request)
        if self._negative_key(request, len(language.token_ids)) in self._negatives:
            return None
        with clock("language"):
            return self.backend.language(language).hidden()

    def _negative_prefix(self, condition: Array | None, request: CompleteRequest, clock: Clock) -> Prefix:
        """The prefix of a condition, kept from here on; of None the one that is known."""
        key = self._negative_key(request, len(self._negative_request(request).token_ids))
        if condition is not None:
            self._negatives[key] = self._prefix(condition, request, clock)
            while len(self._negatives) > NEGATIVE_CACHE:
                self._negatives.popitem(last=False)
        self._negatives.move_to_end(key)
        return self._negatives[key]

    def _condition(self, clock: Clock, hidden: Array, image_latents: Sequence[tuple[int, Array]] = ()) -> Array:
        with clock("connector"):
            return self._finite("connector", self.backend.connector(hidden, image_latents))

    def _negative_request(self, request: Request) -> LanguageRequest:
        return self.language_request(generate_messages(request.negative_prompt, think=False))

    def _finite(self, stage: str, array: Array) -> Array:
        """The array, looked at once: a NaN is reported with the stage that made it, not seen as a black picture."""
        if not self.backend.finite(array):
            raise not_finite(stage, self.backend.dtype)
        return array

    def _prefix(
        self,
        condition: Array,
        request: CompleteRequest,
        clock: Clock,
        image_latents: Sequence[tuple[int, Array]] = (),
    ) -> Prefix:
        times = timesteps(request.num_inference_steps)[:-1]
        patch = self.config.decoder.patch_size
        blocks = [(at, at + x.shape[-2] * x.shape[-1] // patch**2) for at, x in image_latents]
        with clock("prefix"):
            return self.backend.prefix(condition, times, self._image_tokens(request), blocks)

    def paint(
        self,
        request: Request,
        latents: NDArray[np.float32],
        guided: Prefix | tuple[Prefix, ...],
        unguided: Prefix | None,
        *,
        cancel: threading.Event | None = None,
        clock: Clock | None = None,
    ) -> Generator[Event, None, Array]:
        """Noise (n, 4, H/8, W/8) → latents, an event after each step.

        guided: one for all images, or one for each (PROMPT_BATCHES).
        """
        request, clock = self.complete(request), clock or Clock(self.backend)
        loop = DenoiseRequest(
            latents=np.ascontiguousarray(latents, np.float32),
            times=timesteps(request.num_inference_steps),
            guided=guided,
            unguided=unguided,
            guidance_scale=request.guidance_scale,
            first_step=request.first_step,
            guidance_interval=request.guidance_interval,
            solver=request.solver,
            step_cache=request.step_cache,
            cancel=cancel,
        )
        with clock("denoiser"):
            for state in denoise(self.backend, loop):
                with clock.paused():
                    preview = None
                    wanted = request.preview_every and state.step % request.preview_every == 0
                    if wanted and state.step < state.total:
                        check(cancel)
                        preview = to_pil(self.backend.vae(state.preview))
                    yield StepEvent(state.step, state.total, preview)
            return self._finite("denoiser", state.latents)

    def decode(self, latents: Array, clock: Clock | None = None) -> NDArray[np.float32]:
        """Latents → pixels (n, H, W, 3) in [0, 1]."""
        with (clock or Clock(self.backend))("vae"):
            pixels = self.backend.vae(latents)
        if not np.isfinite(pixels).all():
            raise not_finite("vae", self.backend.dtype)
        return pixels

    def _understand(self, request: UnderstandRequest, cancel: threading.Event | None) -> Generator[Event, None, None]:
        clock = Clock(self.backend)
        prompt, image, max_new_tokens = request.prompt, request.image, request.max_new_tokens
        temperature, seed = request.temperature, request.seed if request.seed is not None else secrets.randbits(32)
        patches = embeds = None
        sizes = Workload(paints=False)
        if image is not None:
            with clock("vision"):
                patches = prepare_image(image, self.config, request.max_image_tokens)
            sizes = _with_picture(sizes, patches)
            self._check_memory(sizes)
            with clock("vision"):
                embeds = self.backend.vision(patches)
        messages = understand_messages(prompt, image is not None)
        language = self.language_request(messages, patches, embeds, max_new_tokens, temperature, seed, cancel)
        self._check_memory(_with_text(sizes, language))
        written, _ = yield from self._write(language, 0, clock)
        settings = {"prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        yield AnswerEvent(
            GenerationResult(
                text=written.text,
                thinking=written.thinking,
                answer=written.answer,
                seed=seed,
                timings=clock.report(),
                token_ids=written.token_ids,
                settings=settings,
                finish_reason=written.finish_reason,
                rounds=(written,),
            )
        )

    def language_request(
        self,
        messages: list[Message],
        patches: ImagePatches | None = None,
        embeds: Array = None,
        max_new_tokens: int = 0,
        temperature: float = 0.0,
        seed: int = 0,
        cancel: threading.Event | None = None,
        draft_tokens: int = 0,
        paints: bool = False,
    ) -> LanguageRequest:
        """A chat as stage `language` takes it: token ids, positions, and the checkpoint's generation settings."""
        ids = np.array(self.chat.encode(messages, [patches.tokens] if patches else []), np.int64)
        language, generation = self.config.language, self.config.generation
        if ids.max() >= language.vocab_size:
            raise BadCheckpointError(
                f"{self.chat.folder}: the tokenizer gives token {ids.max()}, the model has {language.vocab_size}: "
                "they belong to different models"
            )
        room = language.max_positions - len(ids)
        if room < 1:
            raise BadRequestError(
                f"the prompt has {len(ids)} tokens, the model's context {language.max_positions}; shorten it"
            )
        if max_new_tokens > room:
            logger.warning("max_new_tokens cut from %d to the %d that the context leaves", max_new_tokens, room)
            max_new_tokens = room
        grids = [patches.grid] if patches else []
        positions, following = mrope_positions(ids, grids, language, self.config.vision.merge_size)
        return LanguageRequest(
            token_ids=ids,
            positions=positions,
            next_position=following,
            image_embeds=embeds,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.chat.end_tokens(generation.eos_token_ids),
            repetition_penalty=generation.repetition_penalty,
            temperature=temperature,
            uniforms=uniforms(seed, max_new_tokens) if temperature > 0 else np.zeros(0),
            draft_tokens=draft_tokens,
            cancel=cancel,
            paints=paints,
        )

    def _image_tokens(self, request: CompleteRequest) -> int:
        return self._tokens_of(request.height, request.width)

    def _tokens_of(self, height: int, width: int) -> int:
        """The decoder's tokens of a picture in pixels."""
        side = self.config.vae.downscale * self.config.decoder.patch_size
        return (height // side) * (width // side)
