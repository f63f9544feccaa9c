"""The command `mindomni`: generate, edit, understand, info, demo, and the packages' own commands.

Nothing else in the package prints.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import logging
import secrets
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import __version__, doctor, extras, load
from .bundle.manifest import is_bundle
from .checkpoint.hub import resolve
from .checks import shown
from .commands import front_door
from .demo import DEMO_MODELS, DEMO_NAME, DEMO_PROMPT, DEMO_SETTINGS, runnable_demo, tell_small
from .errors import BadRequestError, MissingExtraError
from .events import AnswerEvent, Event, GenerationResult, ImageEvent, StepEvent, TextEvent
from .inputs.saving import KINDS, numbered
from .model.random import command as random_checkpoint
from .options import HANDED_OVER, build_parser, parse_adapter, parse_interval, parse_size
from .progress import step_bar
from .request import Request, UnderstandRequest


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for what the user got wrong, 130 when interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _accept_any_text()
    return front_door(lambda: _run(given))


def _run(given: list[str]) -> int:
    if given and given[0] in HANDED_OVER:
        return _hand_over(given[0], given[1:])
    if given and not given[0].startswith("-") and given[0] not in _COMMANDS:
        near = get_close_matches(given[0], [*_COMMANDS, *HANDED_OVER], 1)
        instead = f"did you mean {near[0]}?" if near else f"expected one of {', '.join([*_COMMANDS, *HANDED_OVER])}"
        raise BadRequestError(f"there is no command {shown(given[0])}; {instead} (see mindomni --help)")
    options = build_parser().parse_args(given)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.ERROR if options.quiet else logging.WARNING,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    return int(_COMMANDS[options.command](options))


def _accept_any_text() -> None:
    """A console that is not UTF-8 shows a question mark for what it lacks, instead of ending the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print_json(data: Any) -> None:
    """JSON whole on every console: escapes where it is not UTF-8, where a question mark would change the text."""
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    print(json.dumps(data, ensure_ascii=encoding != "utf8"))


def _hand_over(command: str, rest: Sequence[str]) -> int:
    """Runs a package's own command line, imported only now."""
    module, before, extra, _ = HANDED_OVER[command]
    try:
        run = importlib.import_module(module).main
    except ImportError as error:
        raise MissingExtraError(error.name or str(error), extra) from error
    return int(run([*before, *rest]) or 0)


def _load(options: argparse.Namespace) -> Any:
    weights = options.backend == "torch" or bool(options.adapter)
    folder = resolve(options.model, options.revision, None, options.offline, checkpoint=weights)
    if folder in [model for model, _ in DEMO_MODELS] and options.model == DEMO_NAME:
        tell_small(folder)
    if options.adapter and is_bundle(folder):
        raise BadRequestError(f"--adapter: {folder} is a bundle; adapters need a checkpoint, on the torch backend")
    pipe = load(
        folder,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        precision=options.precision,
        memory_budget=options.memory_budget,
        fast=False if options.adapter else None,
    )
    for item in options.adapter:
        path, scale = parse_adapter(item)
        pipe.load_adapter(path, scale=scale)
    return pipe


def _generate(options: argparse.Namespace) -> int:
    width, height = parse_size(options.size) if options.size else (None, None)
    request: dict[str, Any] = dict(
        image=options.image,
        think=options.think,
        cascade=options.cascade,
        height=height,
        width=width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        negative_prompt=options.negative,
        seed=options.seed,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        first_step=options.first_step,
        draft_tokens=options.draft_tokens,
        guidance_interval=parse_interval(options.guidance_interval),
        solver=options.solver,
        step_cache=options.step_cache,
        edit_features=options.edit_features,
        num_images=options.num_images,
        max_image_tokens=options.max_image_tokens or None,
    )
    Request(prompt=options.prompt, **request)  # errors in it are reported before gigabytes are read
    paths = _targets(options.out, options.num_images)
    result = _follow(_load(options).stream(options.prompt, **request), options)
    _finish(result, paths, options)
    return 0


def _targets(out: str, count: int) -> list[Path]:
    """The files to write, after checking that they can be: a request may take minutes."""
    path = Path(out)
    try:
        if not path.parent.is_dir():
            raise BadRequestError(f"--out {shown(out)}: the folder {path.parent} does not exist")
        if path.is_dir() or path.suffix.lower() not in KINDS:
            raise BadRequestError(f"--out {shown(out)}: expected a file name that ends in {', '.join(KINDS)}")
        paths = numbered(path, count)
        for target in paths:
            with contextlib.suppress(FileNotFoundError):
                target.lstat()  # raises for a name that no file can have
            if target.exists() and not target.is_file():
                raise BadRequestError(f"--out {target}: is a folder, pipe or device, expected a file name")
        trial = path.with_name(f".{secrets.token_hex(8)}.partial")
        trial.touch(exist_ok=False)
        trial.unlink()
    except (OSError, ValueError) as error:
        if isinstance(error, BadRequestError):
            raise
        raise BadRequestError(f"--out {shown(out)}: cannot be written: {getattr(error, 'strerror', error)}") from error
    return paths


def _follow(events: Iterable[Event], options: argparse.Namespace) -> GenerationResult:
    """Shows text as it comes and a bar for the steps; returns the result."""
    show = not (options.json or options.quiet)
    bar: Any = None
    result: GenerationResult | None = None
    kind = ""
    try:
        for event in events:
            if isinstance(event, TextEvent) and show:
                if event.kind != kind and event.text.strip():
                    print(f"\n[{event.kind}] " if event.kind != "text" else "\n", end="")
                    kind = event.kind
                print(event.text, end="", flush=True)
            elif isinstance(event, StepEvent) and not options.quiet:
                if bar is None:
                    if show and kind:
                        print(flush=True)
                    bar = step_bar(event.total)
                bar.update(1)
            elif isinstance(event, (ImageEvent, AnswerEvent)):
                result = event.result
    finally:
        if bar is not None:
            bar.close()
    assert result is not None
    return result


def _finish(result: GenerationResult, paths: list[Path], options: argparse.Namespace) -> None:
    written = replace(result, settings={**result.settings, "mindomni_rt": __version__})
    if paths:
        # The first name's stem without its number: `save` adds it again.
        written.save(paths[0] if len(paths) == 1 else Path(options.out))
    if options.json:
        _print_json({**_plain(result), "files": [str(p) for p in paths]})
    elif not options.quiet:
        seconds = result.timings["total"]
        print(f"{', '.join(map(str, paths))}: seed {result.seed}, {seconds:.1f} s")


def _plain(result: GenerationResult) -> dict[str, Any]:
    fields = ("text", "thinking", "answer", "finish_reason", "seed", "timings", "token_ids", "settings")
    return {**{name: getattr(result, name) for name in fields}, "rounds": [asdict(r) for r in result.rounds]}


def _understand(options: argparse.Namespace) -> int:
    request = UnderstandRequest(
        prompt=options.prompt,
        image=options.image,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        max_image_tokens=options.max_image_tokens or None,
    )
    result = _follow(_load(options).stream(request), options)
    if options.json:
        _print_json(_plain(result))
    else:
        print(result.text if options.quiet else "")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .describe import describe

    data, lines = describe(resolve(options.model, options.revision, None, options.offline))
    if options.json:
        _print_json(data)
    else:
        print("\n".join(lines))
    return 0


def _demo(options: argparse.Namespace) -> int:
    try:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise BadRequestError(f"--out {shown(options.out)}: {getattr(error, 'strerror', error)}") from error
    paths = _targets(options.out, 1)
    if model := runnable_demo():
        return _demo_on(model, options.prompt or DEMO_PROMPT, paths, options)
    try:
        importlib.import_module("torch")
    except ImportError as error:
        raise BadRequestError(f"the small model needs onnxruntime or torch: {extras.install('onnx')}") from error
    from .model.tiny import write_random_checkpoint

    with _temporary_folder() as folder:
        write_random_checkpoint(Path(folder))
        if not (options.json or options.quiet):
            print("No trained model here: this one is small and RANDOM, so its words and its picture mean nothing.")
            print("What the demo shows is the whole path: think, connect, paint, decode.")
        return _demo_on(Path(folder), options.prompt or "an animal with (3 + 6) lives", paths, options)


def _temporary_folder() -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory()
    except OSError as error:
        raise BadRequestError("no temporary folder can be written: set TMPDIR, or give a model with --model") from error


def _demo_on(model: Path, prompt: str, paths: list[Path], options: argparse.Namespace) -> int:
    if not (options.json or options.quiet):
        print(f"[prompt] {prompt}")
    pipe = load(model, device="cpu")
    _finish(_follow(pipe.stream(prompt, seed=7, **DEMO_SETTINGS), options), paths, options)
    if not (options.json or options.quiet):
        page, server = (f" ({extras.install(extra)})" * bool(extras.lacking(extra)) for extra in ("ui", "serve"))
        print(f"Next: `mindomni ui` opens a page to try it on{page}, and `mindomni serve` answers OpenAI's clients at")
        print(f"http://127.0.0.1:8000/v1{server}.")
    return 0


def _report(outcome: tuple[str, dict[str, Any]], options: argparse.Namespace) -> int:
    """Prints a command's outcome, (text, data), in the form asked for."""
    text, data = outcome
    if options.json:
        _print_json(data)
    else:
        print(text)
    return 0


_COMMANDS = {
    "generate": _generate,
    "edit": _generate,
    "understand": _understand,
    "info": _info,
    "demo": _demo,
    "doctor": lambda options: _report(doctor.run(options), options),
    "random-checkpoint": lambda options: _report(random_checkpoint.run(options), options),
}
