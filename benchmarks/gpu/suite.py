"""`mindomni bench gpu`: what is right and how fast it is, in one command, on one machine, in one run.

    mindomni bench gpu --minutes 9                      # one GPU, full size, random weights
    mindomni bench gpu --only step,tokens               # some parts
    mindomni bench gpu --device cpu --preset toy        # the same code at toy size, to see that it runs

Parts run in order of value, each with a time limit; what does not fit into the minutes is left out, a part that fails
is recorded, and the result is written after each part. Outputs are judged by their distance from a float32 reference:
no farther than 1.2 times the baseline's, and within a bound. A time is recorded in any case. Baselines run on the same
weights and shapes in the same process; ratios are to the matrix-product and copy speeds measured in this run.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mindomni_rt.backends.fast.load import choose, reserve
from mindomni_rt.backends.torch.backend import TorchBackend
from mindomni_rt.backends.torch.device import limit_memory, working_on
from mindomni_rt.clock import Clock
from mindomni_rt.errors import BadRequestError
from mindomni_rt.judgement import judged
from mindomni_rt.memory.footprint import weight_bytes
from mindomni_rt.memory.layers import parameters
from mindomni_rt.memory.planner import gigabytes, plan
from mindomni_rt.memory.precision import COMPUTE, Precision, parse_precision
from mindomni_rt.model.random.scaled import scaled
from mindomni_rt.model.random.weights import random_model

from ..machine import describe_machine, free_memory, header
from ..measure import Meter, Record, ceilings, relative_error
from ..peers.baselines import EagerDecoder
from ..peers.command import cuda_or_cpu
from ..peers.pairs import BOUNDS, marked, run_group
from ..peers.torch import decoder_group, language_group
from ..results import FOLDER, IN_CHECKOUT, write_result
from ..stages import Preset, Stages, make_backend, mean_velocity, noise, random_conditions
from .kernels import CASES, Sizes, run_case, sweep
from .report import markdown

logger = logging.getLogger(__name__)
EIGHT_BIT = 0.15
"""Bound of the decoder's velocities with 8-bit products, whose rounding of weights and rows is part of the method."""
LOSSY: dict[str, dict[str, Any]] = {
    "guidance in [0, 0.6)": {"guidance_interval": (0.0, 0.6)},
    "step cache 0.1": {"step_cache": 0.1},
}
PRECISIONS = ("decoder=fp8", "decoder=int8", "language=int8wo,head=int8wo", "language=int4,head=int8wo")
PRESETS: dict[str, dict[str, Any]] = {
    "full": dict(dtype="bfloat16", sides=(1024, 512), steps=50, prompt=100, new=300, negative=100),
    "toy": dict(dtype="float32", sides=(96, 64), steps=4, prompt=9, new=8, negative=5),
}


def presets(name: str) -> Preset:
    """ "full": the published model, 1024² and 512². "toy": four layers, for a CPU."""
    return Preset(config=scaled("published" if name == "full" else "tiny"), **PRESETS[name])


Runs = dict[str, Callable[[], Any]]


class Suite:
    """One run on one device. Models are made when a section needs them and let go afterwards."""

    def __init__(self, preset: Preset, device: torch.device, minutes: float, store: Callable[[], None]) -> None:
        self.preset, self.device, self.cuda = preset, device, device.type == "cuda"
        self.meter = Meter(device, runs=10 if self.cuda else 2, deadline=time.perf_counter() + 60 * minutes)
        self.record, self.sizes = Record(store=store), Sizes.of(preset, device)
        self._exact: dict[int, torch.Tensor] = {}
        self._backend: Any = None

    def run(self, parts: list[str]) -> None:
        """All sections of the parts, in order."""
        for part in parts:
            needs, limit, sections = PARTS[part]
            if not self.cuda:  # the sizes are toys there, and the limits are made for a GPU
                needs, limit = 0, float("inf")
            for name, run in sections(self).items():
                if not name.startswith(_ON_ONE_BACKEND):
                    self.clean()  # it makes a model of its own
                found = self.record.section(self.meter, name, needs, run, limit)
                logger.info("%s: %s", name, found)
                if isinstance(found, dict) and "failed" in found:
                    self.clean()

    def clean(self) -> None:
        """Gives back what a section held."""
        self._backend = None
        free_memory()

    def backend(self) -> Any:
        """The fast path, unquantized; the same one until `clean`."""
        if self._backend is None:
            vae = "bfloat16" if self.preset.dtype == "bfloat16" else "float32"
            precision = parse_precision(f"vae={vae}", self.preset.dtype)
            self._backend = make_backend(self.model(), str(self.device), precision)
        return self._backend

    def model(self) -> Any:
        """Random weights, the same in every section."""
        return random_model(self.preset.config, self.preset.torch_dtype, self.device)

    def stages(self, side: int | None = None, backend: Any = None) -> Stages:
        return Stages(backend or self.backend(), self.preset.work(side))

    def conditions(self, side: int | None = None) -> list[torch.Tensor]:
        work = self.preset.work(side)
        return random_conditions(self.preset.config, work, self.preset.torch_dtype, self.device)

    def ceilings(self) -> dict[str, Any]:
        side, copied = (8192, 2 << 30) if self.cuda else (256, 1 << 20)
        return ceilings(self.meter, self.preset.torch_dtype, (side,), copied)

    # Correctness: first velocities and hidden states, ours and a plain 16-bit run's, against float32.

    def eager(self, side: int) -> dict[str, Any]:
        """The released code's formulation: its float32 velocity is the reference, its 16-bit run the baseline."""
        decoder, meter = self.model().decoder, self.meter
        start = torch.from_numpy(noise(self.preset.config, self.preset.work(side))).to(self.device)
        conditions, rows = self.conditions(side), side // 16
        decoder.float()
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            exact = EagerDecoder(decoder, [c.float() for c in conditions], rows, rows).step(start, 0.0)
            self._exact[side] = mean_velocity(exact)
        decoder.to(self.preset.torch_dtype)
        with torch.inference_mode():
            plain = EagerDecoder(decoder, conditions, rows, rows)
            error = relative_error(mean_velocity(plain.step(start, 0.0)), self._exact[side])
            meter.restart()
            seconds = median(meter.once(lambda: plain.step(start, 0.0))[0] for _ in range(3))
        return {"error": error, "step_s": seconds, **meter.peak()}

    def distance(self, side: int, backend: Any = None) -> float:
        """Of our first velocity from the float32 one. Raises KeyError where part correctness did not run."""
        stages = self.stages(side, backend)
        ours = stages.first_velocity(stages.prefixes(self.conditions(side))).float()
        return relative_error(ours, self._exact[side])

    def plain_hidden(self) -> dict[str, Any]:
        """Hidden states of the prompt by the reference modules: in float32 the reference, in 16 bits the baseline."""
        model = self.model()
        model.language.float()
        self._exact[0] = self.stages(backend=TorchBackend(model, str(self.device))).hidden().float().clone()
        model.language.to(self.preset.torch_dtype)
        plain = self.stages(backend=TorchBackend(model, str(self.device))).hidden()
        return {"error": relative_error(plain, self._exact[0])}

    def velocity(self, side: int) -> dict[str, Any]:
        """Our first velocity, judged."""
        return self._judged(self.distance(side), f"eager {side}")

    def hidden(self) -> dict[str, Any]:
        """Our hidden states of the prompt, judged."""
        return self._judged(relative_error(self.stages().hidden(), self._exact[0]), "plain hidden states")

    def _judged(self, error: float, baseline: str) -> dict[str, Any]:
        """In float32 by the bound alone: what is left there is another order of sums."""
        if self.preset.dtype == "float32":
            return judged(error, 1e-5)
        return judged(error, BOUNDS[self.preset.dtype], self.record.data[baseline]["error"])

    # Times.

    def step(self, side: int, backend: Any = None) -> dict[str, Any]:
        """Seconds of the prefix pass and of one guided step, each waited for."""
        stages, meter, count = self.stages(side, backend), self.meter, self.meter.runs
        conditions = self.conditions(side)
        prefixes = stages.prefixes(conditions)
        seconds, prefixes = meter.once(lambda: stages.prefixes(conditions))
        meter.restart()
        stages.first_velocity(prefixes)  # tunes and captures
        steps = stages.steps(prefixes)
        laps = [meter.once(partial(next, steps))[0] for _ in range(min(count + 1, self.preset.steps))]
        times = laps[1:] or laps  # the first fills the buffers
        return {"prefixes_s": seconds, "step_s": median(times), "step_runs_s": times, **meter.peak()}

    def tokens(self, backend: Any = None) -> dict[str, Any]:
        """Seconds up to the first token and of each one after it."""
        stages, meter, new = self.stages(backend=backend), self.meter, self.preset.new
        text = stages.write()  # compiles, tunes, captures
        meter.restart()
        runs = [marked(meter, stages.write, new - 1) for _ in range(3)]
        peaks = meter.peak()
        precision = stages.backend.options.precision
        table = parameters(self.preset.config)["language"].embedding * COMPUTE[precision.compute]
        read = weight_bytes(self.preset.config, precision)["language"] - table  # of the embedding, one row is read
        first, rest = (median(times) for times in zip(*runs, strict=True))
        return {"first_token_s": first, "token_s": rest, "weight_bytes": read, **peaks, "tokens": text[:16]}

    def request(self, backend: Any = None, **lossy: Any) -> dict[str, Any]:
        """Prompt to pixels by stage, the second of two runs; the peak is that of both."""
        stages, meter = self.stages(backend=backend), self.meter
        meter.restart()
        for _ in range(2):
            clock, spent = Clock(stages.backend), dict[str, float]()
            latents, pixels = stages.run(clock, **lossy)
        assert np.isfinite(pixels).all() and pixels.shape == (1, stages.work.height, stages.work.width, 3)
        *frames, _ = clock.report().items()
        for name, seconds in frames:
            stage = name.partition(".")[0]
            spent[stage] = spent.get(stage, 0.0) + seconds
        return {"stages_s": spent, "total_s": sum(spent.values()), **meter.peak(), "latents": latents.float()}

    def requests(self) -> dict[str, Any]:
        """A whole request beside the plan for it, then with each lossy option."""
        base, lossy = self.request(), {}
        exact = base.pop("latents").clone()
        for name, options in LOSSY.items():
            found = self.request(**options)
            distance = relative_error(found["latents"], exact)
            lossy[name] = {"denoiser_s": found["stages_s"]["denoiser"], "latent_distance": distance}
        precision = self.backend().options.precision
        planned = plan(self.preset.config, self.preset.work(), precision=precision)
        return {
            **base,
            "side": self.preset.sides[0],
            "weight_bytes": sum(weight_bytes(self.preset.config, precision).values()),
            "planned_bytes": planned.peak,
            "lossy (random weights)": lossy,
        }

    def precision(self, name: str) -> dict[str, Any]:
        """Times, and of the decoder the distance from float32: ours, and the plain implementation's as the baseline."""

        def make(impl: str) -> Any:
            precision = parse_precision(name, self.preset.dtype)
            return make_backend(self.model(), str(self.device), precision, impl=impl)

        backend = make("auto")
        if not name.startswith("decoder"):
            return self.tokens(backend)
        found = self.record.data[name] = self.step(self.preset.sides[0], backend)  # kept if what follows fails
        if not self._exact:
            return found
        side = self.preset.sides[-1]  # the smallest: the plain implementation is slow
        ours = self.distance(side, backend)
        del backend
        self.clean()
        return found | judged(ours, EIGHT_BIT, self.distance(side, make("torch")))

    def budgets(self) -> list[int]:
        """Bytes of cards that people own; at toy size, too little for everything to stay."""
        peak = plan(self.preset.config, self.preset.work(), precision=Precision.uniform(self.preset.dtype)).peak
        return [size * 10**9 for size in (8, 12, 16, 24)] if self.cuda else [int(0.7 * peak)]

    def budget(self, budget: int) -> dict[str, Any]:
        """A whole request within a budget, twice: parts come and go, and what torch holds must stay below, pools of
        graphs and what it keeps for later among it."""
        config, device = self.preset.config, str(self.device)
        precision, chosen = choose(config, self.preset.dtype, None, budget, device, self.preset.work())
        backend = make_backend(self.model(), device, precision, chosen)
        residency = backend.residency
        free_memory()  # what the whole model took
        room = budget - reserve(device)
        if self.cuda:
            limit_memory(device, room / torch.cuda.get_device_properties(self.device).total_memory)
        try:
            found = self.request(backend)
        finally:
            backend.close()  # and the limit ends
        del found["latents"]
        return {**found, "precision": str(precision), "resident": chosen.resident if chosen else None,
                "moved_bytes": residency.moved_bytes, "hidden_bytes": residency.hidden_bytes, "room_bytes": room,
                "loads": residency.loads, "under": found["reserved_bytes"] <= room}  # fmt: skip

    def baseline(self, name: str) -> dict[str, Any]:
        """A peer of `benchmarks peers` on the same weights; fewer tokens and steps, for it recomputes much."""
        preset = replace(self.preset, new=min(self.preset.new, 64), steps=min(self.preset.steps, 4))
        make = {"transformers": language_group, "diffusers": decoder_group}[name]
        return run_group(make(preset, self.model(), self.device), self.meter, 3 if self.cuda else 1, 1)

    def kernels(self) -> dict[str, Any]:
        """All of them, as far as the time goes; the list is stored as it grows."""
        done: list[dict[str, Any]] = []
        self.record.data["kernels"] = {"cases": done}
        limits, sizes = self.record.data.get("ceilings") or {}, self.sizes
        with torch.inference_mode():
            for name, make in CASES.items():
                done.append(run_case(name, partial(make, sizes), self.meter, limits))
                self.record.store()
                if self.meter.left() < 2:
                    break
        return {"cases": done}


def _each(prefix: str, names: Any, run: Callable[[Any], Any]) -> Runs:
    return {f"{prefix}{name}": partial(run, name) for name in names}


def _correctness(suite: Suite) -> Runs:
    sides = suite.preset.sides
    references = {**_each("eager ", sides, suite.eager), "plain hidden states": suite.plain_hidden}
    return {**references, **_each("velocity ", sides, suite.velocity), "hidden states": suite.hidden}


_ON_ONE_BACKEND = ("velocity ", "hidden states", "ours ", "decoding", "request")
# In order of value: seconds that a part needs at full size at least, seconds after which it is stopped, its sections.
PARTS: dict[str, tuple[float, float, Callable[[Suite], Runs]]] = {
    "ceilings": (5, 30, lambda s: {"ceilings": s.ceilings}),
    "correctness": (15, 90, _correctness),
    "step": (15, 60, lambda s: _each("ours ", s.preset.sides, s.step)),
    "tokens": (15, 60, lambda s: {"decoding": s.tokens}),
    "request": (25, 90, lambda s: {"request": s.requests}),
    "precisions": (20, 60, lambda s: _each("", PRECISIONS, s.precision)),
    "baselines": (25, 90, lambda s: _each("", ("transformers", "diffusers"), s.baseline)),
    "kernels": (20, 90, lambda s: {"kernels": s.kernels}),
    "budgets": (30, 60, lambda s: {f"budget {gigabytes(b)}": partial(s.budget, b) for b in s.budgets()}),
    "sweep": (20, 600, lambda s: {"sweep": partial(sweep, s.sizes, s.meter, None if s.cuda else 1)}),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--preset", choices=tuple(PRESETS), default="full", help="sizes of the model and the requests")
    parser.add_argument("--minutes", type=float, default=9, help="parts that would end later are left out")
    parser.add_argument("--only", metavar="PARTS", help=f"some of {', '.join(PARTS)}; default: all but sweep")
    parser.add_argument(
        "--out", type=Path, help="folder; default at full size on a GPU: benchmarks/results of a checkout, else here"
    )


def _parts(only: str | None) -> list[str]:
    """Names in order of value. Raises BadRequestError for one that is none."""
    asked = [name.strip() for name in only.split(",")] if only else [name for name in PARTS if name != "sweep"]
    if unknown := [name for name in asked if name not in PARTS]:
        raise BadRequestError(f"--only {unknown[0]!r}: expected some of {', '.join(PARTS)}, joined by commas")
    return [name for name in PARTS if name in asked]


def run(options: argparse.Namespace) -> int:
    """Measures and reports: 1 where something failed or is not right."""
    parts, device = _parts(options.only), cuda_or_cpu(options.device)
    if not options.minutes > 0:
        raise BadRequestError(f"--minutes {options.minutes:g}: expected more than 0")
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    preset, began, now = presets(options.preset), time.perf_counter(), datetime.datetime.now(datetime.UTC)
    kept = device.type == "cuda" and options.preset == "full"
    folder = options.out or ((FOLDER if IN_CHECKOUT else Path()) if kept else None)
    head = header("gpu")
    machine = {**describe_machine(str(device)), "gpu": None, "versions": head.pop("versions")}
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        sm, memory = 10 * found.major + found.minor, found.total_memory
        machine |= {"gpu": found.name, "sm": sm, "memory_bytes": memory, "cuda": torch.version.cuda}
    data: dict[str, Any] = {
        **head,
        "date": now.isoformat(timespec="seconds"),
        "command": f"mindomni bench gpu --device {device} --preset {options.preset} "
        f"--minutes {options.minutes:g} --only {','.join(parts)}",
        "machine": machine,
        "preset": options.preset,
        "model": {"config": preset.config.to_dict(), "dtype": preset.dtype},
        "wall_s": 0.0,
        "sections": {},
    }

    def store() -> None:
        data["wall_s"] = round(time.perf_counter() - began, 1)
        if folder:
            name = f"{now:%Y-%m-%d-%H%M}-gpu-{options.preset}-{device.type}.json"
            write_result(folder / name, data, markdown(data))

    suite = Suite(preset, device, options.minutes, store)
    data["sections"] = suite.record.data
    store()  # a folder that cannot be written is known before minutes are spent
    with working_on(str(device)):  # Triton launches on the thread's current device, whatever its tensors are on
        suite.run(parts)
    store()
    sys.stdout.write(markdown(data))
    return int(any(missed(section) for section in suite.record.data.values()))


def missed(section: Mapping[str, Any]) -> bool:
    """Whether a section failed, or holds a result that is not right."""
    wrong = "failed" in section or any(section.get(key) is False for key in ("right", "agrees", "under"))
    return wrong or any(missed(case) for case in section.get("cases", ()))
