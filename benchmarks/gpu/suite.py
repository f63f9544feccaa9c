"""Everything about speed in one command, on one machine, in one run.

    python -m benchmarks gpu                                  # one GPU, full size, random weights, < 9 minutes
    python -m benchmarks gpu --device cpu --preset toy        # the same code at toy size, to see that it runs

Kernels are checked against float64 before they are timed. Baselines run on the same weights and shapes in the same
process: the eager, masked, concatenating formulation (ours), transformers' Qwen2.5-VL, diffusers' OmniGen transformer
where they are installed. Ratios are to the matrix-product and copy speeds measured in this run. One JSON and one
Markdown table go to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import logging
import sys
import time
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch

from mindomni_rt.backends.fast.load import RESERVE, choose
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.memory.planner import gigabytes, plan
from mindomni_rt.memory.precision import parse_precision

from ..results import FOLDER, FORMAT, write_atomic, write_json
from ..scaled import scaled
from .baselines import language_generate, omnigen_inputs, omnigen_step, omnigen_transformer, transformers_language
from .kernels import Sizes, cases, run_case
from .measure import Meter, Record, ceilings, machine, relative_error
from .report import markdown
from .stages import (
    Preset,
    decode_bytes,
    eager_steps,
    language_request,
    make_backend,
    noise,
    our_decoding,
    our_steps,
    random_model,
    whole_request,
)
from .sweep import sweep

logger = logging.getLogger(__name__)
TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
LOSSY: dict[str, dict[str, Any]] = {
    "guidance in [0, 0.6)": {"guidance_interval": (0.0, 0.6)},
    "step cache 0.1": {"step_cache": 0.1},
}


def presets(name: str) -> Preset:
    """ "full": the published model, 1024² and 512². "toy": four layers, for a CPU."""
    if name == "full":
        return Preset(
            config=scaled("published"), dtype="bfloat16", sides=(1024, 512), steps=50, prompt=100, new=300, negative=100
        )
    return Preset(config=scaled("tiny"), dtype="float32", sides=(96, 64), steps=4, prompt=9, new=8, negative=5)


class Suite:
    """One run: sections in order of worth, each recorded, none able to take the others down."""

    def __init__(self, preset: Preset, device: torch.device, minutes: float, swept: bool = False) -> None:
        self.preset, self.device = preset, device
        cuda = device.type == "cuda"
        self.meter = Meter(device, runs=10 if cuda else 2, deadline=time.perf_counter() + 60 * minutes)
        self.record = Record()
        self.cuda = cuda
        self._eager: dict[int, torch.Tensor] = {}
        self._swept = swept

    def run(self) -> dict[str, Any]:
        """All sections."""
        section, meter = self.record.section, self.meter
        size, copied = (8192, 2 << 30) if self.cuda else (256, 1 << 20)
        found = section(meter, "ceilings", 5, lambda: ceilings(meter, size, copied, self.preset.torch_dtype)) or {}
        section(meter, "kernels", 30, lambda: self._kernels(found))
        if self._swept:
            section(
                meter, "sweep", 60, lambda: sweep(self.preset.config, self._sizes(), meter, None if self.cuda else 1)
            )
            return self.record.data
        self._on_one_model()
        self._clean()
        for name in ("decoder=fp8", "decoder=int8", "language=int8wo,head=int8wo", "language=int4,head=int8wo"):
            section(meter, name, 30, partial(self._precision, name))
            self._clean()
        for budget in self._budgets():
            section(meter, f"budget {gigabytes(budget)}", 40, partial(self._budget, budget))
            self._clean()
        section(meter, "diffusers", 30, self._diffusers)
        self._clean()
        return self.record.data

    def _on_one_model(self) -> None:
        """Baselines first: the fast path takes the weights out of the modules that they run."""
        section, meter, sides = self.record.section, self.meter, self.preset.sides
        model = random_model(self.preset, self.device)
        for side in sides:
            section(meter, f"eager {side}", 20, partial(self._eager_steps, model, side))
        section(meter, "transformers", 60, partial(self._transformers, model))
        exact = make_backend(model, str(self.device), self._exact())
        for side in sides:
            section(meter, f"ours {side}", 20, partial(self._ours, exact, side))
        section(meter, "decoding", 20, partial(self._decoding, exact))
        section(meter, "request", 20, partial(self._requests, exact))

    def _exact(self) -> Precision:
        vae = "bfloat16" if self.preset.dtype == "bfloat16" else "float32"
        return parse_precision(f"vae={vae}", self.preset.dtype)

    def _clean(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def _kernels(self, found: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            done = []
            for case in cases(self.preset.config, self._sizes(), self.device):
                done.append(run_case(case, self.meter, found))
                logger.info("%s", done[-1])
        return {"cases": done}

    def _sizes(self) -> Sizes:
        tokens = (self.preset.sides[0] // 16) ** 2
        cache = 512 if self.cuda else 64
        return Sizes(tokens, self.preset.lengths, cache, self.preset.torch_dtype, self._tolerance())

    def _tolerance(self) -> float:
        return TOLERANCE[self.preset.dtype]

    def _eager_steps(self, model: Any, side: int) -> dict[str, Any]:
        found = eager_steps(self.preset, model, self.meter, side)
        self._eager[side] = found.pop("velocities")
        return found

    def _ours(self, backend: Any, side: int) -> dict[str, Any]:
        found = our_steps(self.preset, backend, self.meter, side, self._eager.get(side))
        bound = max(self._tolerance(), 1e-4)
        if found.get("error_to_eager", 0.0) > bound:
            return {"failed": f"velocities are {found['error_to_eager']:.1e} from the eager ones; bound {bound:.0e}"}
        return found

    def _transformers(self, model: Any) -> dict[str, Any]:
        theirs = transformers_language(model.language)
        new = min(self.preset.new, 64)
        ids = torch.from_numpy(language_request(self.preset, new).token_ids).to(self.device)[None]
        found: dict[str, Any] = {"new_tokens": new}
        for name, static in (("eager", False), ("static_compiled", True)):
            if static and not self.cuda:
                continue  # compiling takes longer than the toy run
            if static and self.meter.left() < 240:
                found[name] = {"skipped": "out of time"}
                continue
            language_generate(theirs, ids, new, static)
            short = self.meter.once(partial(language_generate, theirs, ids, 4, static))[0]
            whole, tokens = self.meter.once(partial(language_generate, theirs, ids, new, static))
            token = (whole - short) / (new - 4)
            found[name] = {"token_s": token, "tokens": tokens[0, ids.shape[1] :][:16].tolist()}
        return found

    def _decoding(self, backend: Any) -> dict[str, Any]:
        found = our_decoding(self.preset, backend, self.meter)
        theirs = self.record.data.get("transformers", {}).get("eager", {}).get("tokens")
        if theirs is not None:
            pairs = zip(found["tokens"], theirs, strict=False)
            # In 16 bits random weights part ways at the first near tie; in float32 they must not.
            found["tokens_as_transformers"] = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return {**found, "weight_bytes": decode_bytes(backend)}

    def _requests(self, backend: Any) -> dict[str, Any]:
        side = self.preset.sides[0]
        whole_request(self.preset, backend, self.meter, side)
        base = whole_request(self.preset, backend, self.meter, side)
        exact = base.pop("latents")
        lossy = {}
        for name, options in LOSSY.items():
            found = whole_request(self.preset, backend, self.meter, side, **options)
            distance = relative_error(found.pop("latents"), exact)
            lossy[name] = {"denoiser_s": found["stages_s"]["denoiser"], "latent_distance": distance}
        weights = sum(t.numel() * t.element_size() for t in _tensors(backend))
        work = self.preset.work(side)
        planned = plan(self.preset.config, work, precision=backend.options.precision).peak
        return {
            **base,
            "side": side,
            "weight_bytes": weights,
            "planned_bytes": planned,
            "lossy (random weights)": lossy,
        }

    def _precision(self, name: str) -> dict[str, Any]:
        model = random_model(self.preset, self.device)
        backend = make_backend(model, str(self.device), parse_precision(name, self.preset.dtype))
        side = self.preset.sides[0]
        if name.startswith("decoder"):
            return our_steps(self.preset, backend, self.meter, side, self._eager.get(side))
        return self._decoding(backend)

    def _budgets(self) -> list[int]:
        """Bytes of cards that people own; at toy size, too little for everything to stay."""
        if self.cuda:
            return [size * 10**9 for size in (8, 12, 16, 24)]
        work = self.preset.work(self.preset.sides[0])
        return [int(0.7 * plan(self.preset.config, work, precision=Precision.uniform(self.preset.dtype)).peak)]

    def _budget(self, budget: int) -> dict[str, Any]:
        """A whole request within a budget, twice: parts come and go, and the peak must stay below."""
        preset, side = self.preset, self.preset.sides[0]
        device = str(self.device)
        precision, resident = choose(preset.config, preset.dtype, None, budget, device, preset.work(side))
        backend = make_backend(random_model(preset, self.device), device, precision, resident)
        self._clean()
        whole_request(preset, backend, self.meter, side)
        found = whole_request(preset, backend, self.meter, side)
        del found["latents"]
        room = budget - (RESERVE if self.cuda else 0)
        loads = backend.residency.loads
        return {**found, "precision": str(precision), "resident": resident, "loads": loads, "room_bytes": room,
                "under": found["peak_bytes"] <= room}  # fmt: skip

    def _diffusers(self) -> dict[str, Any]:
        with self.device:
            theirs = omnigen_transformer(self.preset.config.decoder, sum(self.preset.lengths) + 1)
        theirs = theirs.to(self.preset.torch_dtype).eval()
        side = self.preset.sides[0]
        latents = torch.from_numpy(noise(side)).to(self.device, self.preset.torch_dtype)
        inputs = omnigen_inputs(self.preset.lengths, (side // 16) ** 2, self.device)
        omnigen_step(theirs, latents, 0.5, inputs)
        times = sorted(self.meter.once(lambda: omnigen_step(theirs, latents, 0.5, inputs))[0] for _ in range(3))
        return {"step_s": times[1], "note": "random weights of its own; recomputes the prefix in every step"}


def _tensors(backend: Any) -> list[torch.Tensor]:
    modules = (backend.model, backend.language_stack, backend.decoder_stack)
    found = {t.data_ptr(): t for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta}
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command of the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description="speed on one GPU")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--preset", choices=("full", "toy"), default="full")
    parser.add_argument("--minutes", type=float, default=8.7, help="sections that would end later are left out")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the JSON and the table")
    parser.add_argument("--sweep", action="store_true", help="kernels and every tile of their launch tables, no stages")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("error: this PyTorch finds no CUDA device; try --device cpu --preset toy\n")
        return 2
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    preset = presets(options.preset)
    suite = Suite(preset, device, options.minutes, options.sweep)
    began = time.perf_counter()
    sections = suite.run()
    now = datetime.datetime.now(datetime.UTC)
    data = {
        "format": FORMAT,
        "kind": "gpu_suite",
        "date": now.isoformat(timespec="seconds"),
        "command": "python -m benchmarks gpu " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "machine": machine(device),
        "preset": options.preset,
        "model": {"config": preset.config.to_dict(), "dtype": preset.dtype},
        "wall_s": round(time.perf_counter() - began, 1),
        "sections": sections,
    }
    name = f"{now:%Y-%m-%d-%H%M}-gpu-suite-{options.preset}-{device.type}"
    write_json(options.out / f"{name}.json", data)
    table = markdown(data)
    write_atomic(options.out / f"{name}.md", table)
    sys.stdout.write(table)
    wrong = [c["name"] for c in (sections.get("kernels") or {}).get("cases", ()) if not c.get("right")]
    failed = [k for k, v in sections.items() if isinstance(v, dict) and "failed" in v]
    return 1 if wrong or failed else 0


if __name__ == "__main__":
    sys.exit(main())
