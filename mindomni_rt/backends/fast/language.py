"""Stage `language` on the fast path: prefill, then one captured step a token, the choice of the token included.

The host reads tokens a few steps late, so the device never waits for it; what was computed past the end of the text is
discarded. The step itself writes hidden states to their place. With drafts, a step takes several tokens and those that
the model would have chosen anyway are kept.

Axes: S new tokens, C hidden, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.kernels.decode_attention import decode_attention

from ...inputs.positions import text_tables
from ...model.attention import attention
from ...model.cache import StaticCache
from ...model.language import LanguageModel
from ..base import LanguageRequest
from ..torch.device import on_device
from ..torch.language import sample
from .attention import unplanned
from .graph import GraphPool, Replay, memory_of
from .stack import CacheSlot, FastStack

LAG = 4  # steps that are queued before the first is read


class DecodeState:
    """Static buffers of one capacity and the graphs over them. `model.layers` is the stack given beside it."""

    def __init__(
        self, model: LanguageModel, stack: FastStack, capacity: int, device: str, pool: GraphPool | None = None
    ) -> None:
        self._model, self._stack, self.device, self._pool = model, stack, device, pool
        config, dtype = model.config.stack, model.embed_tokens.weight.dtype
        self.capacity = capacity
        self.cache = StaticCache(config, capacity, 1, dtype, device)
        self.hidden = torch.zeros(1, capacity, config.hidden_size, dtype=dtype, device=device)
        self.cos, self.sin = (torch.zeros(capacity, config.head_dim // 2, device=device) for _ in range(2))
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(capacity, dtype=torch.float64, device=device)
        self.seen = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.penalty = torch.ones((), dtype=torch.float32, device=device)
        self.temperature = torch.ones((), dtype=torch.float64, device=device)
        self._slot = CacheSlot(self.cache.keys, self.cache.values, self.start)
        self._order = torch.arange(model.config.vocab_size, device=device)
        self._graphs: dict[tuple[int, bool], Replay] = {}
        self._inputs: dict[int, Tensor] = {}

    def drop_graphs(self) -> None:
        """Nothing is to run over these buffers again. Graphs hold them and they hold graphs, so one lets go first."""
        self._graphs.clear()

    def inputs(self, tokens: int) -> Tensor:
        """The buffer (1, S) of the tokens that a step takes."""
        if tokens not in self._inputs:
            self._inputs[tokens] = torch.zeros(1, tokens, dtype=torch.int64, device=self.device)
        return self._inputs[tokens]

    def choose(self, logits: Tensor, index: Tensor, sampled: bool) -> Tensor:
        """The next token (1,) from logits (V,); index (1,) of its uniform.

        `sampling.random.choose_token` on the device, so that a captured graph holds the choice.
        """
        scores = logits.float()
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        scores = torch.where(self.seen, penalised, scores)
        if not sampled:
            # argmax leaves open which of equal scores it names (they are common in 16 bits); the first is meant.
            first = torch.where(scores == scores.max(), self._order, len(self._order))
            return first.min().view(1)
        return sample(scores, self.temperature, self.uniforms[index])

    def prefill(self, request: LanguageRequest) -> Tensor:
        """The prompt's hidden states into their place; the last row's logits (V,)."""
        model, stack = self._model, self._model.config.stack
        count = len(request.token_ids)
        tables = text_tables(stack, request.positions, request.next_position, self.capacity - count)
        self.cos.copy_(torch.from_numpy(tables[0]))
        self.sin.copy_(torch.from_numpy(tables[1]))
        ids = torch.from_numpy(np.asarray(request.token_ids, np.int64)).to(self.device)
        self.seen.zero_()
        self.seen[ids] = True
        self.penalty.fill_(request.repetition_penalty)
        self.temperature.fill_(request.temperature or 1.0)
        if len(request.uniforms):
            self.uniforms[: len(request.uniforms)] = torch.from_numpy(request.uniforms).to(self.device)
        self.start.zero_()
        self.count.zero_()

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k[:, :, :count], v[:, :, :count], causal=True)

        x = model.embed(ids[None], request.image_embeds)
        hidden = self._stack(x, self.cos, self.sin, attend, cache=self._slot)
        self.hidden[:, :count] = hidden
        self.start.fill_(count)
        return model.logits(hidden[:, -1])[0]

    def _forward(self, ids: Tensor) -> Tensor:
        """Tokens (1, S) at the current place: hidden states to their place, logits (S, V). The place stays."""
        tokens, length = ids.shape[1], self.start + ids.shape[1]

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return decode_attention(q, k, v, length, impl=self._stack.impl)

        hidden = self._stack(self._model.embed_tokens(ids), self.cos, self.sin, attend, cache=self._slot)
        slots = self.start.long() + torch.arange(tokens, device=hidden.device)
        self.hidden.index_copy_(1, slots, hidden)
        return self._model.logits(hidden)[0]

    def take(self, token: Tensor) -> None:
        """Notes a token (1,) as chosen."""
        self.chosen.index_copy_(0, self.count, token)
        self.seen.index_fill_(0, token, True)
        self.count += 1

    def one(self, sampled: bool) -> None:
        """One token: forward at the last chosen one, choose, note."""
        ids = self.chosen.index_select(0, self.count - 1).view(1, 1)
        token = self.choose(self._forward(ids)[0], self.count, sampled)
        self.take(token)
        self.start += 1

    def several(self, tokens: int, sampled: bool) -> None:
        """A guess of S-1 tokens after the last chosen one: what the model chooses at each place, if all before hold.

        Leaves the choices in `chosen` from `count` on; nothing counts until `keep`.
        """
        ids = self.inputs(tokens)
        logits = self._forward(ids)
        before = self.seen.clone()
        for place in range(tokens):
            if place:
                self.seen.index_fill_(0, ids[0, place : place + 1], True)
            index = self.count + place
            self.chosen.index_copy_(0, index, self.choose(logits[place], index, sampled))
        self.seen.copy_(before)

    def keep(self, chosen: list[int]) -> None:
        """Counts tokens of the last guess: the accepted ones and the one after them."""
        self.seen.index_fill_(0, torch.tensor(chosen, device=self.seen.device), True)
        self.count += len(chosen)
        self.start += len(chosen)

    def replay(self, tokens: int, sampled: bool) -> Replay:
        """The graph of `one` or `several`. Capturing runs it, so the state is put back."""
        key = (tokens, sampled)
        if key not in self._graphs:
            graph = Replay(
                (lambda: self.one(sampled)) if tokens == 1 else (lambda: self.several(tokens, sampled)),
                self.device,
                self._pool,
            )
            state = (self.start, self.count, self.seen, self.chosen)
            saved = [t.clone() for t in state]
            graph.prepare()
            for tensor, old in zip(state, saved, strict=True):
                tensor.copy_(old)
            self._graphs[key] = graph
        return self._graphs[key]


class FastLanguageSession:
    """`LanguageSession` over a `DecodeState`, which the next session uses again.

    meanwhile: called once, when the first replay is queued. A capture waits for the device, so what is to run beside
    the text begins after it.
    """

    lag = LAG

    @torch.inference_mode()
    def __init__(
        self, state: DecodeState, request: LanguageRequest, meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        self.request, self.room, self._state = request, request.max_new_tokens, state
        self._meanwhile: Callable[[], None] | None = meanwhile
        self.device = state.device
        self._prompt, self._sampled = len(request.token_ids), request.temperature > 0
        self._counted = 0  # tokens that the device counts as text
        self._chosen: list[int] = []
        self._cuda = state.chosen.is_cuda
        self._copies = torch.zeros(self.room + request.draft_tokens, dtype=torch.int64, pin_memory=self._cuda)
        self._unread: deque[tuple[slice, torch.cuda.Event | None]] = deque()
        with memory_of("language"), unplanned():
            self._logits: Tensor | None = state.prefill(request)

    @on_device
    @torch.inference_mode()
    def advance(self, draft: Sequence[int] = ()) -> None:
        state, count = self._state, 1 + len(draft)
        if self._logits is not None:
            state.take(state.choose(self._logits, state.count, self._sampled))
            self._logits = None
        else:
            if draft:
                state.inputs(count).copy_(torch.tensor([[self._chosen[-1], *draft]]))
            state.replay(count, self._sampled)()
            if self._meanwhile:
                self._meanwhile()
                self._meanwhile = None
        place = slice(self._counted, self._counted + count)
        self._copies[place].copy_(state.chosen[place], non_blocking=True)
        event = torch.cuda.Event() if self._cuda else None
        if event is not None:
            event.record()
        self._unread.append((place, event))
        self._counted += 1 if not draft else 0

    @on_device
    def read(self) -> list[int]:
        place, event = self._unread.popleft()
        if event is not None:
            event.synchronize()
        self._chosen = self._copies[place].tolist()
        return self._chosen

    @on_device
    @torch.inference_mode()
    def keep(self, count: int) -> None:
        drafted, self._chosen = len(self._chosen) > 1, self._chosen[:count]
        if drafted:
            self._state.keep(self._chosen)
            self._counted += count

    @on_device
    def hidden(self, written: int = 0) -> Tensor:
        """A copy: the buffer serves the next request."""
        with torch.inference_mode():
            return self._state.hidden[:, : self._prompt + max(written - 1, 0)].clone()
