"""The command `mindomni`: generate, edit, understand, info, demo. Nothing else in the package prints."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import __version__, doctor, load
from .checkpoint.random import command as random_checkpoint
from .errors import BadRequestError, MindOmniError
from .events import AnswerEvent, Event, GenerationResult, ImageEvent, StepEvent, TextEvent
from .inputs.images import save_png
from .request import Request

USER_ERROR, INTERRUPTED = 2, 130
# A wheel carries the bundle inside the package; a checkout has both models beside it. The bundle needs no torch.
_INSTALLED = Path(__file__).with_name("assets")
_ASSETS = _INSTALLED if _INSTALLED.is_dir() else Path(__file__).parents[1] / "assets"
DEMO_MODELS = ((_ASSETS / "shapes-world-bundle", "onnxruntime"), (_ASSETS / "shapes-world", "torch"))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, exit code 2."""
        self.exit(USER_ERROR, f"{self.prog}: {message}\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of `Request`."""
    defaults = Request(prompt="-")
    parser = _Parser(prog="mindomni", description="Think, then paint.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else there")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    common.add_argument("-q", "--quiet", action="store_true", help="no text stream, no progress")

    model = _Parser(add_help=False)
    model.add_argument("--model", required=True, metavar="PATH_OR_HUB_ID")
    model.add_argument("--revision", help="hub revision")
    model.add_argument("--offline", action="store_true", help="use only what the hub cache holds")
    model.add_argument("--backend", default="auto")
    model.add_argument("--device", default="auto")
    model.add_argument("--dtype", help="float32, bfloat16 or float16")
    model.add_argument("--precision", help="fp8, int8, int4, or pairs such as decoder=fp8,language=int4 (torch)")
    model.add_argument(
        "--memory-budget", metavar="SIZE", default="auto", help="such as 8GiB (default: what is free): parts take turns"
    )

    write = _Parser(add_help=False)
    write.add_argument("--max-new-tokens", type=int, default=defaults.max_new_tokens)
    write.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy")
    write.add_argument("--seed", type=int, help="noise and drawn tokens; drawn and told if absent")
    write.add_argument(
        "--max-image-tokens", type=int, default=defaults.max_image_tokens, help="cap on the input image; 0 for none"
    )

    paint = _Parser(add_help=False)
    paint.add_argument("--size", default=f"{defaults.width}x{defaults.height}", metavar="WxH")
    paint.add_argument("--steps", type=int, default=defaults.num_inference_steps)
    paint.add_argument("--guidance", type=float, default=defaults.guidance_scale)
    paint.add_argument("--negative", default=defaults.negative_prompt, help="what to stay away from")
    paint.add_argument("--no-think", dest="think", action="store_false")
    paint.add_argument("--cascade", action="store_true", help="a second round of thinking on the first one's answer")
    paint.add_argument("--first-step", default=defaults.first_step, choices=["full", "condition_only"])
    paint.add_argument(
        "--draft-tokens", type=int, default=defaults.draft_tokens, help="guesses verified at once; 0 is off"
    )
    paint.add_argument("--guidance-interval", default="0:1", metavar="START:END", help="lossy: guide only steps within")
    paint.add_argument("--solver", default=defaults.solver, help="lossy: multistep, for 25 to 28 steps")
    paint.add_argument("--step-cache", type=float, default=defaults.step_cache, help="lossy: threshold; 0 is off")
    paint.add_argument("--num-images", type=int, default=defaults.num_images)
    paint.add_argument("--out", default="out.png", help="PNG; with several images -0, -1, … is added")

    generate = commands.add_parser("generate", parents=[common, model, write, paint], help="a prompt to an image")
    generate.add_argument("prompt")
    generate.add_argument("--image", help="reference image")
    generate.add_argument("--edit-features", choices=["vit", "vit+vae"])
    edit = commands.add_parser("edit", parents=[common, model, write, paint], help="an image and a prompt to an image")
    edit.add_argument("image")
    edit.add_argument("prompt")
    edit.add_argument("--edit-features", choices=["vit", "vit+vae"])
    understand = commands.add_parser("understand", parents=[common, model, write], help="a question to words")
    understand.add_argument("prompt")
    understand.add_argument("--image")
    random_checkpoint.add_arguments(
        commands.add_parser("random-checkpoint", parents=[common], help=random_checkpoint.HELP)
    )
    doctor.add_arguments(commands.add_parser("doctor", parents=[common], help=doctor.HELP))
    commands.add_parser("info", parents=[common, model], help="what a checkpoint holds")
    demo = commands.add_parser("demo", parents=[common], help="think and paint once on a small model")
    demo.add_argument("prompt", nargs="?", help="a riddle of the small world, as in assets/shapes-world/README.md")
    demo.add_argument("--out", default="out/demo.png")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 for what the user got wrong, 130 when interrupted."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.ERROR if options.quiet else logging.WARNING,
        format="%(levelname)s %(message)s",
        stream=sys.stderr,
    )
    try:
        return int(_COMMANDS[options.command](options))
    except MindOmniError as error:
        print(f"mindomni: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("mindomni: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away: nothing left to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _load(options: argparse.Namespace) -> Any:
    return load(
        options.model,
        backend=options.backend,
        device=options.device,
        dtype=options.dtype,
        precision=options.precision,
        memory_budget=options.memory_budget,
        revision=options.revision,
        local_files_only=options.offline,
    )


def parse_size(text: str) -> tuple[int, int]:
    """ "WxH" in pixels → (width, height)."""
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdecimal() for p in parts):
        raise BadRequestError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, for example 1024x768")
    return int(parts[0]), int(parts[1])


def parse_interval(text: str) -> tuple[float, float]:
    """ "START:END" → two numbers."""
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(end)
    except ValueError as error:
        raise BadRequestError(f"guidance interval {text!r}: expected START:END, for example 0.0:0.6") from error


def _generate(options: argparse.Namespace) -> int:
    width, height = parse_size(options.size)
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
    Request(prompt=options.prompt, **request)  # what is wrong with it is said before gigabytes are read
    paths = _targets(options.out, options.num_images)
    result = _follow(_load(options).stream(options.prompt, **request), options)
    _finish(result, paths, options)
    return 0


def _targets(out: str, count: int) -> list[Path]:
    path = Path(out)
    if not path.parent.is_dir():
        raise BadRequestError(f"--out {out}: the folder {path.parent} does not exist")
    if path.is_dir() or path.suffix.lower() != ".png":
        raise BadRequestError(f"--out {out}: expected a file name that ends in .png")
    return [path] if count == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(count)]


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
            elif isinstance(event, StepEvent):
                if bar is None:
                    if show and kind:
                        print(flush=True)
                    bar = _bar(event.total, disable=options.quiet)
                if bar is not None:
                    bar.update(1)
            elif isinstance(event, (ImageEvent, AnswerEvent)):
                result = event.result
    finally:
        if bar is not None:
            bar.close()
    assert result is not None
    return result


def _bar(total: int, disable: bool) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return tqdm(total=total, desc="painting", unit="step", disable=disable, file=sys.stderr)


def _finish(result: GenerationResult, paths: list[Path], options: argparse.Namespace) -> None:
    for index, (image, path) in enumerate(zip(result.images, paths, strict=True)):
        settings = {**result.settings, "seed": (result.seed or 0) + index, "num_images": 1, "text": result.text}
        save_png(image, path, {**settings, "mindomni_rt": __version__})
    if options.json:
        print(json.dumps({**_plain(result), "files": [str(p) for p in paths]}, ensure_ascii=False))
    elif not options.quiet:
        seconds = result.timings["total"]
        print(f"{', '.join(map(str, paths))}: seed {result.seed}, {seconds:.1f} s")


def _plain(result: GenerationResult) -> dict[str, Any]:
    fields = ("text", "thinking", "answer", "seed", "timings", "token_ids", "settings")
    return {name: getattr(result, name) for name in fields}


def _understand(options: argparse.Namespace) -> int:
    Request(prompt=options.prompt, max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    events = _load(options).stream_understand(
        options.prompt,
        options.image,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        max_image_tokens=options.max_image_tokens or None,
    )
    result = _follow(events, options)
    print(json.dumps(_plain(result), ensure_ascii=False) if options.json else result.text if options.quiet else "")
    return 0


def _info(options: argparse.Namespace) -> int:
    from .checkpoint.layout import PARTS, open_checkpoint, resolve

    checkpoint = open_checkpoint(resolve(options.model, options.revision, None, options.offline))
    count = {part: sum(_product(e.shape) for e in checkpoint.tensors[part].values()) for part in PARTS}
    kinds = {part: sorted({e.dtype for e in checkpoint.tensors[part].values()}) for part in PARTS}
    if options.json:
        data = {
            "path": str(checkpoint.path),
            "parameters": count,
            "dtypes": kinds,
            "config": checkpoint.config.to_dict(),
        }
        print(json.dumps(data))
        return 0
    print(f"checkpoint {checkpoint.path}")
    for part in PARTS:
        print(f"  {part:10} {count[part]:>15,} parameters  {', '.join(kinds[part])}")
    print(f"  {'total':10} {sum(count.values()):>15,} parameters")
    for title, names in (("computed", checkpoint.computed), ("unused", checkpoint.unused)):
        if names:
            print(f"  {title}: {', '.join(names)}")
    return 0


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total


def _demo(options: argparse.Namespace) -> int:
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    paths = _targets(options.out, 1)
    for model, package in DEMO_MODELS:
        if model.is_dir() and importlib.util.find_spec(package) is not None:
            prompt = options.prompt or "draw (1 + 2) things of the colour of a lemon, shaped like a wheel"
            return _demo_on(model, prompt, paths, options)
    from .model.tiny import write_random_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        write_random_checkpoint(Path(folder))
        if not (options.json or options.quiet):
            print("No trained model here: this one is small and RANDOM, so its words and its picture mean nothing.")
            print("What the demo shows is the whole path: think, connect, paint, decode.")
        return _demo_on(Path(folder), options.prompt or "an animal with (3 + 6) lives", paths, options)


def _demo_on(model: Path, prompt: str, paths: list[Path], options: argparse.Namespace) -> int:
    if not (options.json or options.quiet):
        print(f"[prompt] {prompt}")
    pipe = load(model, device="cpu")
    # The small model draws 96x96 pixels and was trained to need no guidance.
    events = pipe.stream(
        prompt, height=96, width=96, num_inference_steps=20, guidance_scale=1.0, max_new_tokens=48, seed=7
    )
    _finish(_follow(events, options), paths, options)
    return 0


def _report(outcome: tuple[str, dict[str, Any]], options: argparse.Namespace) -> int:
    """Prints a command's outcome, (text, data), in the form asked for."""
    text, data = outcome
    print(json.dumps(data, ensure_ascii=False) if options.json else text)
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
