"""The peer that runs our own graphs: onnxruntime as its tutorial shows it, numpy in and out, default options."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mindomni_rt.backends.compiled.onnx import load_onnx
from mindomni_rt.bundle.manifest import open_bundle
from mindomni_rt.errors import BadRequestError, MissingExtraError
from mindomni_rt.memory.layers import Workload

from ..stages import Stages, noise
from .pairs import BOUNDS, Group, Match, Pair, after_first, timed
from .plain_bundle import PlainBundle


def onnx_group(
    folder: Path,
    device: str = "cpu",
    *,
    prompts: Sequence[int] = (24, 900),
    new: int = 24,
    lengths: tuple[int, int] = (40, 12),
    steps: int = 4,
) -> Group:
    """The denoising loop and decoding of a bundle. Raises MissingExtraError, BadBundleError, BadRequestError.

    prompts, lengths: token counts. Both sides run the same graphs, so their outputs are compared with each other.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "bench") from error
    bundle = open_bundle(folder)
    dtype, config = bundle.manifest.dtype, bundle.manifest.model
    if dtype == "bfloat16":
        raise BadRequestError(f"{folder}: numpy has no bfloat16; expected a bundle of fp32 or fp16")
    provider = "CUDAExecutionProvider"
    if device == "cpu" or provider not in onnxruntime.get_available_providers():
        device, provider = "cpu", "CPUExecutionProvider"
    backend, plain = load_onnx(bundle, device), PlainBundle(bundle, provider)
    # The side of a trained sample of the small bundle.
    work = Workload(new_tokens=new, height=96, width=96, steps=steps)
    draw, width = np.random.default_rng(0), config.decoder.stack.hidden_size
    conditions = [draw.standard_normal((1, n, width), np.float32) for n in lengths]
    stages, latents = Stages(backend, work), noise(config, work)
    ours = stages.prefixes([backend.put(c, dtype) for c in conditions])
    theirs = [plain.prefix(c, stages.times[:-1], work.image_tokens) for c in conditions]
    paint = partial(plain.paint, theirs, latents, stages.times)
    found, exact = np.asarray(paint(), np.float64), np.asarray(backend.numpy(stages.paint(ours)), np.float64)
    most = config.language.max_positions - new
    writers = [Stages(backend, Workload(prompt_tokens=min(n, most), new_tokens=new)) for n in prompts]
    texts = [writer.text(writer.work.prompt_tokens) for writer in writers]
    same = all(list(plain.write(ids, new)) == writer.write() for ids, writer in zip(texts, writers, strict=True))
    pairs = [
        Pair(name="guided step", ours=timed(lambda: stages.paint(ours), steps), theirs=timed(paint, steps)),
        *(
            Pair(
                name=f"decoded token after {len(ids)}",
                ours=after_first(lambda mark, writer=writer: writer.write(mark=mark), new - 1),  # type: ignore[misc]
                theirs=after_first(partial(_read, plain, ids, new), new - 1),
                rate="tokens/s",
            )
            for ids, writer in zip(texts, writers, strict=True)
        ),
    ]
    threads = os.environ.get("OMP_NUM_THREADS") or "one for each core"
    return Group(
        peer=f"onnxruntime {onnxruntime.__version__}",
        match=Match(
            error=float(np.linalg.norm(found - exact) / np.linalg.norm(exact)),
            bound=BOUNDS[dtype],
            tokens_equal=same if dtype == "float32" else None,
            exact=dtype == "float32",
        ),
        pairs=pairs,
        note=f"{folder.name} on {device}; the same graphs: ours with IOBinding (threads: {threads}), the peer with "
        f"session.run, numpy arrays and default options (its log silenced). 96x96, {steps} steps; {new} tokens "
        "written. The peer copies the whole cache for each token",
    )


def _read(plain: PlainBundle, ids: Any, new: int, mark: Any) -> None:
    for index, _ in enumerate(plain.write(ids, new)):
        if not index:
            mark()
