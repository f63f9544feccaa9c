"""GenEval, DPG-Bench and WISE: images in the folders that their own evaluators read.

| suite | prompts | written under `images/` | read by |
| --- | --- | --- | --- |
| geneval | evaluation_metadata.jsonl | 00000/metadata.jsonl, samples/0000.png …, grid.png | evaluate_images.py |
| dpg | a folder of ID.txt | ID.png, a grid of two columns, row by row | compute_dpg_bench.py |
| wise | JSON lists of prompt_id and Prompt | PROMPT_ID.png | gpt_eval.py |

Sources: djghosh13/geneval (README.md, evaluation/evaluate_images.py: folders named by digits, in each `metadata.jsonl`
with one object and `samples/` with files named by digits; the grid is optional), TencentQQGYLab/ELLA (README.md,
dpg_bench/compute_dpg_bench.py: every file of the folder, keyed by its name up to the first dot, cut into squares of
--resolution; dist_eval.sh cuts four unless PIC_NUM says otherwise), PKU-YuanGroup/WISE (README.md, gpt_eval.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import parse_json

from .paint import grid, one_grid, png
from .suite import (
    Item,
    Prompts,
    Settings,
    Suite,
    Writer,
    checked_items,
    checked_name,
    checked_prompt,
    hashed,
    located,
    text_of,
)

# Its files, and what its Calculate.py calls each.
_WISE = {"cultural_common_sense": "culture", "spatio-temporal_reasoning": "space-time", "natural_science": "science"}


def _read_geneval(path: Path | None) -> Prompts:
    path = _inside(located(path, GENEVAL), "evaluation_metadata.jsonl", GENEVAL)
    lines = text_of(path).split("\n")  # not splitlines: a JSON text may hold U+2028 as it is
    while lines and not lines[-1].strip():
        lines.pop()
    items = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        row = _parsed(line, wrong := f"{where}: expected one JSON object with prompt, tag and include")
        if not isinstance(row, dict):
            raise BadRequestError(wrong)
        checked_prompt(row.get("tag"), where, "tag")
        prompt = checked_prompt(row.get("prompt"), where)
        items.append(Item(name=f"{number - 1:05}", prompt=prompt, where=where, row=line.strip()))
    return Prompts(files=(path,), items=checked_items(items, path, GENEVAL), sha256=hashed([path]))


def _geneval_files(item: Item, settings: Settings) -> dict[str, Writer]:
    folder = f"images/{item.name}"
    samples: dict[str, Writer] = {
        f"{folder}/samples/{i:04}.png": lambda images, i=i: png(images[i])  # type: ignore[misc]
        for i in range(settings.samples)
    }
    line = f"{item.row}\n".encode()
    return {**samples, f"{folder}/grid.png": grid, f"{folder}/metadata.jsonl": lambda _: line}


def _read_dpg(path: Path | None) -> Prompts:
    path = located(path, DPG)
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix == ".txt" and p.is_file() and not p.name.startswith("."))
    elif path.suffix != ".txt":
        raise BadRequestError(f"{path}: expected a folder of .txt files; {DPG.wanted}")
    items = []
    for file in files:
        name = checked_name(file.stem, str(file))
        if "." in name:  # the evaluator would look for what stands before the first dot
            raise BadRequestError(f"{file}: id {name!r} holds a dot, at which the evaluator cuts names; rename it")
        items.append(Item(name=name, prompt=checked_prompt(text_of(file).strip(), str(file)), where=str(file)))
    return Prompts(files=tuple(files), items=checked_items(items, path, DPG), sha256=hashed(files))


def _read_wise(path: Path | None) -> Prompts:
    path = located(path, WISE)
    files = [path]
    if path.is_dir():
        sets = [[path / f"{name}{end}.json" for name in _WISE] for end in ("", "_verified")]
        files = next((s for s in sets if all(p.is_file() for p in s)), [])
        if not files:
            raise BadRequestError(f"{path} lacks one of {', '.join(f'{n}.json' for n in _WISE)}: {WISE.wanted}")
    items = []
    for file in files:
        rows = _parsed(text_of(file), f"{file} is not JSON")
        if not isinstance(rows, list):
            raise BadRequestError(f"{file}: expected a list of objects with prompt_id and Prompt")
        for number, row in enumerate(rows, 1):
            where = f"{file}, entry {number}"
            if not isinstance(row, dict):
                raise BadRequestError(f"{where}: expected an object with prompt_id and Prompt")
            name = checked_name(row.get("prompt_id"), where)
            items.append(Item(name=name, prompt=checked_prompt(row.get("Prompt"), where, "Prompt"), where=where))
    return Prompts(files=tuple(files), items=checked_items(items, path, WISE), sha256=hashed(files))


def _parsed(text: str, wrong: str) -> Any:
    """A JSON value. Raises BadRequestError that begins with `wrong`."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadRequestError(f"{wrong}: {error}") from error


def _inside(path: Path, name: str, suite: Suite) -> Path:
    """The file itself, or the one of that name in a folder."""
    found = path / name if path.is_dir() else path
    if not found.is_file():
        raise BadRequestError(f"no {name} in {path}: {suite.wanted}")
    return found


def _geneval_commands(run: Mapping[str, Any]) -> list[str]:
    return [
        'python evaluation/evaluate_images.py "$RUN/images" --outfile "$RUN/geneval.jsonl" --model-path DETECTOR',
        '(cd evaluation && python summary_scores.py "$RUN/geneval.jsonl")',
    ]


def _dpg_commands(run: Mapping[str, Any]) -> list[str]:
    settings = run["settings"]
    return [f'PROCESSES=1 PIC_NUM={settings["samples"]} bash dpg_bench/dist_eval.sh "$RUN/images" {settings["size"]}']


def _wise_commands(run: Mapping[str, Any]) -> list[str]:
    names = [Path(name).stem for name in run["prompts"]["files"]]
    lines = [
        f'python gpt_eval.py --json_path data/{name}.json --image_dir "$RUN/images" --output_dir "$RUN/wise/{name}" '
        "--api_key KEY --model gpt-4o-2024-05-13 --result_full full.json --result_scores scores.jsonl"
        for name in names
    ]
    scores = " ".join(f'"$RUN/wise/{name}/scores.jsonl"' for name in names)
    category = _WISE.get(names[0].removesuffix("_verified"), "all") if len(names) == 1 else "all"
    return [*lines, f"python Calculate.py {scores} --category {category}"]


_DEFAULTS = Settings(think=True, samples=4)
GENEVAL = Suite(
    name="geneval",
    title="GenEval",
    prompts="prompts/evaluation_metadata.jsonl",
    project="djghosh13/geneval",
    evaluated="evaluation/evaluate_images.py reads images/, evaluation/summary_scores.py what that wrote",
    published={"overall": "0.83"},
    defaults=_DEFAULTS,
    most_samples=10_000,
    read=_read_geneval,
    files=_geneval_files,
    commands=_geneval_commands,
)
DPG = Suite(
    name="dpg",
    title="DPG-Bench",
    prompts="the folder dpg_bench/prompts with its .txt files",
    project="TencentQQGYLab/ELLA",
    evaluated="dpg_bench/dist_eval.sh (compute_dpg_bench.py) reads images/; --resolution is the side of one image",
    published={"overall": "82.5"},
    defaults=_DEFAULTS,
    most_samples=4,
    read=_read_dpg,
    files=one_grid,
    commands=_dpg_commands,
)
WISE = Suite(
    name="wise",
    title="WISE",
    prompts=f"the folder data with {', '.join(f'{n}.json' for n in _WISE)}, or one of these",
    project="PKU-YuanGroup/WISE",
    evaluated="gpt_eval.py reads images/PROMPT_ID.png, Calculate.py what that wrote",
    published={"with thinking": "0.71", "without thinking": "0.43"},
    defaults=replace(_DEFAULTS, samples=1),
    read=_read_wise,
    files=one_grid,
    commands=_wise_commands,
)
SUITES = (GENEVAL, DPG, WISE)
