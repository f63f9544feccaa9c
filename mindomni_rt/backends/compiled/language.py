"""Stage `language` over a compiled graph: caches that never move, scores that stay on the device.

Greedy choice runs as graph `choose`, and one number for each chosen token comes to the host. Sampling with a
temperature copies the rows of scores and chooses on the host, so that every backend chooses alike.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...bundle.contracts import resolve
from ...checkpoint.config import LanguageConfig
from ...errors import BadRequestError
from ...inputs.positions import text_tables
from ...sampling.random import choose_tokens
from ..base import LanguageRequest
from .graphs import Graphs
from .runner import DeviceArray

logger = logging.getLogger(__name__)


class CompiledLanguageSession:
    """`LanguageSession` over graphs `language` and `choose`."""

    lag = 1

    def __init__(self, graphs: Graphs, request: LanguageRequest) -> None:
        self.request, self._graphs = request, graphs
        self._config: LanguageConfig = graphs.manifest.model.language
        stack, self._prompt = self._config.stack, len(request.token_ids)
        limit = graphs.limit("capacity")
        self.room = self._fitting(limit)
        ahead = max(self.room - 1, 0)
        self._sizes = {"capacity": limit or self._prompt + ahead}
        self._hidden = graphs.empty((1, self._prompt + ahead, stack.hidden_size), graphs.dtype)
        spec = graphs.specs["language"]
        self._in_place = spec.in_place
        self._caches = {
            source: graphs.empty(tuple(resolve(a, self._sizes) for a in spec.tensor(source).axes), graphs.dtype)
            for source, _ in spec.in_place
        }
        rows = 1 + request.draft_tokens
        self._scores = graphs.empty((1, rows, self._config.vocab_size), "float32")
        self._chosen, self._start = graphs.empty((1, rows), "int64"), graphs.empty((1,), "int64")
        self._no_image = graphs.empty((1, stack.hidden_size), graphs.dtype)
        tables = text_tables(stack, request.positions, request.next_position, ahead)
        self._cos, self._sin = (graphs.put(table[None]) for table in tables)
        self._text, self._tokens, self._draft = [int(t) for t in request.token_ids], list[int](), list[int]()
        self._last = self._chosen.rows(0, 1)
        self._places: dict[int, DeviceArray] = {}
        self._seen: list[DeviceArray] = []
        self._prefill()

    def _fitting(self, limit: int | None) -> int:
        """How many tokens may be chosen with a cache of `limit` tokens, None for any."""
        wanted, count = self.request.max_new_tokens, self._prompt
        if limit is not None and count > limit:
            raise BadRequestError(
                f"the prompt has {count} tokens, this bundle's cache holds {limit}; shorten it, lower "
                "max_image_tokens, or build a bundle with a larger profile"
            )
        room = wanted if limit is None else min(wanted, limit - count + 1)
        if room < wanted:
            logger.warning("max_new_tokens cut from %d to the %d that the cache holds", wanted, room)
        return room

    def _prefill(self) -> None:
        request, graphs = self.request, self._graphs
        ids = np.asarray(request.token_ids, np.int64)
        source, images = np.arange(len(ids)), self._no_image
        if request.image_embeds is not None:
            images = request.image_embeds
            places = np.flatnonzero(ids == self._config.image_token_id)
            source[places] = len(ids) + np.arange(len(places))
        self._forward(graphs.put(ids[None]), graphs.put(source), graphs.put(np.array([len(ids) - 1])), images, 0)
        if request.temperature <= 0:
            seen = np.zeros((1, self._config.vocab_size), np.float32)
            seen[0, ids] = 1
            # A draft's choices are noted one buffer further each, so that dropping some is a step back.
            more = request.draft_tokens + 1 if request.draft_tokens else 0
            self._seen = [graphs.put(seen), *(graphs.empty(seen.shape, "float32") for _ in range(more))]
            self._penalty = graphs.put(np.array([request.repetition_penalty], np.float32))

    def _forward(
        self, ids: DeviceArray, source: DeviceArray, scored: DeviceArray, images: DeviceArray, start: int
    ) -> None:
        """Runs tokens (1, S) at places from `start` on: K/V, hidden states and scores land in their memory."""
        count, end = ids.shape[1], start + ids.shape[1]
        self._graphs.runner.write(self._start, np.array([start], np.int64))
        half = self._cos.shape[-1]
        self._graphs.run(
            "language",
            {"sequence": count, "images": images.shape[0], "scores": scored.shape[0], **self._sizes},
            {
                "token_ids": ids,
                "source": source,
                "scored": scored,
                "start": self._start,
                "cos": self._cos.rows(start, end).reshape(count, half),
                "sin": self._sin.rows(start, end).reshape(count, half),
                "image_embeds": images,
                **self._caches,
            },
            {
                "logits": self._scores.rows(0, scored.shape[0]).reshape(scored.shape[0], self._config.vocab_size),
                "hidden": self._hidden.rows(start, end),
                **{new: self._caches[old] for old, new in self._in_place},
            },
        )

    def advance(self, draft: Sequence[int] = ()) -> None:
        self._draft, count = list(draft), 1 + len(draft)
        if len(self._text) > self._prompt:
            ids = self._last
            if self._draft or not self._seen:
                ids = self._graphs.put(np.array([[self._text[-1], *draft]], np.int64))
            places = self._numbers(count)
            self._forward(ids, places, places, self._no_image, len(self._text) - 1)
        if self._seen:
            for row in range(count):
                self._choose(row)

    def _numbers(self, count: int) -> DeviceArray:
        """0, 1, … as an array."""
        if count not in self._places:
            self._places[count] = self._graphs.put(np.arange(count))
        return self._places[count]

    def _choose(self, row: int) -> None:
        """The best token of a row of scores, noted as seen in the next buffer."""
        vocabulary = self._config.vocab_size
        self._graphs.run(
            "choose",
            {},
            {
                "logits": self._scores.rows(row, row + 1).reshape(1, vocabulary),
                "seen": self._seen[row],
                "penalty": self._penalty,
            },
            {"token": self._chosen.rows(row, row + 1), "new_seen": self._seen[(row + 1) % len(self._seen)]},
        )

    def read(self) -> list[int]:
        request, runner, count = self.request, self._graphs.runner, 1 + len(self._draft)
        if self._seen:
            self._tokens = runner.get(self._chosen.rows(0, count))[0].tolist()
        else:
            scores: NDArray[Any] = runner.get(self._scores.rows(0, count))[0]
            uniforms = request.uniforms[len(self._text) - self._prompt :]
            self._tokens = choose_tokens(
                scores, self._text, self._draft, request.repetition_penalty, request.temperature, uniforms
            )
        return self._tokens

    def keep(self, count: int) -> None:
        self._text += self._tokens[:count]
        self._last = self._chosen.rows(count - 1, count)
        turn = count % max(len(self._seen), 1)
        self._seen = self._seen[turn:] + self._seen[:turn]

    def hidden(self, written: int = 0) -> DeviceArray:
        return self._hidden.rows(0, self._prompt + max(written - 1, 0))
