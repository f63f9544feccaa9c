"""Stage `connector`: a Linear, then causal blocks; language hidden states in, condition out."""

from __future__ import annotations

from torch import Tensor, nn

from ..checkpoint.config import ConnectorConfig
from .attention import attention
from .block import Block


class Connector(nn.ModuleList):
    """Submodule "0" is the Linear, "1", "2", … the blocks: the names of connector.safetensors."""

    def __init__(self, config: ConnectorConfig) -> None:
        linear = nn.Linear(config.input_size, config.stack.hidden_size)
        super().__init__([linear, *(Block(config.stack) for _ in range(config.stack.num_layers))])
        self.config = config

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """hidden (B, L, Cin), tables (L, D/2) -> condition (B, L, C). Right-padded rows are safe: causal, no norm."""
        x = self[0](hidden)
        for block in list(self)[1:]:
            x = block(x, cos, sin, lambda q, k, v: attention(q, k, v, causal=True))
        return x
