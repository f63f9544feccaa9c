"""Every public setting of `load`, `generate`, `edit` and `understand` on the stand-in."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import pytest

import mindomni_rt
from mindomni_rt import Request, UnderstandRequest
from mindomni_rt.memory.precision import ATTENTIONS, FLOATS, KINDS, stored
from mindomni_rt.memory.precision import PRESETS as PRECISIONS
from mindomni_rt.memory.precision import parse_precision as parsed
from mindomni_rt.options import PRESETS, parse_interval

from . import test_requests
from .requests import BASE, OPTIONS
from .runs import Runs

pytestmark = pytest.mark.timeout(1800)
SHORT: dict[str, Any] = dict(num_inference_steps=3, end=6, height=512, width=512)
FAST = PRESETS["fast"]
REQUESTS: dict[str, dict[str, Any]] = {
    "plain": SHORT,
    "another negative prompt": dict(negative_prompt="grey", **SHORT),
    "given noise": dict(latents=True, **SHORT),
    "pictures of Pillow": dict(SHORT, output="pil", preview_every=1),
    "several prompts": dict(SHORT, prompt=["red", "blue circle " * 9]),
    "edit": dict(edit=True, image=True, height=None, width=None, num_inference_steps=2, end=6),
    "edit, whole picture": dict(SHORT, edit=True, image=[1120, 1120], max_image_tokens=None, draft_tokens=2),
    "a drawn answer": dict(understand="what?", temperature=0.7, max_new_tokens=9, max_image_tokens=256, image=True),
    "a question without a picture": dict(understand="why", seed=3),
    "cancelled in its text": dict(stop_text=1, **SHORT),
    "preset fast": dict(
        SHORT, num_inference_steps=FAST["steps"], solver=FAST["solver"], step_cache=FAST["step_cache"],
        guidance_interval=parse_interval(FAST["guidance_interval"]),
    ),
}  # fmt: skip
"""Beside `requests.OPTIONS`."""
KINDS_OF_PARTS = (
    "language=int8wo,head=int4,decoder=int4,vae=float32", "language=int4,decoder=fp8", "decoder=fp8fast,vae=bfloat16",
)  # fmt: skip
LOADS: dict[str, dict[str, Any]] = {
    "no limit": dict(memory_budget=None),
    "float16": dict(dtype="float16"),
    "float32": dict(dtype="float32"),
    "fp8fast": dict(precision="fp8fast"),
    "the preset's": dict(precision=FAST["precision"]),
    **{name: dict(precision=f"attention={name}") for name in ATTENTIONS},
    **{f"fp8, {name}": dict(precision=f"decoder=fp8,attention={name}") for name in ("int8", "flash")},
    **{pairs: dict(precision=pairs) for pairs in KINDS_OF_PARTS},
    "the torch backend by name": dict(backend="torch", fast=True),
}
QUICK = ("no limit", "float16", "float32", "fp8fast", "sdpa", "int8", KINDS_OF_PARTS[0])
"""Loads that run always; the others differ from them by a kernel or a type."""
WAITS = {"preset fast": 1, "step cache": 1}
"""Waits of the host that a step may have: see `test_requests.test_no_step_waits`."""


def seen(runs: Runs, load: dict[str, Any], requests: list[Any], more: list[Any]) -> list[dict[str, Any]]:
    """Each pipeline's load and requests, one after another in a process."""
    again = [{"load": {"device": "cuda:0", **options}, "requests": asked} for options, asked in more]
    found = runs(folder=runs.thin, load={"device": "cuda:0", **load}, requests=requests, again=again)
    assert not found["faults"] and not found["stuck"]
    parts = [found, *found["again"]]
    for part in parts:
        assert not part["load"]["error"], part["load"]["error"]
        for request in part["requests"]:
            assert not request["error"], (request["name"], request["error"])
            for waits in request["step_waits"][1:]:
                assert len(waits) <= WAITS.get(request["name"], 0), (request["name"], waits)
    return parts


def test_every_request(runs: Runs) -> None:
    (part,) = seen(runs, {}, [*OPTIONS, *([name, options] for name, options in REQUESTS.items())], [])
    planned = 0
    for request in part["requests"]:
        planned = max(planned, request["planned"])
        assert request["peak"] <= planned, request["name"]


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param(tuple(n for n in LOADS if n not in QUICK), marks=pytest.mark.slow)],
    ids=["quick", "others"],
)
def test_every_load(runs: Runs, names: tuple[str, ...]) -> None:
    requests = [["plain", SHORT], ["longer", dict(SHORT, prompt="blue square " * 40, end=12)]]
    _, *parts = seen(runs, {}, [], [(LOADS[name], requests) for name in names])
    for name, part in zip(names, parts, strict=True):
        planned = 0
        for request in part["requests"]:
            planned = max(planned, request["planned"])
            assert request["peak"] <= planned, (name, request["name"])


def test_nothing_public_is_left_out() -> None:
    """A setting that is added must be run here too, or be named with the reason why not."""
    asked = {name for options in ({**OPTIONS, **REQUESTS}).values() for name in options} | set(BASE)
    elsewhere = {"prompt", "image"}  # by each request that is run
    assert {f.name for f in fields(Request)} <= asked | elsewhere
    questions = {name for options in ({**OPTIONS, **REQUESTS}).values() if "understand" in options for name in options}
    assert {f.name for f in fields(UnderstandRequest)} <= questions | elsewhere
    # Where weights come from; a device's name is in every job.
    not_of_the_device = {"path_or_repo_id", "revision", "token", "local_files_only", "device"}
    given = {name for options in LOADS.values() for name in options}
    assert set(inspect.signature(mindomni_rt.load).parameters) <= given | not_of_the_device


def test_no_precision_is_left_out() -> None:
    texts = {str(options["precision"]) for options in LOADS.values() if "precision" in options}
    matrix = {precision for precision in test_requests.PRECISIONS if precision}
    types = {options["dtype"] for options in LOADS.values() if "dtype" in options} | {"bfloat16"}
    assert set(FLOATS) == types and set(PRECISIONS) <= texts | matrix | types
    assert {f"attention={name}" for name in ATTENTIONS} <= texts
    run: dict[str, set[str]] = {"language": set(), "head": set(), "decoder": set()}
    for text in texts | matrix:
        pairs = ",".join(pair for pair in text.split(",") if not pair.startswith("attention="))
        if pairs:
            for part, kind in stored(parsed(pairs, "bfloat16")).items():
                run[part].add(kind)
    allowed = {part: set[str]() for part in run}
    for part in run:
        for kind in KINDS:
            try:
                stored(parsed(f"{part}={kind}", "bfloat16"))
            except mindomni_rt.BadRequestError:
                continue
            allowed[part].add(kind)
    assert run == allowed
