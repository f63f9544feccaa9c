"""`mindomni bench lossy MODEL --precisions`: what rounding costs, alone and with the other lossy options.

The same riddles, seeds and noise for every arm. Besides PSNR and cosine, as in `lossy`, the share of right pictures has
a 95 % interval, and `passes` is how much of the exact run's denoising is still computed: whole passes of one branch
through the decoder, which hold on every machine. Time on this one says nothing, for rounded products run in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mindomni_rt
from mindomni_rt.backends.fast.backend import TorchCudaBackend
from mindomni_rt.backends.fast.stack import FastStack
from mindomni_rt.errors import BadRequestError
from mindomni_rt.memory.precision import Precision, parse_precision
from mindomni_rt.pipeline import Pipeline
from mindomni_rt.scores import Score

from .. import results
from .judge import likeness, riddles, right
from .rounding import rounded

IMAGES = 4  # of a riddle, each with noise of its own: they share a thought and a launch
ALONE = (
    "decoder=int8", "decoder=fp8", "decoder=int4", "decoder=nvfp4", "int8", "int4", "language=int8wo,head=int8wo",
    "language=int4,head=int8wo", "language=nvfp4,head=int8wo", "bfloat16",
)  # fmt: skip
COMBINED = ("float32", "int8", "fp8", "int4")
EXACT: dict[str, Any] = {"num_inference_steps": 50}
OPTIONS: dict[str, dict[str, Any]] = {
    "25 steps, interval 0:0.6, cache 0.1": {
        "num_inference_steps": 25, "solver": "multistep", "guidance_interval": (0.0, 0.6), "step_cache": 0.1,
    },
    "25 steps": {"num_inference_steps": 25, "solver": "multistep"},
    "25 steps, interval 0:0.6": {"num_inference_steps": 25, "solver": "multistep", "guidance_interval": (0.0, 0.6)},
    "25 steps, cache 0.1": {"num_inference_steps": 25, "solver": "multistep", "step_cache": 0.1},
}  # fmt: skip


def arms() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> (precision, options of `generate`). "exact" is what the others are compared with."""
    found = {"exact": ("float32", EXACT), **{name: (name, EXACT) for name in ALONE}}
    return found | {f"{kind}, {name}": (kind, options) for name, options in OPTIONS.items() for kind in COMBINED}


def of(text: str) -> Precision:
    """A precision by name; bfloat16 rounds what products read and weigh, for everything else is float32."""
    if text == "bfloat16":
        return Precision(compute="float32", language=text, decoder=text, head=text)
    return parse_precision(text, "float32")


@contextmanager
def counted(stack: FastStack) -> Iterator[list[int]]:
    """Images that went through the stack's last block meanwhile, as one number."""
    total, inner = [0], FastStack.forward

    def forward(self: FastStack, x: Any, *args: Any, **kwargs: Any) -> Any:
        last = args[4] if len(args) > 4 else kwargs.get("last")
        total[0] += x.shape[0] if self is stack and last in (None, len(self.blocks)) else 0
        return inner(self, x, *args, **kwargs)

    FastStack.forward = forward  # type: ignore[method-assign]
    try:
        yield total
    finally:
        FastStack.forward = inner  # type: ignore[method-assign]


class Bench:
    """Pictures of one model and the figures of each arm. n: pictures, a multiple of `IMAGES`."""

    def __init__(self, model: Path, n: int, guidance: float) -> None:
        asked = riddles()
        if n < IMAGES or n % IMAGES or n > IMAGES * len(asked):
            raise BadRequestError(f"n = {n}: expected a multiple of {IMAGES} up to {IMAGES * len(asked)}")
        self._asked, self._guidance, self._model = asked[: n // IMAGES], guidance, model
        backend = mindomni_rt.load(model, device="cpu", fast=True, dtype="float32").backend
        assert isinstance(backend, TorchCudaBackend)
        self._backend = backend
        self._exact, self._passes = self._paint("float32", EXACT)

    def figures(self, precision: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Of one arm."""
        found, passes = self._paint(precision, options)
        marks = [right(riddle, image) for riddle, one in zip(self._asked, found, strict=True) for image in one.images]
        return {
            "precision": precision,
            "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
            **likeness(found, self._exact),
            "texts_equal": sum(a.text == b.text for a, b in zip(found, self._exact, strict=True)),
            "passes": round(passes / self._passes, 4),
            **Score(right=sum(marks), n=len(marks)).to_dict(),
        }

    def _paint(self, precision: str, options: Mapping[str, Any]) -> tuple[list[Any], int]:
        """(results, whole passes of an image of one branch)."""
        with rounded(self._backend, of(precision)), counted(self._backend.decoder_stack) as total:
            pipe = Pipeline(self._backend, self._model)  # a new one: prefixes of negative prompts are kept
            found = [
                pipe.generate(
                    riddle.instruction, height=96, width=96, guidance_scale=self._guidance, seed=seed,
                    num_images=IMAGES, max_new_tokens=48, output="numpy", **options,
                )
                for seed, riddle in enumerate(self._asked)
            ]  # fmt: skip
            for one in found:
                one.latents  # noqa: B018  # read while the backend still holds them
        return found, total[0]


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Figures as Markdown."""
    rows = []
    for name, row in found.items():
        low, high = (100 * side for side in row["interval"])
        right = f"{100 * row['share']:.1f} % ({low:.1f} to {high:.1f})"
        rows.append([name, f"{row['psnr']:.1f}", f"{row['latent_cosine']:.4f}", right, f"{row['passes']:.2f}"])
    return results.table(["precision and options", "PSNR dB", "latent cosine", "right (95 % interval)", "passes"], rows)
