"""Two thousand mixed requests on one bundle: memory stays, and the same request gives the same at the end."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mindomni_rt
from mindomni_rt import BadRequestError, Pipeline, StepEvent
from mindomni_rt.demo import DEMO_MODELS

pytest.importorskip("onnxruntime", reason="the small bundle needs the onnx extra")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

REQUESTS, WARM = 2000, 400
PROMPTS = (
    "draw (1 + 2) things of the colour of a lemon, shaped like a wheel",
    "draw (7 - 2) things of the colour of the sea, shaped like a wheel",
    "three yellow circles",
)
SIZES = ((96, 96), (96, 112), (128, 96), (80, 80), (112, 128))
FIRST: dict[str, Any] = dict(height=96, width=96, num_inference_steps=2, max_new_tokens=48, seed=5, output="numpy")


def resident() -> int:
    """Bytes of this process in memory now."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024


def one(pipe: Pipeline, n: int, image: Any) -> None:
    """Request n of the mix: of ten, five paint, one edits, two ask, one is cancelled or left, one is refused."""
    height, width = SIZES[n % len(SIZES)]
    options = {**FIRST, "height": height, "width": width, "seed": n, "num_inference_steps": 1 + n % 4}
    prompt = PROMPTS[n % len(PROMPTS)]
    match n % 10:
        case 0 | 1 | 2:
            pipe.generate(prompt, **options)
        case 3:
            pipe.generate(prompt, **options | {"num_images": 2, "guidance_scale": 1.0, "think": False})
        case 4:
            pipe.generate(f"{prompt}, {n}", **options | {"solver": "multistep", "guidance_interval": (0.0, 0.5)})
        case 5:
            pipe.edit(image, prompt, **options)
        case 6 | 7:
            assert pipe.understand("describe the picture.", image, max_new_tokens=24).text
        case 8:
            stop = threading.Event()
            events = pipe.stream(prompt, cancel=stop, **options | {"num_inference_steps": 20})
            for event in events:
                if isinstance(event, StepEvent):
                    (stop.set if n % 20 == 8 else events.close)()
                    break
            with pytest.raises((mindomni_rt.GenerationCancelled, StopIteration)):
                next(events)
        case _:
            with pytest.raises(BadRequestError):
                pipe.generate(prompt, **options | {"height": 97})


def test_memory_stays_and_results_repeat(record_property: Any) -> None:
    with mindomni_rt.load(DEMO_MODELS[0][0], device="cpu") as pipe:
        before = pipe.generate(PROMPTS[0], **FIRST)
        image = pipe.generate(PROMPTS[2], height=96, width=96, seed=1).images[0]
        seen = []
        for n in range(REQUESTS):
            one(pipe, n, image)
            if n >= WARM and n % 100 == 99:
                gc.collect()
                seen.append(resident())
        after = pipe.generate(PROMPTS[0], **FIRST)
    record_property("resident_mb", [round(each / 1e6, 1) for each in seen])
    assert np.array_equal(before.images, after.images) and before.token_ids == after.token_ids
    assert np.median(seen[-3:]) <= 1.02 * np.median(seen[:3])
