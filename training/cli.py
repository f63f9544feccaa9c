"""`mindomni train COMMAND`: the stages, evaluation, ablations, plots and the full-size dry run."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindomni_rt.commands import Parser, front_door
from mindomni_rt.errors import BadRequestError
from mindomni_rt.outputs import check_target, write_atomic, write_json

from .config import STAGES, load_config, named_configs
from .errors import BadConfigError
from .outputs import check_model_folder, save_checkpoint

_HELP = {
    "prior": "stage 0 (ours): decoder and MLLM of a model from scratch",
    "pretrain": "stage 1: the connector, by flow loss and distillation",
    "sft": "stage 2: connector and decoder, on images with a thought and an answer",
    "rgpo": "stage 3: the MLLM, by reinforcement learning on rewards of its texts and images",
}


_MODULES = {  # name: (module of this package, what it does)
    "evaluate": ("evaluation.evaluate", "a checkpoint's accuracy on the synthetic world, with confidence intervals"),
    "ablate": ("evaluation.ablate", "the paper's ablations on the small model"),
    "pack": ("pack", "a trained model as a checkpoint with its card"),
    "plot": ("evaluation.plots", "curves of runs, results of ablations, accuracy by stage"),
    "world": ("data.world.command", "the synthetic world's autoencoder and reward model"),
}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mindomni train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    named = f"a TOML file, or one of the package: {', '.join(named_configs())}"
    for stage in STAGES:
        run = commands.add_parser(stage, help=_HELP[stage])
        run.add_argument("--config", type=Path, required=True, metavar="FILE_OR_NAME", help=named)
        run.add_argument("--quiet", action="store_true", help="no progress bar")
        run.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.lr=1e-4 data.paths=['a.jsonl']")
    dry = commands.add_parser("dry-run", help="parameters by name and memory by GPU, at the published sizes")
    dry.add_argument("--config", type=Path, required=True, metavar="FILE_OR_NAME", help=named)
    dry.add_argument("--gpus", type=int, nargs="+", default=[1, 8], help="numbers of GPUs to plan for (default: 1 8)")
    dry.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.batch=4")
    step = commands.add_parser("gpu-step", help="one full-size step of stage 1 and of RGPO, measured on this GPU")
    step.add_argument("--out", type=Path, help="a JSON file for the result")
    new = commands.add_parser("new", help="the small model's untrained checkpoint, with the world's autoencoder")
    new.add_argument("folder", type=Path, help="of the checkpoint to write")
    new.add_argument("--vae", type=Path, required=True, help="the folder `vae` that `mindomni train world` wrote")
    new.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    new.add_argument("--width", type=int, default=128, help="hidden size (default: 128)")
    new.add_argument("--connector-layers", type=int, default=2, help="0 is linear only (default: 2)")
    page = commands.add_parser("config-reference", help="every configuration key, as docs/training-configuration.md")
    page.add_argument("--out", type=Path, help="a Markdown file; default: standard output")
    for name, (_, text) in _MODULES.items():
        commands.add_parser(name, add_help=False, help=text)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 after one line on standard error for a mistake that the user can mend."""
    level = logging.getLevelNamesMapping().get(os.environ.get("LOGLEVEL", "").upper(), logging.WARNING)
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    return front_door(lambda: _dispatch(arguments), extra="train")


def _dispatch(arguments: list[str]) -> int:
    if arguments and arguments[0] in _MODULES:  # imported only for its own command
        return int(importlib.import_module(f".{_MODULES[arguments[0]][0]}", __package__).main(arguments[1:]))
    options = _parser().parse_args(arguments)
    if options.command in STAGES:
        return _train(options)
    if options.command == "dry-run":
        from .fullsize import report

        if wrong := [count for count in options.gpus if not 1 <= count <= 100_000]:
            raise BadRequestError(f"--gpus {wrong[0]}: expected 1 to 100000")
        print(report(load_config(options.config, options.overrides), gpus=options.gpus))
        return 0
    if options.command == "gpu-step":
        return _gpu_step(options)
    if options.command == "config-reference":
        return _reference(options)
    return _new(options)


def _reference(options: argparse.Namespace) -> int:
    from .reference import reference

    if options.out:
        write_atomic(options.out, reference())
    else:
        print(reference(), end="")
    return 0


def _train(options: argparse.Namespace) -> int:
    from .loop.runs import finish, start

    config = load_config(options.config, options.overrides)
    if config.stage != options.command:
        given = [o for o in options.overrides if o.partition("=")[0].strip() == "stage"]
        where = f"{given[-1]!r} on the command line" if given else options.config
        raise BadConfigError(f"{where} is for stage {config.stage}, the command is {options.command}")
    check_target(Path(config.out) / "metrics.jsonl", "out")
    trainer = start(config, bar=not options.quiet)
    if trainer.rank == 0:
        trained = sum(p.numel() for p in trainer.trained.values())
        every = sum(p.numel() for p in trainer.stage.model.parameters())
        print(f"stage {config.stage}: {trained:,} of {every:,} parameters train ({len(trainer.trained)} tensors)")
    trainer.run()
    out = finish(trainer)
    if trainer.rank == 0:
        print(f"model: {out}")
    return 0


def _gpu_step(options: argparse.Namespace) -> int:
    from .fullsize import gpu_step

    if options.out:
        check_target(options.out)
    small = ["data.image_size=256", "optim.batch=4", "data.source=world"]
    pretrain = load_config(Path("pretrain-full"), small)
    rollouts = ["optim.batch=1", "rgpo.max_new_tokens=64", "rgpo.image_steps=10"]
    rgpo = load_config(Path("rgpo-full"), [*small, *rollouts])
    from mindomni_rt.checkout import commit

    record = {"commit": commit() or "unknown", "result": {}, "pretrain": pretrain.to_dict(), "rgpo": rgpo.to_dict()}

    def store(results: dict[str, Any]) -> None:
        record["result"] = results
        if options.out:
            write_json(options.out, record)

    result = gpu_step(pretrain, rgpo, store=store)
    print(json.dumps(result, indent=2))
    return int(any("failed" in found or found.get("right") is False for found in result.values()))


def _new(options: argparse.Namespace) -> int:
    from .data.world import words
    from .data.world.vae import load_vae
    from .fresh import write_fresh

    trained = load_vae(options.vae)
    if options.width % 32:
        raise BadRequestError(f"--width {options.width}: expected a multiple of 32")
    check_model_folder(options.folder)
    model = write_fresh(options.folder, words(), trained.config, options.seed, options.width, options.connector_layers)
    model.vae.load_state_dict(trained.state_dict())
    model.config = dataclasses.replace(model.config, vae=trained.config)
    save_checkpoint(model, options.folder)
    print(f"model: {options.folder}")
    return 0
