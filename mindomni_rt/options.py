"""The options of the command `mindomni`, and values that argparse has no type for."""

from __future__ import annotations

import argparse
from typing import Any

from . import __version__, doctor
from .checks import shown
from .commands import Parser
from .demo import DEMO_NAME, DEMO_PROMPT
from .errors import BadRequestError
from .model.random import command as random_checkpoint
from .request import Request

# command: module, arguments before the user's, extra, help
HANDED_OVER = {
    "export": ("mindomni_rt.export.cli", (), "export", "build, verify and inspect bundles"),
    "plan": ("mindomni_rt.export.cli", ("plan",), "export", "what fits into the memory of a device"),
    "bench": ("mindomni_rt.benchmarks.cli", (), "bench", "measure latency, counts and quality"),
    "serve": ("mindomni_rt.serving.cli", ("serve",), "serve", "an HTTP server in OpenAI's form"),
    "ui": ("mindomni_rt.serving.cli", ("ui",), "ui", "a page in the browser"),
    "batch": ("mindomni_rt.serving.cli", ("batch",), "ray", "a file of prompts to a folder of pictures"),
    "train": ("mindomni_rt.training.cli", (), "train", "the three training stages"),
}
EXAMPLES = f"""examples, first on the small model:
  mindomni demo
  mindomni generate "{DEMO_PROMPT}" --out a.png
  mindomni edit a.png "the same, but one more and in the colour of the sea" --out b.png
  mindomni understand "describe the picture." --image b.png
  mindomni generate "an animal with (3 + 6) lives" --model MODEL --out c.png
  mindomni info --model MODEL
  mindomni doctor --model MODEL
  mindomni random-checkpoint FOLDER --layers 2
  mindomni export build MODEL --target cpu --out BUNDLE
  mindomni plan --help
  mindomni bench latency --help
  mindomni train sft --help
  mindomni serve MODEL --port 8000
  mindomni ui MODEL
  mindomni batch prompts.jsonl --model MODEL --out DIR

MODEL is a folder or a hub id (owner/name), of a checkpoint or a bundle; without one, or as "demo", the small model."""


PRESETS: dict[str, dict[str, Any]] = {
    "fast": dict(
        precision="int8", steps=25, solver="multistep", guidance_interval="0:0.6", step_cache=0.1
    ),
}  # fmt: skip
"""What `--preset` sets, by names of options. What "fast" costs: benchmarks/results/2026-11-28-lossy-precisions.json."""
EDIT_FEATURES_HELP = "what the decoder sees of the image (default: as the model was trained)"
PRESET_HELP = (
    "lossy, for a GPU. fast: int8, 25 multistep steps, guided to 0.6, step cache 0.1, a fifth of the decoder's work; "
    "on the small model 55 dB PSNR and 320 of 320 pictures right, on published weights not yet measured"
)


def build_parser() -> argparse.ArgumentParser:
    """The command line; defaults are those of `Request`."""
    defaults = Request(prompt="-")
    parser = Parser(
        prog="mindomni",
        description="Think, then paint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    common = Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else there")
    common.add_argument("-v", "--verbose", action="store_true", help="log what happens")
    common.add_argument("-q", "--quiet", action="store_true", help="no text stream, no progress")

    model = Parser(add_help=False)
    model.add_argument(
        "--model",
        default=DEMO_NAME,
        metavar="PATH_OR_HUB_ID",
        help="folder or hub id (default: demo, the small model of the package, which knows only 117 words)",
    )
    model.add_argument("--revision", help="hub revision")
    model.add_argument("--offline", action="store_true", help="use only what the hub cache holds")
    model.add_argument("--backend", default="auto", help="auto, torch (checkpoints), onnx or tensorrt (bundles)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    model.add_argument("--dtype", help="float32, bfloat16 or float16")
    model.add_argument("--precision", help="fp8, fp8fast, int8, int4, or pairs: decoder=fp8,language=int4 (torch)")
    model.add_argument(
        "--memory-budget", metavar="SIZE", default="auto", help="such as 8GiB (default: what is free): parts take turns"
    )

    model.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="FOLDER[:SCALE]",
        help="a LoRA adapter (torch); repeatable",
    )

    write = Parser(add_help=False)
    write.add_argument(
        "--max-new-tokens", type=int, default=defaults.max_new_tokens, help="of text (default: %(default)s)"
    )
    write.add_argument("--temperature", type=float, default=defaults.temperature, help="0 is greedy")
    write.add_argument("--seed", type=int, help="of the noise and of sampled tokens; random if absent, and reported")
    write.add_argument(
        "--max-image-tokens", type=int, default=defaults.max_image_tokens, help="cap on the input image; 0 for none"
    )

    paint = Parser(add_help=False)
    paint.add_argument("--size", metavar="WxH", help="pixels (default: the input image's, or the model's own)")
    paint.add_argument("--steps", type=int, help="denoising steps (default: the model's own)")
    paint.add_argument(
        "--guidance",
        type=float,
        default=defaults.guidance_scale,
        help="guidance scale, 1 is none (default: the model's own)",
    )
    paint.add_argument("--negative", default=defaults.negative_prompt, help="what to stay away from")
    paint.add_argument("--no-think", dest="think", action="store_false", help="paint from the prompt alone")
    paint.add_argument("--cascade", action="store_true", help="a second round of thinking on the first one's answer")
    paint.add_argument(
        "--first-step",
        default=defaults.first_step,
        choices=["full", "condition_only"],
        help="condition_only: as the released code with its cache (default: full, as trained)",
    )
    paint.add_argument(
        "--draft-tokens", type=int, default=defaults.draft_tokens, help="guesses verified at once; 0 is off"
    )
    paint.add_argument("--preset", choices=list(PRESETS), action=_Preset, help=PRESET_HELP)
    paint.add_argument("--guidance-interval", default="0:1", metavar="START:END", help="lossy: guide only steps within")
    paint.add_argument("--solver", default=defaults.solver, help="lossy: multistep, for 25 to 28 steps")
    paint.add_argument("--step-cache", type=float, default=defaults.step_cache, help="lossy: threshold; 0 is off")
    paint.add_argument("--num-images", type=int, default=defaults.num_images, help="of one thought, with a seed each")
    paint.add_argument("--out", default="out.png", help="PNG, JPEG or WebP; several images get -0, -1, …")

    generate = commands.add_parser("generate", parents=[common, model, write, paint], help="a prompt to an image")
    generate.add_argument("prompt", help="what to paint")
    generate.add_argument("--image", help="reference image")
    generate.add_argument("--edit-features", choices=["vit", "vit+vae"], help=EDIT_FEATURES_HELP)
    edit = commands.add_parser("edit", parents=[common, model, write, paint], help="an image and a prompt to an image")
    edit.add_argument("image", help="the picture to change")
    edit.add_argument("prompt", help="what to change")
    edit.add_argument("--edit-features", choices=["vit", "vit+vae"], help=EDIT_FEATURES_HELP)
    understand = commands.add_parser("understand", parents=[common, model, write], help="a question to words")
    understand.add_argument("prompt", help="the question")
    understand.add_argument("--image", help="the picture it is about")
    random_checkpoint.add_arguments(
        commands.add_parser("random-checkpoint", parents=[common], help=random_checkpoint.HELP)
    )
    doctor.add_arguments(commands.add_parser("doctor", parents=[common], help=doctor.HELP))
    commands.add_parser("info", parents=[common, model], help="what a checkpoint or bundle holds")
    demo = commands.add_parser("demo", parents=[common], help="think and paint once on a small model")
    demo.add_argument("prompt", nargs="?", help=f"a riddle of the small world, such as: {DEMO_PROMPT}")
    demo.add_argument("--out", default="out/demo.png", help="default: %(default)s")
    for name, (_, _, _, text) in HANDED_OVER.items():
        commands.add_parser(name, add_help=False, help=text)
    return parser


class _Preset(argparse.Action):
    """Sets the options of a preset; those that follow on the command line change them."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        for name, value in PRESETS[values].items():
            setattr(namespace, name, value)
        setattr(namespace, self.dest, values)


def parse_size(text: str) -> tuple[int, int]:
    """ "WxH" in pixels, or one number for a square → (width, height)."""
    parts = text.lower().split("x") if "x" in text.lower() else [text, text]
    if len(parts) != 2 or not all(p.isdecimal() and len(p) < 7 for p in parts):
        raise BadRequestError(f"size {shown(text)}: expected WIDTHxHEIGHT in pixels, for example 1024x768")
    return int(parts[0]), int(parts[1])


def parse_adapter(text: str) -> tuple[str, float]:
    """ "FOLDER" or "FOLDER:SCALE" → folder and scale, 1 without one."""
    folder, colon, scale = text.rpartition(":")
    try:
        return (folder, float(scale)) if colon and folder else (text, 1.0)
    except ValueError:
        return text, 1.0  # a colon of the path


def parse_interval(text: str) -> tuple[float, float]:
    """ "START:END" → two numbers."""
    start, colon, end = text.partition(":")
    try:
        if not colon:
            raise ValueError
        return float(start), float(end)
    except ValueError as error:
        raise BadRequestError(f"guidance interval {shown(text)}: expected START:END, for example 0.0:0.6") from error
