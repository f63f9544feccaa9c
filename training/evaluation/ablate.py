"""The paper's ablations at small scale: one command, one table with seed ranges, one plot a study.

    mindomni train ablate --base runs/shapes --out runs/ablate [--only NAME …] [--seeds 0 1 2] [--jobs 2]

Each study is data: for each arm the stages to run, the model of the base run to start from, and the changed settings.
A finished arm is not run again, so the command can be stopped and repeated; arms that two studies share run once. All
arms of a seed run before the next seed, so that a table of fewer seeds is complete. Where a short budget could decide
the order, a study has its arms at two budgets.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from mindomni_rt.checkout import commit
from mindomni_rt.commands import Parser
from mindomni_rt.errors import BadRequestError
from mindomni_rt.model.connector import Connector
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.outputs import check_target, read_json, write_atomic, write_json

from ..config import CONFIGS, load_config
from ..loop.runs import finish, open_contexts, start
from ..outputs import save_checkpoint
from ..suites import Settings, evaluate
from .plots import plot_study, slug


@dataclass(frozen=True)
class Leg:
    """One stage of an arm: its overrides, and its steps as a share of the base configuration's."""

    stage: str
    overrides: tuple[str, ...] = ()
    share: float = 1.0


@dataclass(frozen=True)
class Arm:
    """A line of the table. start: the base's model that it begins with. layers: a new connector of that depth."""

    name: str
    start: str
    legs: tuple[Leg, ...]
    layers: int | None = None

    @property
    def slug(self) -> str:
        """A folder name from everything but `name`: equal arms of two studies share it."""
        parts = [self.start] + [f"{g.stage} {g.share:.2g} {' '.join(g.overrides)}" for g in self.legs]
        depth = [] if self.layers is None else [f"{self.layers} layers"]
        return slug(" ".join([*parts, *depth]))


def _rgpo(name: str, *overrides: str) -> Arm:
    return Arm(name, "sft", (Leg("rgpo", overrides),))


def _pretrain(name: str, share: float, *overrides: str, layers: int | None = None) -> Arm:
    return Arm(name, "prior", (Leg("pretrain", overrides, share),), layers)


SHORT, ENOUGH = 1 / 6, 1 / 2  # shares of the base's budget: stage 1 half trained, and converged
STUDIES: dict[str, tuple[Arm, ...]] = {
    "stages": (
        Arm("1", "pretrain", ()),
        Arm("1+2", "sft", ()),
        Arm("1+3", "pretrain", (Leg("rgpo"),)),
        _rgpo("1+2+3"),
    ),
    "connector": tuple(
        _pretrain(f"{depth} layers, {name} budget", share, layers=depth)
        for name, share in (("1/6", SHORT), ("1/2", ENOUGH))
        for depth in (0, 1, 2, 4)
    ),
    "distillation": (
        _pretrain("on, 1/6 budget", SHORT, layers=2),
        _pretrain("off, 1/6 budget", SHORT, "distill.weight=0.0", layers=2),
        _pretrain("on, 1/2 budget", ENOUGH, layers=2),
        _pretrain("off, 1/2 budget", ENOUGH, "distill.weight=0.0", layers=2),
        _pretrain("off, whole budget", 1.0, "distill.weight=0.0", layers=2),
    ),
    "image KL": (
        _rgpo("0", "rgpo.beta_image=0.0"),
        _rgpo("base / 10", "rgpo.beta_image=32.0"),
        _rgpo("base"),
        _rgpo("velocity error", "rgpo.image_term=velocity", "rgpo.beta_image=10.0"),
    ),
    "text KL": (_rgpo("0", "rgpo.beta_text=0.0"), _rgpo("base"), _rgpo("10 x base", "rgpo.beta_text=0.4")),
    "group size": (
        _rgpo("G = 2, 32 prompts", "rgpo.group=2", "optim.batch=32"),
        _rgpo("G = 4, 16 prompts", "rgpo.group=4", "optim.batch=16"),
        _rgpo("G = 8, 8 prompts"),
    ),
    "rewards": (
        _rgpo("format", "rgpo.rewards=['format']", "rgpo.weights=[1.0]"),
        _rgpo("consistency", "rgpo.rewards=['consistency']", "rgpo.weights=[1.0]"),
        _rgpo("both"),
    ),
}


COLUMNS = ("text", "image", "direct", "caption", "format")


def score(model: Path, count: int, seed: int) -> dict[str, float]:
    """Shares of held-out prompts that are right, by the exact verifier.

    text: the answer names the scene that was asked for; image: the image shows it, with thinking; direct: without
    thinking; caption: images of plain captions; format: closed tags.
    """
    contexts = open_contexts(str(model), torch.device("cpu"), 96)
    found = evaluate(contexts, ("riddles", "direct", "captions"), Settings(n=count, seed=seed))
    riddles = found["riddles"]
    shares = {n: riddles[n]["share"] for n in ("text", "image", "format")}
    return {**shares, "direct": found["direct"]["image"]["share"], "caption": found["captions"]["image"]["share"]}


def fresh_connector(source: Path, out: Path, layers: int, seed: int) -> Path:
    """The checkpoint `source` with an untrained connector of another depth."""
    model, _ = load_model(source)
    stack = replace(model.config.connector.stack, num_layers=layers)
    torch.manual_seed(seed)
    model.connector = Connector(replace(model.config.connector, stack=stack))
    save_checkpoint(model, out, source)
    return out


def run_arm(arm: Arm, base: Path, out: Path, seed: int, scale: float, count: int) -> dict[str, Any]:
    """Runs an arm with a seed in its folder below `out` unless its result is there; returns the result.

    Raises BadRequestError where the base run lacks what the arm starts from.
    """
    folder = out / arm.slug / str(seed)
    result = folder / "result.json"
    if result.exists():
        return {**read_json(result), "arm": arm.name}
    began, model = time.perf_counter(), base / arm.start / "model"
    if not model.is_dir():
        raise BadRequestError(f"{model} does not exist: --base is the folder that training/run_small.sh fills")
    if arm.layers is not None:
        model = fresh_connector(model, folder / "start", arm.layers, seed)
    run: dict[str, Any] = {}
    for leg in arm.legs:
        if _is_base(arm, leg, base, seed, scale):
            model, run = base / leg.stage / "model", {"stage": leg.stage, "run": str(base / leg.stage)}
            continue
        path = CONFIGS / f"shapes-{leg.stage}.toml"
        whole = load_config(path)
        steps = max(1, round(whole.optim.steps * leg.share * scale))
        settings = [f"model={model}", f"out={folder / leg.stage}", f"seed={seed}", f"optim.steps={steps}"]
        settings += [f"evaluate_every={max(1, steps // 4)}", "evaluate_count=16", "log_every=1", "device=cpu"]
        settings += [f"data.cache_latents={base / 'latents'}", f"rgpo.reward_model={base / 'reward'}", *leg.overrides]
        trainer = start(load_config(path, settings), bar=False)
        trainer.run()
        model = finish(trainer)
        run = {"stage": leg.stage, "steps": steps, "run": str(folder / leg.stage)}
    found = {
        "arm": arm.name,
        "seed": seed,
        **run,
        **score(model, count, seed),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(result, found)
    return found


def _is_base(arm: Arm, leg: Leg, base: Path, seed: int, scale: float) -> bool:
    """Whether the base run is this arm: same start, settings, budget and seed."""
    path, before = base / leg.stage / "config.json", {"pretrain": "prior", "sft": "pretrain", "rgpo": "sft"}[leg.stage]
    if leg.overrides or leg.share * scale != 1 or arm.layers is not None or arm.start != before or len(arm.legs) > 1:
        return False
    if not path.exists() or not (base / leg.stage / "model" / "connector.safetensors").exists():
        return False
    done = read_json(path)
    wanted = json.loads(json.dumps(load_config(CONFIGS / f"shapes-{leg.stage}.toml", [f"seed={seed}"]).to_dict()))
    return all(_without_places(done).get(k) == v for k, v in _without_places(wanted).items())


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of a configuration that decide its result: no folders, no intervals of logging."""
    kept = {k: v for k, v in config.items() if k in ("seed", "optim", "lora", "distill", "sft")}
    kept |= {f"data.{k}": v for k, v in config["data"].items() if k != "cache_latents"}
    return kept | {f"rgpo.{k}": v for k, v in config["rgpo"].items() if k != "reward_model"}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: each study, each arm, mean and range over seeds in per cent."""
    lines = []
    for study, rows in results.items():
        lines += [f"### {study}", "", f"| arm | seeds | {' | '.join(COLUMNS)} |", "| --- " * (2 + len(COLUMNS)) + "|"]
        for name in dict.fromkeys(r["arm"] for r in rows):
            mine = [r for r in rows if r["arm"] == name]
            cells = []
            for column in COLUMNS:
                values = [100 * r[column] for r in mine]
                spread = f" ({min(values):.0f} to {max(values):.0f})" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.1f}{spread}")
            lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Prints the table; writes ablation.json, ablation.md and a PNG for each study."""
    parser = Parser(prog="mindomni train ablate", description=__doc__.partition("\n")[0])
    parser.add_argument("--base", type=Path, default=Path("runs/shapes"), help="what run_small.sh made")
    parser.add_argument("--out", type=Path, default=Path("runs/ablate"))
    parser.add_argument("--only", nargs="+", metavar="STUDY", help=f"of: {', '.join(STUDIES)}")
    parser.add_argument("--arm", nargs="+", metavar="ARM", help="only arms of these names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="of every budget")
    parser.add_argument("--jobs", type=int, default=1, help="arms at a time, a process and a thread each")
    parser.add_argument("--count", type=int, default=200, help="prompts of each evaluation")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.only or ()) - set(STUDIES))
    if unknown:
        raise BadRequestError(f"--only {unknown[0]!r}: expected one of {', '.join(STUDIES)}")
    every = {a.name for s, arms in STUDIES.items() if not options.only or s in options.only for a in arms}
    strange = sorted(set(options.arm or ()) - every)
    if strange:
        raise BadRequestError(f"--arm {strange[0]!r}: expected some of {', '.join(sorted(every))}")
    if not 1 <= options.jobs <= 1024:
        raise BadRequestError(f"--jobs {options.jobs}: expected 1 to 1024")
    check_target(options.out / "ablation.json")
    chosen = [
        (study, arm)
        for study, arms in STUDIES.items()
        for arm in arms
        if (not options.only or study in options.only) and (not options.arm or arm.name in options.arm)
    ]
    results: dict[str, list[dict[str, Any]]] = {}
    runs = [(study, arm, seed) for seed in options.seeds for study, arm in chosen]
    for study, found in _run_all(runs, options):
        results.setdefault(study, []).append(found)
        shown = " ".join(f"{k} {found[k]:.3f}" for k in COLUMNS)
        print(f"{study}: {found['arm']}, seed {found['seed']}: {shown} ({found['seconds']} s)", flush=True)
        _write(options, results)
    print(table(results))
    return 0


def _run_all(runs: Sequence[tuple[str, Arm, int]], options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results in order; arms that differ run in `--jobs` processes of their own, equal ones once."""

    def arguments(arm: Arm, seed: int) -> tuple[Arm, Path, Path, int, float, int]:
        return arm, options.base, options.out, seed, options.scale, options.count

    if options.jobs == 1:
        for study, arm, seed in runs:
            yield study, run_arm(*arguments(arm, seed))
        return
    with ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        first: dict[tuple[str, int], Future[dict[str, Any]]] = {}
        for _, arm, seed in runs:
            if (arm.slug, seed) not in first:
                first[arm.slug, seed] = pool.submit(run_arm, *arguments(arm, seed))
        try:
            for study, arm, seed in runs:
                yield study, {**first[arm.slug, seed].result(), "arm": arm.name}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _write(options: argparse.Namespace, results: dict[str, list[dict[str, Any]]]) -> None:
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit() or "unknown",
        "machine": f"{_processor()}, 1 thread an arm, {options.jobs} at a time",
        "torch": torch.__version__,
        "scale": options.scale,
        "prompts": options.count,
        "seeds": options.seeds,
        "not_run": _not_run(results),
        "results": {s: [{k: v for k, v in r.items() if k != "run"} for r in rows] for s, rows in results.items()},
    }
    write_json(options.out / "ablation.json", record)
    write_atomic(options.out / "ablation.md", table(results))
    for study in results:
        plot_study(study, results[study], options.out)


def _not_run(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Studies and arms without a result."""
    missing = []
    for study, arms in STUDIES.items():
        done = {r["arm"] for r in results.get(study, ())}
        left = [a.name for a in arms if a.name not in done]
        if left:
            missing.append(study if not done else f"{study}: {'; '.join(left)}")
    return missing


def _processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
