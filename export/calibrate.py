"""Ranges of activations: the reference model paints for some prompts, and what enters its products is watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mindomni_rt.model.mindomni import MindOmniModel

from .prompts import DEFAULT_PROMPTS
from .quantize import LAYER


def calibrate(
    model: MindOmniModel,
    folder: Path,
    prompts: Sequence[str] = DEFAULT_PROMPTS,
    size: int | None = None,
    steps: int = 4,
    done: Callable[[int, float], None] = lambda *_: None,
) -> dict[str, float]:
    """The largest magnitude at the input of every Linear in the blocks, over runs of the whole pipeline on prompts.

    folder: the checkpoint, for its tokenizer. size: image side in pixels; None is the model's own, 512 at most. steps:
    of the sampler, which spread over all noise levels. done: called with the place of each prompt and its seconds.
    """
    from mindomni_rt.backends.torch.backend import TorchBackend
    from mindomni_rt.pipeline import Pipeline

    pipe = Pipeline(TorchBackend(model), folder)
    height, width = (size or min(side, 512) for side in (pipe.recommended.height, pipe.recommended.width))
    with _watching(model) as ranges:
        for seed, prompt in enumerate(prompts):
            began = time.perf_counter()
            pipe.generate(
                prompt,
                height=height,
                width=width,
                num_inference_steps=steps,
                seed=seed,
                max_new_tokens=64,
                output="numpy",
            )
            done(seed, time.perf_counter() - began)
    return ranges


@contextmanager
def _watching(model: MindOmniModel) -> Iterator[dict[str, float]]:
    import torch

    ranges: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            ranges[name] = max(ranges.get(name, 0.0), float(inputs[0].detach().abs().max()))

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and LAYER.search(f".{name}.weight")
    ]
    try:
        yield ranges
    finally:
        for handle in hooks:
            handle.remove()
