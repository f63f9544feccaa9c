"""`mindomni train evaluate CHECKPOINT`: exact accuracy on the synthetic world, with confidence intervals.

Prompts hold scenes and sums that stage 3 never trained on. Greedy text, Euler sampling; a seed decides prompts and
noise.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mindomni_rt.checkout import commit
from mindomni_rt.commands import Parser
from mindomni_rt.describe import read_recommended
from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import why
from mindomni_rt.loading import resolve_checkpoint
from mindomni_rt.outputs import check_target, read_json, write_json

from ..loop.runs import choose_device, open_contexts
from ..scores import departures, pool, table
from ..suites import SUITES, Settings, evaluate


def main(argv: Sequence[str]) -> int:
    """The command line. Raises MindOmniError for what a user can mend."""
    parser = Parser(prog="mindomni train evaluate", description=__doc__)
    parser.add_argument("checkpoint", help="a folder, a hub id, or demo (the small model)")
    parser.add_argument("--suite", action="append", choices=SUITES, help="repeatable; default: all")
    parser.add_argument("--n", type=int, default=96, help="prompts a suite")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of prompts and noise; scores are pooled")
    parser.add_argument("--size", type=int, help="image side in pixels; default: the model's own")
    parser.add_argument("--reward-model", default="", help="score the consistency reward too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    parser.add_argument("--against", type=Path, help="a record: exit code 1 where 95 %% intervals do not overlap")
    options = parser.parse_args(argv)
    recorded = _read_record(options.against) if options.against else None
    if options.out:
        check_target(options.out)
    device = choose_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    own = read_recommended(resolve_checkpoint(options.checkpoint))
    contexts = open_contexts(options.checkpoint, device, options.size or own.width)
    settings = Settings(
        n=options.n,
        steps=own.num_inference_steps if options.steps is None else options.steps,
        guidance=own.guidance_scale if options.guidance is None else options.guidance,
        reward_model=options.reward_model,
    )
    suites = options.suite or [
        s for s in SUITES if s != "teacher" or hasattr(contexts.model.decoder.llm, "embed_tokens")
    ]
    began = time.perf_counter()
    each = {seed: evaluate(contexts, suites, replace(settings, seed=seed)) for seed in options.seeds}
    found = pool(list(each.values()))
    print(table(found))
    print(f"{time.perf_counter() - began:.0f} s; synthetic world, exact verifier, greedy text")
    if options.out:
        shown = {name: value for name, value in asdict(settings).items() if name != "seed"}
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit() or "unknown",
            "settings": {**shown, "seeds": options.seeds},
            "seconds": round(time.perf_counter() - began, 1),
            "scores": found,
            "by_seed": {str(seed): scores for seed, scores in each.items()},
        }
        write_json(options.out, record)
    if recorded is None:
        return 0
    parted = departures(found, recorded)
    print("\n".join(parted) or f"as recorded in {options.against}: all intervals meet")
    return 1 if parted else 0


def _read_record(path: Path) -> dict[str, Any]:
    """The scores of a record, or of the last stage where a file holds one for each stage (as a packed model's)."""
    try:
        found: dict[str, Any] = read_json(path)
        last: dict[str, Any] = found if "scores" in found else list(found.values())[-1]
        scores: dict[str, Any] = last["scores"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadRequestError(f"--against {path}: expected a record of `evaluate --out` ({why(error)})") from error
    return scores
