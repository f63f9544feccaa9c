"""Stage `language`: Qwen2.5-VL's causal language model, with hidden states before its final norm."""

from __future__ import annotations

from torch import Tensor, nn

from ..checkpoint.config import LanguageConfig
from .attention import attention
from .block import BlockStack, RMSNorm
from .cache import StaticCache
from .embedding import Embedding


class LanguageModel(nn.Module):
    """Embedding, a stack of blocks, final norm, head. Names follow transformers below `model.`."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        stack = config.stack
        self.embed_tokens = Embedding(config.vocab_size, stack.hidden_size)
        self.layers = BlockStack(stack)
        self.norm = RMSNorm(stack.hidden_size, stack.rms_norm_eps)
        self.lm_head = nn.Linear(stack.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def embed(self, token_ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """token_ids (B, S) -> (B, S, C); places of image_token_id take image_embeds (tokens, C) in order."""
        x = self.embed_tokens(token_ids)
        if image_embeds is not None:
            x = x.masked_scatter((token_ids == self.config.image_token_id).unsqueeze(-1), image_embeds.to(x.dtype))
        return x

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: StaticCache | None = None, start: int = 0) -> Tensor:
        """Hidden states before the final norm (B, S, C) of embeddings x (B, S, C) at places start…start+S-1.

        With a cache, its first `start` tokens are attended to and the new ones stored. Without one (training), the
        sequence is whole; right-padded rows are safe because attention is causal.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if cache is not None:
                k, v = cache.write(layer, k, v, start)
            return attention(q, k, v, causal=True)

        return self.layers(x, cos, sin, attend)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token scores (…, vocab) of pre-norm hidden states (…, C)."""
        return self.lm_head(self.norm(hidden))
