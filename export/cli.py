"""python -m export build | verify | inspect | plan | rehearse."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mindomni_rt.bundle.contracts import PROFILES
from mindomni_rt.bundle.manifest import Manifest, open_bundle, read_manifest
from mindomni_rt.errors import MindOmniError

from .targets import PRECISIONS, choose, parse_target, stages_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a bundle that fails verification, 2 for a mistake in what was asked."""
    options = _parser().parse_args(arguments)
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(options.verbose, 2)]
    logging.basicConfig(level=level, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(level)
    try:
        return int(options.run(options))
    except MindOmniError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description="From a checkpoint to a bundle.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="compile a checkpoint into a bundle")
    build.add_argument("checkpoint", type=Path)
    build.add_argument("--target", required=True, help="cpu, sm_89, rtx4090, dgx-spark, … or several: sm_86,sm_89")
    build.add_argument(
        "--precision", choices=[p for p in PRECISIONS if p != "mixed"], help="default: the target's table"
    )
    build.add_argument("--stage", action="append", default=[], metavar="STAGE=PRECISION", help="for one stage")
    build.add_argument("--profile", choices=PROFILES, default="1024", help="image sizes an engine serves")
    build.add_argument("--first-step", choices=("full", "condition_only"), default="full")
    build.add_argument(
        "--attention", choices=("native", "triton"), default="native", help="triton: our kernel (tensorrt)"
    )
    build.add_argument("--calibration", type=Path, metavar="FILE", help="prompts, one a line, for int8, fp8 and nvfp4")
    build.add_argument("--calibration-size", type=int, default=512, metavar="PIXELS")
    build.add_argument("--out", required=True, type=Path)
    build.add_argument("--overwrite", action="store_true")
    build.add_argument("--no-cache", action="store_true", help="build engines anew")
    build.set_defaults(run=_build)

    verify = commands.add_parser("verify", help="check hashes, run every stage, compare with the checkpoint")
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--against", type=Path, metavar="CHECKPOINT")
    verify.add_argument("--device", default="auto")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="print a bundle's manifest")
    inspect.add_argument("bundle", type=Path)
    inspect.add_argument("--json", action="store_true")
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser("plan", help="what would be built and what it needs, before any work")
    plan.add_argument("--device", required=True, metavar="NAME", help="RTX 4090, orin, thor, h100, …")
    plan.add_argument("--checkpoint", type=Path, help="default: the published sizes")
    plan.add_argument("--precision", choices=[p for p in PRECISIONS if p != "mixed"])
    plan.add_argument("--stage", action="append", default=[], metavar="STAGE=PRECISION")
    plan.add_argument("--size", type=int, default=1024, metavar="PIXELS")
    plan.add_argument("--memory-budget", metavar="SIZE", help="8GiB; default: the device's memory")
    plan.set_defaults(run=_plan)

    rehearse = commands.add_parser("rehearse", help="time and memory of a build at published size")
    rehearse.add_argument("part", choices=("language", "connector", "decoder", "vae"))
    rehearse.add_argument("--target", required=True)
    rehearse.add_argument("--precision", choices=[p for p in PRECISIONS if p != "mixed"], default="bf16")
    rehearse.add_argument("--layers", type=int, help="default: all of them")
    rehearse.add_argument("--folder", type=Path, help="for the weights while it runs; default: the temporary one")
    rehearse.add_argument("--out", type=Path, help="a JSON file to append the result to")
    rehearse.set_defaults(run=_rehearse)
    for command in (build, verify, inspect, plan, rehearse):
        command.add_argument("-v", "--verbose", action="count", default=0)
    return parser


def _build(options: argparse.Namespace) -> int:
    target = parse_target(options.target)
    choice = choose(target, options.precision, stages_of(options.stage))  # refuses before torch is even imported
    from .build import BuildRequest, build
    from .engines import default_cache
    from .quantize import DEFAULT_PROMPTS, read_prompts

    request = BuildRequest(
        checkpoint=options.checkpoint,
        out=options.out,
        target=target,
        choice=choice,
        profile=options.profile,
        attention=options.attention,
        condition_only=options.first_step == "condition_only",
        prompts=read_prompts(options.calibration) if options.calibration else DEFAULT_PROMPTS,
        calibration_size=options.calibration_size,
        cache=None if options.no_cache else default_cache(),
        overwrite=options.overwrite,
        progress=_progress if sys.stderr.isatty() else None,
    )
    log = options.out.with_name(f"{options.out.name}.build.log")
    with _logging_to(log):
        manifest = build(request)
    print(describe(manifest))
    print(f"written to {options.out}; what was said while building: {log}")
    return 0


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Writes all that the build and TensorRT say to a file, whatever the terminal shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    loggers = [logging.getLogger(name) for name in ("export", "mindomni_rt")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        yield
    except Exception as error:
        logging.getLogger("export").error("stopped: %s", error)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()


def _progress(phase: str, done: int, steps: int) -> bool:
    end = "\n" if done == steps else ""
    print(f"\r{phase[:60]:60} {done}/{steps}", end=end, file=sys.stderr, flush=True)
    return True


def _verify(options: argparse.Namespace) -> int:
    from .verify import table, verify

    rows = verify(options.bundle, options.against, options.device)
    print(table(rows))
    return 0 if all(row.passed for row in rows) else 1


def _inspect(options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(json.loads(read_manifest(options.bundle).to_json()), indent=1))
        return 0
    print(describe(open_bundle(options.bundle).manifest))
    print("all hashes agree")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .plan import plan_build, report

    plan = plan_build(
        options.device,
        checkpoint=options.checkpoint,
        precision=options.precision,
        stages=stages_of(options.stage),
        size=options.size,
        budget=options.memory_budget,
    )
    print(report(plan))
    return 0


def _rehearse(options: argparse.Namespace) -> int:
    target = parse_target(options.target)
    choose(target, options.precision)
    from .rehearse import record, rehearse, table

    rows = rehearse(options.part, target, layers=options.layers, precision=options.precision, folder=options.folder)
    print(table(rows))
    if options.out:
        record(rows, options.out)
    return 0


def describe(manifest: Manifest) -> str:
    """A manifest as a table."""
    targets = ", ".join(manifest.targets) or "any device"
    lines = [
        f"format {manifest.format} · {manifest.runtime} {manifest.runtime_version} · {targets} · {manifest.dtype} · "
        f"profile {manifest.profile.name}",
        f"{'graph':15} {'file':22} {'precision':9} {'MB':>9} {'build s':>8} {'weight error':>12}  attention",
    ]
    shared: set[str] = set()
    for name, graph in manifest.graphs.items():
        files = [f for f in (graph.file, *graph.data) if f not in shared]
        shared.update(files)
        size = sum(manifest.files[f].bytes for f in files) / 1e6
        report = graph.report
        seconds = report.get("build_seconds", report.get("export_seconds", 0.0))
        error = f"{report['weight_error']:.4f}" if "weight_error" in report else "-"
        attention = "-"
        if report.get("attention"):
            attention = f"{report['attention']} {'fused' if report['fused_attention'] else 'decomposed'}"
        lines.append(
            f"{name:15} {graph.file:22} {graph.precision:9} {size:9.1f} {seconds:8.1f} {error:>12}  {attention}"
        )
    total = sum(entry.bytes for entry in manifest.files.values())
    lines.append(f"{len(manifest.files)} files, {total / 1e6:.1f} MB (data that graphs share is counted once)")
    return "\n".join(lines)
