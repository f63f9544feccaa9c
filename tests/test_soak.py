"""Two thousand mixed requests on one bundle: memory stays, and the last result equals the first."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mindomni_rt
from mindomni_rt import BadRequestError, GenerationCancelled, Pipeline

BUNDLE = Path(__file__).parents[1] / "assets" / "shapes-world-bundle"
SMALL: dict[str, Any] = dict(width=48, guidance_scale=1.0, max_new_tokens=4, output="numpy")
PICTURE = Image.new("RGB", (512, 512), "red")  # larger than the small model's context holds: it is reduced


def resident() -> int:
    """Bytes of this process in memory."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def ask(pipe: Pipeline, index: int) -> None:
    """One of six kinds of request; sizes and steps differ too."""
    options = {**SMALL, "height": 32 + 16 * (index % 3), "num_inference_steps": 1 + index % 2, "seed": index}
    kind = index % 6
    if kind == 0:
        pipe.generate("three yellow circles", **{**options, "guidance_scale": 2.0})
    elif kind == 1:
        pipe.generate("three yellow circles", think=False, **options)
    elif kind == 2:
        pipe.edit(PICTURE, "the same, but blue", **{**options, "edit_features": "vit"})
    elif kind == 3:
        pipe.understand("what is this?", PICTURE, max_new_tokens=3)
    elif kind == 4:
        with pytest.raises(GenerationCancelled):
            pipe.generate("three yellow circles", callback=lambda _: False, **options)
    else:
        with pytest.raises(BadRequestError):
            pipe.generate("three yellow circles", **{**options, "height": 33})


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads resident memory from /proc")
def test_two_thousand_requests(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    pipe = mindomni_rt.load(BUNDLE, device="cpu")
    fixed = {**SMALL, "height": 96, "width": 96, "num_inference_steps": 3, "seed": 7}
    first = pipe.generate("three yellow circles", **fixed)
    before = 0
    for index in range(2000):
        ask(pipe, index)
        if index == 200:  # every size has been seen
            gc.collect()
            before = resident()
    gc.collect()
    assert resident() <= 1.02 * before
    last = pipe.generate("three yellow circles", **fixed)
    assert last.text == first.text and np.array_equal(last.images, first.images)
