"""A token embedding that is built on the meta device in no time."""

from __future__ import annotations

from torch import nn


class Embedding(nn.Embedding):
    """As torch's, but meta tensors are left alone: giving them values imports torch's compiler, which takes seconds."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()
