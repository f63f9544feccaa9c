"""The model of a command: its options, and the defaults of requests that leave a field out."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindomni_rt.bundle.manifest import is_bundle
from mindomni_rt.checkpoint.config import PUBLISHED, RecommendedConfig
from mindomni_rt.checkpoint.hub import resolve
from mindomni_rt.checkpoint.layout import open_checkpoint
from mindomni_rt.checks import shown
from mindomni_rt.demo import DEMO_SETTINGS, runnable_demo
from mindomni_rt.describe import read_recommended
from mindomni_rt.errors import BadRequestError, MindOmniError
from mindomni_rt.extras import install
from mindomni_rt.files import parse_json
from mindomni_rt.loading import load
from mindomni_rt.options import parse_size
from mindomni_rt.request import Request, as_request

if TYPE_CHECKING:
    from mindomni_rt.pipeline import Pipeline

logger = logging.getLogger(__name__)
_WARM_UP: dict[str, Any] = dict(num_inference_steps=1, guidance_scale=1.0, think=False, seed=0)
_WARM_UP_SIDE = 256
_SET_BY_REQUEST = ("prompt", "image", "latents", "output", "preview_every", "seed")


@dataclass(frozen=True, kw_only=True)
class Model:
    """What to load, and what a request that leaves a field out gets. Plain data: it travels to other processes."""

    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `mindomni_rt.load`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `Request`, checked when this object is made."""

    def __post_init__(self) -> None:
        for name in self.defaults:
            if name in _SET_BY_REQUEST:
                raise BadRequestError(f"the default of {name} cannot be set; give it with each request")
        as_request(Request, "-", self.defaults)

    def check(self) -> None:
        """Reads what the model says of itself, and no weights: a command can end before a server starts.

        Of a model on the hub the configuration alone is downloaded. Raises BadCheckpointError and BadBundleError.
        """
        offline = bool(self.options.get("local_files_only"))
        folder = resolve(self.path, self.options.get("revision"), None, offline, only="*.json")
        if Path(self.path).expanduser().is_dir() and not is_bundle(folder):
            open_checkpoint(folder)
        else:
            read_recommended(folder)

    def load(self) -> Pipeline:
        """Reads the weights and runs every stage but vision once, so that no client waits for that.

        Raises what `mindomni_rt.load` raises.
        """
        pipe = load(self.path, **self.options)
        self.probe(pipe)
        return pipe

    def recommended(self) -> RecommendedConfig:
        """The model's own size, steps and guidance; the published model's until it is on this machine."""
        try:
            return read_recommended(resolve(self.path, self.options.get("revision"), None, True))
        except MindOmniError:
            return PUBLISHED

    @staticmethod
    def probe(pipe: Pipeline) -> None:
        """Paints one small image. Raises whatever goes wrong but a size that the model does not take."""
        try:
            own = pipe.recommended
            width, height = (min(side, _WARM_UP_SIDE) for side in (own.width, own.height))
            pipe.generate(Request(prompt="warm-up", width=width, height=height, **_WARM_UP))
        except BadRequestError as error:  # a bundle may take no image as small as this
            logger.info("not warmed up: %s", error)


def add_arguments(parser: argparse.ArgumentParser, *, flag: bool = False) -> None:
    """The model as an argument (or with `flag` as --model), with the options of `mindomni generate`."""
    name = ["--model"] if flag else ["model"]
    extra: dict[str, Any] = {} if flag else {"nargs": "?"}
    parser.add_argument(
        *name, **extra, metavar="MODEL", help="folder or hub id; without one, the small model of `mindomni demo`"
    )
    parser.add_argument(
        "--default",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="of requests that leave the field out, such as num_inference_steps=28 or size=512x512; repeatable",
    )
    parser.add_argument("--revision", help="hub revision")
    parser.add_argument("--offline", action="store_true", help="use only what the hub cache holds")
    parser.add_argument("--backend", default="auto", help="auto, torch (checkpoints), onnx or tensorrt (bundles)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--precision", help="fp8, fp8fast, int8, int4, or pairs: decoder=fp8,language=int4 (torch)")
    parser.add_argument("--memory-budget", metavar="SIZE", default="auto", help="such as 8GiB (default: what is free)")


def chosen(options: argparse.Namespace) -> Model:
    """The model of a parsed command line. Raises BadRequestError."""
    found: dict[str, Any] = {}
    path = options.model
    if path is None:
        small = runnable_demo()
        if small is None:
            raise BadRequestError(f"the small model needs onnxruntime or torch: {install('onnx')}; or give a MODEL")
        path, found = str(small), dict(DEMO_SETTINGS)
    return Model(
        path=path,
        options={
            "backend": options.backend,
            "device": options.device,
            "dtype": options.dtype,
            "precision": options.precision,
            "memory_budget": options.memory_budget,
            "revision": options.revision,
            "local_files_only": options.offline,
        },
        defaults=found | parse_defaults(options.default),
    )


def parse_defaults(pairs: Sequence[str]) -> dict[str, Any]:
    """FIELD=VALUE pairs: a value is JSON, or text where it is none. size=WxH sets width and height."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise BadRequestError(f"--default {shown(pair)}: expected FIELD=VALUE, for example num_inference_steps=28")
        if name == "size":
            found["width"], found["height"] = parse_size(text)
            continue
        try:
            found[name] = parse_json(text)
        except ValueError:
            found[name] = text
    return found
