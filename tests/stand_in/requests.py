"""A pipeline on the stand-in, and one request of each kind: what the tests run at the published sizes."""

from __future__ import annotations

import gc
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch._subclasses.fake_tensor import FakeTensor

import mindomni_rt
from mindomni_rt import GenerationCancelled, GenerationResult, Pipeline, Request
from mindomni_rt.events import Event, StepEvent, TextEvent
from mindomni_rt.memory import machine
from mindomni_rt.memory.host import HostMemory

from .checkpoint import reader
from .launches import Recorder, recording
from .runtime import Runtime
from .tensors import Fake, Values, patched

HOST = 256 * 10**9
STAGES = ("vision", "connector", "prefix", "vae", "vae_encode")
BASE: dict[str, Any] = dict(
    prompt="red circle " * 10, height=1024, width=1024, num_inference_steps=12, seed=1, output="numpy"
)  # fmt: skip
END = 40  # tokens of a text, which has room for as many as a request without a limit of its own
LONGER: dict[str, Any] = dict(prompt="blue square " * 40, end=150)
PLAIN: dict[str, dict[str, Any]] = {"first": {}, "cancelled": dict(stop=3), "second": LONGER}
"""Two requests of different lengths and a cancelled one between."""
OPTIONS: dict[str, dict[str, Any]] = {
    "drafts": dict(draft_tokens=4),
    "drawn": dict(temperature=1.0, draft_tokens=2),
    "step cache": dict(step_cache=0.1),
    "multistep": dict(solver="multistep", guidance_interval=(0.2, 0.8), preview_every=4),
    "condition only": dict(first_step="condition_only", num_inference_steps=4),
    "one branch": dict(guidance_scale=1.0, think=False),
    "silent": dict(think=False, num_inference_steps=3),
    "several": dict(num_images=2, height=512, width=768),
    "large": dict(height=1536, width=2048, num_inference_steps=2, think=False),
    "edit": dict(image=True),
    "edit, cascade": dict(image=True, edit_features="vit+vae", cascade=True),
    "understand": dict(understand="what is it", image=True),
    "last": dict(num_inference_steps=3),
}
"""Every public option."""
SEVERAL_GRAPHS = ("step cache", "multistep", "condition only")
"""Those whose steps are not all one captured graph."""


@dataclass
class Seen:
    """One request: what it used and where the host waited. Bytes of its device."""

    name: str
    peak: int = 0
    left: int = 0
    stages: dict[str, int] = field(default_factory=dict)
    syncs: dict[str, int] = field(default_factory=dict)
    step_waits: list[list[str]] = field(default_factory=list)  # between two steps, previews and captures left out
    token_waits: list[list[str]] = field(default_factory=list)  # between two tokens of the last text
    ahead: list[int] = field(default_factory=list)  # steps queued and not waited for, at each step
    pools: list[dict[str, int]] = field(default_factory=list)
    work: dict[str, Any] = field(default_factory=dict)
    moved: int = 0
    hidden: int = 0
    beside: dict[str, int] = field(default_factory=dict)  # copies off the default stream: their bytes, by phase
    read: list[int] = field(default_factory=list)  # tokens that were read when they were queued
    error: str = ""
    kind: str = ""  # the error's class


class StandIn:
    """A loaded pipeline with everything that is watched."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.stand = runtime, runtime.stand
        self.values = Values(end_token=2)
        self.recorder = Recorder(runtime)
        self.fake = Fake(runtime, self.values)
        self.end = 0  # tokens of each text, 0 for as many as a request allows
        self.index = 0  # of the device that requests run on
        self.prompts: list[int] = []  # tokens of the language runs of one request
        self.negative = 0
        self.patches, self.encoded = (0, 0), (0, 0)  # of a request's picture: for the tower, pixels for the VAE
        self.token_waits: list[list[str]] = []
        self._since = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything inside runs on the stand-in, of a machine with plenty of host memory."""
        with ExitStack() as stack:
            stack.enter_context(patched(machine, "host_memory", lambda root: HostMemory(HOST, HOST)))
            stack.enter_context(recording(self.recorder))
            stack.enter_context(reader())
            stack.enter_context(self.fake.running())
            yield

    def load(self, folder: Path, **options: Any) -> Pipeline:
        self.stand.phase = "load"
        pipeline = mindomni_rt.load(folder, **options)
        self._name_phases(pipeline.backend)
        return pipeline

    def _name_phases(self, backend: Any) -> None:
        """Wraps the stages, so that peaks and waits carry their names."""

        def call(name: str, method: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                before, self.stand.phase = self.stand.phase, name
                try:
                    return method(*args, **kwargs)
                finally:
                    self.stand.phase = before

            return run

        for name in STAGES:
            setattr(backend, name, call(name, getattr(backend, name)))
        denoiser, language = call("denoiser", backend.denoiser), call("language", backend.language)

        vision, encode = backend.vision, backend.vae_encode

        def seen(image: Any) -> Any:
            self.patches = tuple(image.grid[1:])
            return vision(image)

        def encoded(pixels: Any) -> Any:
            self.encoded = tuple(pixels.shape[2:])
            return encode(pixels)

        def written(request: Any) -> Any:
            self.prompts.append(len(request.token_ids))
            self.token_waits.clear()
            self.values.begin(self.end)
            self.stand.read = 0
            return _Session("language", language(request), call, self._read)

        backend.vision, backend.vae_encode, backend.language = seen, encoded, written
        backend.denoiser = lambda request: _Session("denoiser", denoiser(request), call)

    def _read(self) -> None:
        """A token or a verified draft was read."""
        self.stand.read += 1
        self.token_waits.append(self._waits("language", self._since))
        self._since = len(self.stand.syncs)

    def request(
        self, pipeline: Pipeline, name: str, stop: int = 0, stop_text: int = 0, end: int = END, **options: Any
    ) -> Seen:
        """One request, cancelled after `stop` steps or `stop_text` pieces of text if that is not 0; the text ends after
        `end` tokens."""
        seen, runtime = Seen(name), self.runtime
        self.end = end
        self.stand.syncs.clear()
        self.stand.uploads.clear()
        self.prompts.clear()
        self.patches = self.encoded = (0, 0)
        residency = pipeline.backend.residency
        before = residency.moved_bytes, residency.hidden_bytes
        runtime.allocator.reset_peaks(self.index)
        marks, since, self._since, pieces = list[int](), [0], 0, [0]

        def watch(event: Event) -> bool | None:
            if isinstance(event, TextEvent):
                pieces[0] += 1
                return not (stop_text and pieces[0] >= stop_text)
            if isinstance(event, StepEvent):
                marks.append(runtime.issued)
                # Before the first step of an image its buffers are filled.
                seen.step_waits.append(self._waits("denoiser", since[0]) if event.step > 1 else [])
                since[0] = len(self.stand.syncs)
                seen.ahead.append(sum(mark > runtime.done for mark in marks))
                return not (stop and event.step >= stop)
            return None

        self.stand.phase = "between"
        self.token_waits = seen.token_waits
        results: list[GenerationResult] = []
        try:
            results = called(pipeline, options, watch)
        except GenerationCancelled:
            assert stop or stop_text
        except Exception as error:  # noqa: BLE001  # a test reports it
            seen.error, seen.kind = "".join(traceback.format_exception(error))[-3000:], type(error).__name__
        gc.collect()
        seen.moved, seen.hidden = residency.moved_bytes - before[0], residency.hidden_bytes - before[1]
        beside = [upload for upload in self.stand.uploads if upload.stream]
        for upload in beside:
            seen.beside[upload.phase] = seen.beside.get(upload.phase, 0) + upload.bytes
        seen.read = sorted({upload.read for upload in beside})
        allocator = runtime.allocator
        seen.peak, seen.left = allocator.devices[self.index].used_top, allocator.used(self.index)
        seen.stages = dict(allocator.stages)
        seen.syncs = dict(Counter(f"{s.phase} {s.kind} {s.where}" for s in self.stand.syncs))
        seen.pools = [asdict(pool) for pool in allocator.pools.values()]
        if self.prompts:
            settings = {k: v for k, v in (results[0].settings if results else {}).items() if k != "prompt"}
            seen.work = self._work({**BASE, **options, **settings}, max((len(r.token_ids) for r in results), default=0))
        return seen

    def _waits(self, phase: str, since: int) -> list[str]:
        return [
            f"{s.kind} {s.where}"
            for s in self.stand.syncs[since:]
            if s.phase == phase and s.kind not in ("event", "capture")
        ]

    def _work(self, options: dict[str, Any], new: int) -> dict[str, Any]:
        """The request as `memory.layers.Workload` has it. The last run may be the negative prompt's, which is kept."""
        most = options.get("max_new_tokens", Request.max_new_tokens) if options.get("think", True) else 0
        picture = dict(
            joint=True, patches=self.patches, encoded=self.encoded, max_new_tokens=most + options.get("draft_tokens", 0)
        )
        if "understand" in options:
            return dict(prompt_tokens=self.prompts[0], new_tokens=new, paints=False, **picture)
        rounds = 2 if options.get("cascade") else len(options["prompt"]) if isinstance(options["prompt"], list) else 1
        if len(self.prompts) > rounds:
            self.negative = self.prompts[-1]
        return dict(
            prompt_tokens=max(self.prompts), new_tokens=new, negative_tokens=self.negative or 1,
            height=options["height"], width=options["width"], steps=options["num_inference_steps"],
            images=options.get("num_images", 1), guidance=options.get("guidance_scale", 3.0) != 1, **picture,
        )  # fmt: skip


def called(
    pipeline: Pipeline, options: dict[str, Any], watch: Callable[[Event], bool | None]
) -> list[GenerationResult]:
    """The public call that options mean: `understand`, `edit`, `generate`, or `generate_batch` for several prompts.

    image: True or the sides of one; latents: True; bare: nothing is set that options do not set.
    """
    image = options.get("image")
    if image is not None:
        options = {**options, "image": picture() if image is True else picture(*image)}
    if "understand" in options:
        rest = {"max_new_tokens": 20, **{k: v for k, v in options.items() if k not in ("understand", "image")}}
        return [pipeline.understand(options["understand"], options.get("image"), **rest, callback=watch)]
    bare = options.get("bare", False)
    options = {**({"prompt": BASE["prompt"]} if bare else BASE), **{k: v for k, v in options.items() if k != "bare"}}
    if options.get("latents"):
        options["latents"] = np.zeros((1, 4, options["height"] // 8, options["width"] // 8), np.float32)
    if options.pop("edit", False):
        return [pipeline.edit(options.pop("image"), options.pop("prompt"), **options, callback=watch)]
    prompt = options.pop("prompt")
    if isinstance(prompt, list):
        return pipeline.generate_batch(prompt, **options, callback=watch)
    return [pipeline.generate(prompt, **options, callback=watch)]


class _Session:
    """A session whose work carries its stage's name; `after` is called when the host has read a step."""

    def __init__(self, name: str, session: Any, call: Any, after: Callable[[], None] | None = None) -> None:
        self._name, self._session, self._call, self._after = name, session, call, after

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        return self._call(self._name, found) if callable(found) and not isinstance(found, FakeTensor) else found

    def read(self) -> list[int]:
        found: list[int] = self._call(self._name, self._session.read)()
        assert self._after is not None
        self._after()
        return found


def picture(height: int = 448, width: int = 560) -> np.ndarray:
    """A reference image."""
    return np.zeros((height, width, 3), np.uint8)
