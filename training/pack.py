"""A trained small model as an asset: the published layout in one dtype, and a model card with its measurements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindomni_rt.commands import Parser
from mindomni_rt.errors import BadCheckpointError, BadRequestError
from mindomni_rt.files import read_text, why
from mindomni_rt.loading import resolve_checkpoint
from mindomni_rt.model.dtypes import DTYPES
from mindomni_rt.model.mindomni import MindOmniModel, load_model
from mindomni_rt.outputs import read_json, write_atomic, write_json

from .outputs import check_model_folder, save_checkpoint

RECORD = "evaluation.json"  # beside the card: what `evaluate --against` reads
SHOWN = ("image", "text", "image_of_text", "format")

_CARD = """# shapes-world

A small MindOmni in the published layout, trained from scratch by `training/run_small.sh` on a synthetic world: riddles
("draw (5 - 2) things of the colour of a lemon, shaped like a wheel"), changes of a reference picture, captions, and
questions about pictures. It shows that the code of all three stages works. It says nothing about the full size.

Images have 96x96 pixels. It knows {words} words in lower case; any other is `<unk>`. Both `edit_features` work.

{sizes}

## How it was made
{making}

Autoencoder and reward model: `mindomni train world`. Times are of one thread beside other work.

Ours, not the paper's: stage 0 (`prior`), which stands for the pretrained weights of the published model; the feature
distillation in stage 2; captions replayed in stage 3's image KL. The consistency reward is a small CLIP trained on
rendered pairs. The exact verifier judged the table below and was never a reward.

## Measured
Greedy text, Euler steps and guidance as given, prompts held out from stage 3 (scenes and sums that it never asked
for, though stages 0 and 2 have seen them); 95 % Wilson intervals. `riddles` and `edits` think first, `direct` has the
same riddles without thinking. `image`: the picture shows what was asked for. `text`: the answer names it.
`image_of_text`: the picture shows what the answer names.

`mindomni train evaluate FOLDER --against FOLDER/evaluation.json` repeats it and fails if intervals do not overlap.
Without thinking the model is as good as stage 2 had time to make it: longer stages 2 close a part of the gap
(`docs/log.md`).

{record}
"""


def pack(model: str, out: Path, dtype: str, records: Sequence[tuple[str, Path]], runs: Sequence[Path]) -> int:
    """Writes the checkpoint and its card to `out`; returns the size of its weights in bytes.

    records: (stage, JSON of `evaluate`), in order; runs: run folders, whose configuration and log the card names.
    """
    if dtype not in DTYPES:
        raise BadRequestError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    found = {stage: read_json(path) for stage, path in records}
    tables = "\n".join(_table(stage, found[stage], path) for stage, path in records)
    making = "\n".join(_making(r) for r in runs)
    source = resolve_checkpoint(model)
    check_model_folder(out)
    loaded, _ = load_model(source, DTYPES[dtype])
    save_checkpoint(loaded, out, source)
    card = _CARD.format(
        words=loaded.config.language.vocab_size,
        sizes=_sizes(loaded, dtype),
        making=making,
        record=tables,
    )
    write_atomic(out / "README.md", card)
    write_json(out / RECORD, found)
    return sum(p.stat().st_size for p in out.rglob("*.safetensors"))


def _sizes(model: MindOmniModel, dtype: str) -> str:
    counts = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    rows = [f"| {name} | {count:,} |" for name, count in counts.items()]
    return "\n".join(
        [f"| part | parameters ({dtype}) |", "| --- | --- |", *rows, f"| all | {sum(counts.values()):,} |"]
    )


def _making(run: Path) -> str:
    """One line about a run, from its logs."""
    try:
        logs = (read_text(run / name).splitlines() for name in ("runs.jsonl", "metrics.jsonl"))
        return _made(*([json.loads(line) for line in log] for log in logs))
    except OSError as error:
        raise BadCheckpointError(f"{run}: no log of a run: {why(error)}") from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        raise BadCheckpointError(f"{run}: its log is of another shape ({type(error).__name__}: {error})") from error


def _made(starts: list[Any], rows: list[Any]) -> str:
    config = starts[-1]["config"]
    optim = config["optim"]
    # Logged lines sample the steps; the mean over them times the steps is the time of the whole run.
    each = sum(r["time/prepare"] + r["time/update"] for r in rows) / len(rows)
    return (
        f"- `{config['stage']}`: {rows[-1]['step']} steps of {optim['batch']}, lr {optim['lr']:g}, "
        f"seed {config['seed']}, about {each * rows[-1]['step'] / 60:.0f} min, "
        f"commit {starts[-1]['commit']}, {starts[-1]['started'][:10]}."
    )


def _table(stage: str, found: Any, path: Path) -> str:
    """The scores of a record. Raises BadCheckpointError where it is none."""
    try:
        s = found["settings"]
        lines = [
            f"After {stage} ({found['date']}, commit {found['commit']}, n = {s['n']} a suite and seed, "
            f"seeds {', '.join(map(str, s['seeds']))}, {s['steps']} steps, guidance {s['guidance']:g}):",
            "",
            f"| suite | {' | '.join(SHOWN)} |",
            "| --- " * (1 + len(SHOWN)) + "|",
        ]
        for suite, scores in found["scores"].items():
            cells = [_cell(scores.get(name)) for name in SHOWN]
            lines.append(f"| {suite} | {' | '.join(cells)} |")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadCheckpointError(f"{path}: no evaluation record ({type(error).__name__}: {error})") from error
    return "\n".join([*lines, ""])


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return ""
    low, high = (100 * x for x in score["interval"])
    return f"{100 * score['share']:.1f} % ({low:.1f} to {high:.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Raises MindOmniError for what a user can mend."""
    parser = Parser(prog="mindomni train pack", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float32", help="float32 (the default), float16 or bfloat16")
    parser.add_argument(
        "--record", action="append", default=[], metavar="STAGE=FILE", help="a JSON of `evaluate --out`"
    )
    parser.add_argument("--run", action="append", default=[], type=Path, help="a run folder, in order")
    options = parser.parse_args(argv)
    records = []
    for item in options.record:
        stage, sign, file = item.partition("=")
        if not sign:
            raise BadRequestError(f"--record {item!r}: expected STAGE=FILE")
        records.append((stage, Path(file)))
    size = pack(options.model, options.out, options.dtype, records, options.run)
    print(f"model: {options.out} ({size / 1e6:.1f} MB)")
    return 0
