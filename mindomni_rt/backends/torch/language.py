"""Stage `language` on PyTorch modules: a static KV cache, hidden states kept in place, tokens chosen on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...inputs.positions import text_tables
from ...model.cache import StaticCache
from ...model.language import LanguageModel
from ...sampling.random import choose_tokens
from ..base import LanguageRequest


def sample(scores: Tensor, temperature: Tensor | float, uniform: Tensor) -> Tensor:
    """Tokens (…, 1) from scores (…, V): softmax(scores / temperature) inverted at `uniform` (…, 1) in [0, 1).

    The same arithmetic as `sampling.random.choose_token`, on the device.
    """
    scaled = scores.double() / temperature
    cumulative = (scaled - scaled.amax(-1, keepdim=True)).exp().cumsum(-1)
    target = uniform * cumulative[..., -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp_max(scores.shape[-1] - 1)


class TorchLanguageSession:
    """The reference implementation of `LanguageSession`: every step is computed at once."""

    lag = 1

    @torch.inference_mode()
    def __init__(self, model: LanguageModel, request: LanguageRequest, device: str) -> None:
        self.request, self.room = request, request.max_new_tokens
        self._model, self._device = model, device
        stack, dtype = model.config.stack, model.norm.weight.dtype
        self._prompt = len(request.token_ids)
        ahead = max(self.room - 1, 0)
        capacity = self._prompt + ahead
        self._hidden = torch.empty(1, capacity, stack.hidden_size, dtype=dtype, device=device)
        self._cache = StaticCache(stack, capacity, 1, dtype, device)
        tables = text_tables(stack, request.positions, request.next_position, ahead)
        self._cos, self._sin = (torch.from_numpy(t).to(device) for t in tables)
        self._text = [int(t) for t in request.token_ids]
        self._chosen: list[int] = []
        self._draft: list[int] = []
        ids = torch.from_numpy(np.asarray(request.token_ids, np.int64)).to(device)[None]
        hidden = self._forward(model.embed(ids, request.image_embeds), 0)
        self._logits = model.logits(hidden[:, -1])

    def _forward(self, x: Tensor, start: int) -> Tensor:
        """Runs embeddings x (1, S, C) at places from `start` on and keeps their hidden states."""
        place = slice(start, start + x.shape[1])
        hidden: Tensor = self._model(x, self._cos[place], self._sin[place], self._cache, start)
        self._hidden[:, place] = hidden
        return hidden

    @torch.inference_mode()
    def advance(self, draft: Sequence[int] = ()) -> None:
        self._draft = list(draft)
        if len(self._text) > self._prompt:
            ids = torch.tensor([[self._text[-1], *draft]], device=self._device)
            hidden = self._forward(self._model.embed(ids), len(self._text) - 1)
            self._logits = self._model.logits(hidden)[0]

    def read(self) -> list[int]:
        request, written = self.request, len(self._text) - self._prompt
        self._chosen = choose_tokens(
            self._logits.float().cpu().numpy(),
            self._text,
            self._draft,
            request.repetition_penalty,
            request.temperature,
            request.uniforms[written:],
        )
        return self._chosen

    def keep(self, count: int) -> None:
        self._text += self._chosen[:count]

    def hidden(self, written: int = 0) -> Tensor:
        return self._hidden[:, : self._prompt + max(written - 1, 0)]
