"""mindomni export build | verify | inspect | plan | rehearse | products | cache."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mindomni_rt.bundle.contracts import PROFILES
from mindomni_rt.bundle.manifest import open_bundle, read_manifest
from mindomni_rt.bundle.writing import check_name
from mindomni_rt.checks import Whole, shown
from mindomni_rt.commands import Parser, front_door
from mindomni_rt.demo import DEMO_MODELS, DEMO_NAME
from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import try_file
from mindomni_rt.loading import resolve_checkpoint
from mindomni_rt.options import parse_size
from mindomni_rt.outputs import check_target
from mindomni_rt.request import MAX_SIDE

from .describe import describe
from .log import build_log
from .prompts import DEFAULT_PROMPTS, read_prompts
from .record import append, build_run, check_record, resident_peak, watching
from .targets import PRECISIONS, choose, parse_target, stages_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a bundle that fails verification, 2 for a mistake in what was asked, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    return front_door(lambda: _run(_parser().parse_args(given, argparse.Namespace(given=given))), extra="export")


def _run(options: argparse.Namespace) -> int:
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(options.verbose, 2)]
    logging.basicConfig(level=level, format="%(message)s")
    for handler in logging.getLogger().handlers:
        handler.setLevel(level)
    return int(options.run(options))


def _parser() -> Parser:
    parser = Parser(prog="mindomni export", description="From a checkpoint to a bundle.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser("build", help="compile a checkpoint into a bundle")
    build.add_argument("checkpoint", type=Path, help="a folder, a hub id, or demo (the small model)")
    build.add_argument("--target", required=True, help="cpu, sm_89, rtx4090, dgx-spark, … or several: sm_86,sm_89")
    build.add_argument(
        "--precision", choices=[p for p in PRECISIONS if p != "mixed"], help="default: the target's table"
    )
    build.add_argument("--stage", action="append", default=[], metavar="STAGE=PRECISION", help="for one stage")
    build.add_argument("--profile", choices=PROFILES, default="1024", help="image sizes an engine serves")
    build.add_argument(
        "--first-step",
        choices=("full", "condition_only"),
        default="full",
        help="condition_only: engines for it too",
    )
    build.add_argument(
        "--attention", choices=("native", "triton"), default="native", help="triton: our kernel (tensorrt)"
    )
    build.add_argument("--calibration", type=Path, metavar="FILE", help="prompts, one a line, for int8, fp8 and nvfp4")
    build.add_argument("--calibration-size", type=int, metavar="PIXELS", help="default: the model's own, 512 at most")
    build.add_argument("--out", required=True, type=Path, help="the folder of the bundle")
    build.add_argument("--overwrite", action="store_true", help="replace the bundle of that name")
    build.add_argument("--no-cache", action="store_true", help="make graphs, ranges and engines anew, keep none")
    build.add_argument("-q", "--quiet", action="store_true", help="no line for each graph and engine")
    build.add_argument("--record", type=Path, help="a JSON file to append time, memory and bytes of the build to")
    build.set_defaults(run=_build)

    verify = commands.add_parser("verify", help="check hashes, run every stage, compare with the checkpoint")
    verify.add_argument("bundle", type=Path, help="a folder, or demo")
    verify.add_argument("--against", type=Path, metavar="CHECKPOINT", help="compare each stage with its result")
    verify.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="print a bundle's manifest")
    inspect.add_argument("bundle", type=Path, help="a folder, or demo")
    inspect.add_argument("--json", action="store_true", help="the whole manifest; hashes are not checked")
    inspect.set_defaults(run=_inspect)

    plan = commands.add_parser("plan", help="what would be built and what it needs, before any work")
    plan.add_argument("--device", required=True, metavar="NAME", help="RTX 4090, orin, thor, h100, …")
    plan.add_argument("--checkpoint", type=Path, help="default: the published sizes")
    plan.add_argument(
        "--precision", choices=[p for p in PRECISIONS if p != "mixed"], help="default: the target's table"
    )
    plan.add_argument("--stage", action="append", default=[], metavar="STAGE=PRECISION", help="for one stage")
    plan.add_argument(
        "--size", metavar="WxH", help="pixels; one number for a square (default: the checkpoint's own, else 1024)"
    )
    plan.add_argument("--memory-budget", metavar="SIZE", help="8GiB; default: the device's memory")
    plan.set_defaults(run=_plan)

    rehearse = commands.add_parser("rehearse", help="time and memory of a build at published size")
    rehearse.add_argument("part", choices=("language", "connector", "decoder", "vae"), help="of the published sizes")
    rehearse.add_argument("--target", required=True, help="as of build")
    rehearse.add_argument(
        "--precision", choices=[p for p in PRECISIONS if p != "mixed"], default="bf16", help="default: bf16"
    )
    rehearse.add_argument("--layers", type=int, help="default: all of them")
    rehearse.add_argument("--folder", type=Path, help="for the weights while it runs; default: the temporary one")
    rehearse.add_argument("--out", type=Path, help="a JSON file to append the result to")
    rehearse.set_defaults(run=_rehearse)

    products = commands.add_parser("products", help="forms of rounded products, compared on this machine's CPU")
    products.add_argument("--layers", type=int, default=1, help="of the published language model (default 1)")
    products.add_argument("--rounds", type=int, default=7, help="runs of each form, in turn (default 7)")
    products.add_argument("--provider", action="append", help="of onnxruntime, or several")
    products.add_argument("--folder", type=Path, help="for the weights while it runs; default: the temporary one")
    products.add_argument("--out", type=Path, help="a JSON file to write the result to")
    products.set_defaults(run=_products)

    cache = commands.add_parser("cache", help="what builds keep for later ones, and its size")
    cache.add_argument("--clear", action="store_true", help="remove it")
    cache.set_defaults(run=_cache)
    for command in (build, verify, inspect, plan, rehearse, products, cache):
        command.add_argument("-v", "--verbose", action="count", default=0, help="show the log; twice: all of it")
    return parser


def _bundle(given: Path) -> Path:
    """The folder of a bundle; "demo" is the package's own where no folder has that name."""
    return DEMO_MODELS[0][0] if str(given) == DEMO_NAME and not given.exists() else given


def _build(options: argparse.Namespace) -> int:
    target = parse_target(options.target)
    choice = choose(target, options.precision, stages_of(options.stage))  # refuses before torch is even imported
    checkpoint = resolve_checkpoint(options.checkpoint)
    if options.calibration_size is not None:
        try:
            Whole(16, MAX_SIDE, 16)(options.calibration_size)
        except ValueError as error:
            raise BadRequestError(f"--calibration-size {options.calibration_size}: expected {error}") from None
    if options.record:
        check_record(options.record, "--record")
    prompts = read_prompts(options.calibration) if options.calibration else DEFAULT_PROMPTS
    check_name(options.out, options.overwrite)  # before a log is written, and again when the bundle takes its name
    try_file(options.out)
    if not options.quiet:
        _say(f"loading torch and {options.checkpoint} …")  # seconds before the first graph
    from .build import BuildRequest, build
    from .cache import default_cache

    request = BuildRequest(
        checkpoint=checkpoint,
        out=options.out,
        target=target,
        choice=choice,
        profile=options.profile,
        attention=options.attention,
        condition_only=options.first_step == "condition_only",
        prompts=prompts,
        calibration_size=options.calibration_size,
        cache=None if options.no_cache else default_cache(),
        overwrite=options.overwrite,
        progress=_progress if sys.stderr.isatty() and not options.quiet else None,
        say=None if options.quiet or options.verbose else _say,  # -v shows the log, which has the same lines
    )
    began = time.perf_counter()
    with build_log(options.out) as log, watching() as peak:
        manifest = build(request)
    if options.record:
        command = shlex.join(["mindomni", "export", *options.given])
        run = build_run(manifest, command, time.perf_counter() - began, peak["bytes"], resident_peak())
        append("builds of bundles", run, options.record)
    print(describe(manifest))
    print(f"written to {options.out}; log: {log}; cache: {request.cache or 'not used'}")
    return 0


def _progress(phase: str, done: int, steps: int) -> bool:
    end = "\n" if done == steps else ""
    print(f"\r{phase[:60]:60} {done}/{steps}", end=end, file=sys.stderr, flush=True)
    return True


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _products(options: argparse.Namespace) -> int:
    from .products import compare, record, table

    if options.out:
        check_target(options.out)
    for name, most in (("layers", 28), ("rounds", 1000)):
        if not 1 <= getattr(options, name) <= most:
            raise BadRequestError(f"--{name} {shown(getattr(options, name))}: expected 1 to {most}")
    _check_folder(options.folder)
    found = compare(options.layers, options.rounds, options.folder, options.provider or ["CPUExecutionProvider"])
    print(table(found))
    if options.out:
        record(found, options.out)
    return 0


def _check_folder(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise BadRequestError(f"--folder {folder}: no such folder")


def _cache(options: argparse.Namespace) -> int:
    from .cache import cache_sizes, clear_cache, default_cache

    folder = default_cache()
    sizes = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in cache_sizes(folder).items())
    print(f"{folder}: {sizes}")
    if options.clear:
        clear_cache(folder)
        print("emptied")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .verify import table, verify

    rows = verify(
        _bundle(options.bundle), resolve_checkpoint(options.against) if options.against else None, options.device
    )
    print(table(rows))
    if options.against is None:
        print("every stage ran; nothing was compared. Give --against CHECKPOINT to compare")
    return 0 if all(row.passed for row in rows) else 1


def _inspect(options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps(json.loads(read_manifest(_bundle(options.bundle)).to_json()), indent=1))
        return 0
    print(describe(open_bundle(_bundle(options.bundle), again=True).manifest))
    print("all hashes agree")
    return 0


def _plan(options: argparse.Namespace) -> int:
    from .plan import plan_build, report

    if options.device.strip().lower() == "cpu":
        raise BadRequestError("a plan is of a GPU; for this machine's CPU: mindomni doctor --model CHECKPOINT")
    plan = plan_build(
        options.device,
        checkpoint=resolve_checkpoint(options.checkpoint) if options.checkpoint else None,
        precision=options.precision,
        stages=stages_of(options.stage),
        size=parse_size(options.size) if options.size else None,
        budget=options.memory_budget,
    )
    print(report(plan))
    return 0


def _rehearse(options: argparse.Namespace) -> int:
    target = parse_target(options.target)
    choose(target, options.precision)
    _check_folder(options.folder)
    from .rehearse import record, rehearse, table

    if options.out:
        check_record(options.out, "--out")
    rows = rehearse(options.part, target, layers=options.layers, precision=options.precision, folder=options.folder)
    print(table(rows))
    if options.out:
        record(rows, options.out)
    return 0
