"""`mindomni random-checkpoint`: arguments, progress, what it says at the end."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HELP = "write a checkpoint of random weights at the published sizes (25 GB), to rehearse before the download"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("folder", metavar="FOLDER", help="new or empty")
    parser.add_argument("--layers", type=int, help="at most this many layers in each stack (default: all)")
    parser.add_argument("--divide-width", type=int, default=1, metavar="N", help="widths divided by N (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")


@contextmanager
def _bar(silent: bool, total: int) -> Iterator[Callable[[int], object]]:
    """Takes the bytes written; shows them on standard error where tqdm is installed."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=silent, delay=1, file=sys.stderr) as bar:
        yield bar.update


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Writes the checkpoint; the outcome as text and as data. Raises BadRequestError."""
    from ...checkpoint.config import published
    from .write import check_room, cut, weights_bytes, write_random_checkpoint

    config = cut(published(), options.layers, options.divide_width)
    silent = options.quiet or options.json
    check_room(Path(options.folder), total := weights_bytes(config))
    if not silent:
        sys.stderr.write(f"writing {total / 1e9:.2f} GB of random weights to {options.folder}\n")
    with _bar(silent, total) as progress:
        done = write_random_checkpoint(Path(options.folder), config, seed=options.seed, progress=progress)
    text = (
        f"{done.folder}: {done.parameters:,} random parameters, {done.bytes / 1e9:.2f} GB in {done.files} files. "
        f'Try: mindomni generate --model {done.folder} --size 256x256 --steps 2 "a cat"'
    )
    data = {
        "path": str(done.folder),
        "parameters": done.parameters,
        "bytes": done.bytes,
        "config": config.to_dict(),
    }
    return text, data
