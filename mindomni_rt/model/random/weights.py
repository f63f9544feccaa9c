"""The model with random weights in memory, for measurements that do not depend on what it has learned."""

from __future__ import annotations

import torch

from ...checkpoint.config import ModelConfig
from ..mindomni import MindOmniModel


def random_model(
    config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> MindOmniModel:
    """Random weights, norms of ones, made on the device. The same seed gives the same weights on the same device."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device("meta"):
        model = MindOmniModel(config)
    model = model.to(dtype).to_empty(device=device)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and "bias" not in name:
            parameter.data.fill_(1.0)  # norms
        else:
            parameter.data.normal_(0, 0.02, generator=generator)
    return model.eval().requires_grad_(False)
