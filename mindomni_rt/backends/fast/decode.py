"""Decoding of the fast path: prefill, then one captured step a token, the choice of the token included.

The host only asks for tokens a few steps late, so the device never waits for it; what was computed past the end of the
text is dropped. Hidden states are written to their place by the step itself. With drafts (`speculative`), a step takes
a guess of several tokens and keeps those that the model would have chosen anyway.

Axes: S new tokens, C hidden, D head_dim, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mindomni_rt.kernels.decode_attention import decode_attention

from ...inputs.positions import rope_tables
from ...model.attention import attention
from ...model.cache import StaticCache
from ...sampling.drafts import PromptLookup, accepted
from ..base import LanguageRequest
from .graph import Replay, memory_of

if TYPE_CHECKING:
    from .backend import TorchCudaBackend

LAG = 4  # tokens the host may be behind
ROUND = 256  # cache capacities are multiples of this, so that requests of like length share graphs


class DecodeState:
    """Static buffers of one capacity and the graphs over them."""

    def __init__(self, backend: TorchCudaBackend, capacity: int) -> None:
        self._backend = backend
        language, device, dtype = backend.config.language, backend.device, backend.torch_dtype
        stack = language.stack
        self.capacity = capacity
        self.cache = StaticCache(stack, capacity, 1, dtype, device)
        self.hidden = torch.zeros(1, capacity, stack.hidden_size, dtype=dtype, device=device)
        self.cos, self.sin = (torch.zeros(capacity, stack.head_dim // 2, device=device) for _ in range(2))
        self.start = torch.zeros(1, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.chosen = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.uniforms = torch.zeros(capacity, dtype=torch.float64, device=device)
        self.seen = torch.zeros(language.vocab_size, dtype=torch.bool, device=device)
        self.penalty = torch.ones((), dtype=torch.float32, device=device)
        self.temperature = torch.ones((), dtype=torch.float64, device=device)
        self._order = torch.arange(language.vocab_size, device=device)
        self._graphs: dict[tuple[int, bool], Replay] = {}
        self._inputs: dict[int, Tensor] = {}

    def inputs(self, tokens: int) -> Tensor:
        """The buffer (1, S) of the tokens that a step takes."""
        if tokens not in self._inputs:
            self._inputs[tokens] = torch.zeros(1, tokens, dtype=torch.int64, device=self._backend.device)
        return self._inputs[tokens]

    def choose(self, logits: Tensor, index: Tensor, drawn: bool) -> Tensor:
        """The next token (1,) from logits (V,), as `sampling.choose_token` does; index (1,) of its uniform."""
        scores = logits.float()
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        scores = torch.where(self.seen, penalised, scores)
        if not drawn:
            # argmax leaves open which of equal scores it names (they are common in 16 bits); the first is meant.
            first = torch.where(scores == scores.max(), self._order, len(self._order))
            return first.min().view(1)
        scaled = scores.double() / self.temperature
        cumulative = (scaled - scaled.max()).exp().cumsum(0)
        target = self.uniforms[index] * cumulative[-1]
        return torch.searchsorted(cumulative, target, right=True).clamp_max(len(cumulative) - 1)

    def prefill(self, request: LanguageRequest) -> Tensor:
        """The prompt's hidden states into their place; the last row's logits (V,)."""
        backend, stack = self._backend, self._backend.config.language.stack
        model, fast = backend.model.language, backend.language_stack
        count = len(request.token_ids)
        following = request.next_position + np.arange(self.capacity - count)
        positions = np.concatenate([request.positions, np.broadcast_to(following, (3, len(following)))], axis=1)
        tables = rope_tables(stack.rope, stack.head_dim, positions, positions.shape[1])
        self.cos.copy_(torch.from_numpy(tables[0]))
        self.sin.copy_(torch.from_numpy(tables[1]))
        ids = torch.from_numpy(np.asarray(request.token_ids, np.int64)).to(backend.device)
        self.seen.zero_()
        self.seen[ids] = True
        self.penalty.fill_(request.repetition_penalty)
        self.temperature.fill_(request.temperature or 1.0)
        if len(request.uniforms):
            self.uniforms[: len(request.uniforms)] = torch.from_numpy(request.uniforms).to(backend.device)
        self.start.zero_()
        self.count.zero_()

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k[:, :, :count], v[:, :, :count], causal=True)

        rotate = fast.into_cache(self.cos, self.sin, self.cache.keys, self.cache.values, self.start)
        hidden = fast(model.embed(ids[None], request.image_embeds), rotate, attend)
        self.hidden[:, :count] = hidden
        self.start.fill_(count)
        return backend.head(hidden[:, -1])[0]

    def _forward(self, ids: Tensor) -> Tensor:
        """Tokens (1, S) at the current place: hidden states to their place, logits (S, V). The place stays."""
        backend, tokens = self._backend, ids.shape[1]
        fast = backend.language_stack
        length = self.start + tokens

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return decode_attention(q, k, v, length, impl=fast.impl)

        rotate = fast.into_cache(self.cos, self.sin, self.cache.keys, self.cache.values, self.start)
        hidden = fast(backend.model.language.embed_tokens(ids), rotate, attend)
        slots = self.start.long() + torch.arange(tokens, device=hidden.device)
        self.hidden.index_copy_(1, slots, hidden)
        return backend.head(hidden)[0]

    def take(self, token: Tensor) -> None:
        """Notes a token (1,) as chosen."""
        self.chosen.index_copy_(0, self.count, token)
        self.seen.index_fill_(0, token, True)
        self.count += 1

    def one(self, drawn: bool) -> None:
        """One token: forward at the last chosen one, choose, note."""
        ids = self.chosen.index_select(0, self.count - 1).view(1, 1)
        token = self.choose(self._forward(ids)[0], self.count, drawn)
        self.take(token)
        self.start += 1

    def several(self, tokens: int, drawn: bool) -> None:
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
            self.chosen.index_copy_(0, index, self.choose(logits[place], index, drawn))
        self.seen.copy_(before)

    def keep(self, chosen: list[int]) -> None:
        """Counts tokens of the last guess: the accepted ones and the one after them."""
        self.seen.index_fill_(0, torch.tensor(chosen, device=self.seen.device), True)
        self.count += len(chosen)
        self.start += len(chosen)

    def replay(self, tokens: int, drawn: bool) -> Replay:
        """The graph of `one` or `several`. Capturing runs it, so the state is put back."""
        key = (tokens, drawn)
        if key not in self._graphs:
            graph = Replay(
                (lambda: self.one(drawn)) if tokens == 1 else (lambda: self.several(tokens, drawn)),
                self._backend.device,
                self._backend.graph_pool,
            )
            state = (self.start, self.count, self.seen, self.chosen)
            saved = [t.clone() for t in state]
            graph.prepare()
            for tensor, old in zip(state, saved, strict=True):
                tensor.copy_(old)
            self._graphs[key] = graph
        return self._graphs[key]


class FastLanguageRun:
    """Iterate for tokens; then `hidden`. See the module's docstring."""

    def __init__(self, backend: TorchCudaBackend, request: LanguageRequest) -> None:
        self._backend, self._request = backend, request
        # A guess may reach past the last token wanted.
        needed = len(request.token_ids) + max(request.max_new_tokens, 1) + request.draft_tokens
        self._state = backend.decode_state(-(-needed // ROUND) * ROUND)
        self._told = 0
        self._ready = False

    @property
    def hidden(self) -> Tensor:
        """Hidden states (1, L, C), a copy: the buffer serves the next request."""
        if not self._ready:
            self._prefill()
        count = len(self._request.token_ids) + max(self._told - 1, 0)
        return self._state.hidden[:, :count].clone()

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        self._backend.residency.need("language")
        with memory_of("language"):
            logits = self._state.prefill(self._request)
        self._ready = True
        return logits

    def __iter__(self) -> Iterator[int]:
        request = self._request
        logits = self._prefill()
        if request.max_new_tokens < 1:
            return
        with torch.inference_mode():
            self._state.take(self._state.choose(logits, self._state.count, request.temperature > 0))
        tokens = self._guesses() if request.draft_tokens else self._steps()
        for token in tokens:
            self._told += 1
            yield token
            if token in request.eos_token_ids or self._told == request.max_new_tokens or request.cancelled():
                return

    def _steps(self) -> Iterator[int]:
        """One token a step; the host reads up to LAG steps late."""
        request, state = self._request, self._state
        cuda = self._backend.device.startswith("cuda")
        copies = torch.zeros(request.max_new_tokens, dtype=torch.int64, pin_memory=cuda)
        waiting: deque[torch.cuda.Event | None] = deque()
        issued = 0
        with torch.inference_mode():
            step = state.replay(1, request.temperature > 0) if request.max_new_tokens > 1 else None
        for index in range(request.max_new_tokens):
            while issued < request.max_new_tokens and len(waiting) < LAG:
                with torch.inference_mode():
                    if issued and step is not None:
                        step()
                    copies[issued : issued + 1].copy_(state.chosen[issued : issued + 1], non_blocking=True)
                waiting.append(torch.cuda.Event() if cuda else None)
                event = waiting[-1]
                if event is not None:
                    event.record()
                issued += 1
            event = waiting.popleft()
            if event is not None:
                event.synchronize()
            yield int(copies[index])

    def _guesses(self) -> Iterator[int]:
        """Steps over drafts; the host has to read each to draft the next."""
        request, state = self._request, self._state
        drawn = request.temperature > 0
        token = int(state.chosen[0])
        lookup = PromptLookup([*map(int, request.token_ids), token])
        yield token
        while True:
            draft = lookup.draft(request.draft_tokens)
            tokens = 1 + len(draft)
            with torch.inference_mode():
                first = int(state.count)
                if draft:
                    state.inputs(tokens).copy_(torch.tensor([[token, *draft]]))
                state.replay(tokens, drawn)()
                new = state.chosen[first : first + tokens].tolist()
                if draft:
                    new = new[: accepted(draft, new) + 1]
                    state.keep(new)
            for token in new:
                lookup.push(token)
                yield token
