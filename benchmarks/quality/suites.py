"""GenEval, DPG-Bench and WISE: images in the folders that their own evaluators read; and the small world's riddles.

| suite | prompts | written under `images/` | read by |
| --- | --- | --- | --- |
| geneval | evaluation_metadata.jsonl | 00000/metadata.jsonl, samples/0000.png …, grid.png | evaluate_images.py |
| dpg | a folder of ID.txt | ID.png, a grid of two columns, row by row | compute_dpg_bench.py |
| wise | JSON lists of prompt_id and Prompt | PROMPT_ID.png | gpt_eval.py |

Sources: djghosh13/geneval (README.md, evaluation/evaluate_images.py: folders named by digits, in each `metadata.jsonl`
with one object and `samples/` with files named by digits; the grid is optional), TencentQQGYLab/ELLA (README.md,
dpg_bench/compute_dpg_bench.py: every file of the folder, keyed by its name up to the first dot, cut into squares of
--resolution; dist_eval.sh cuts four unless PIC_NUM says otherwise), PKU-YuanGroup/WISE (README.md, gpt_eval.py).

`shapes` is built in and scored at once, exactly: both arms, with and without thinking, paint a riddle from
the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mindomni_rt.errors import BadRequestError
from mindomni_rt.files import parse_json
from mindomni_rt.scores import Score

from .judge import RIDDLES, riddles, right
from .paint import grid, one_grid, png
from .run import RunFolder
from .suite import Item, Settings, Suite, Writer, checked_name, checked_prompt, text_of

_ARMS = {"think": True, "direct": False}
# WISE's files, and what its Calculate.py calls each.
_WISE = {"cultural_common_sense": "culture", "spatio-temporal_reasoning": "space-time", "natural_science": "science"}


def _geneval_items(path: Path) -> Iterator[Item]:
    lines = text_of(path).split("\n")  # not splitlines: a JSON text may hold U+2028 as it is
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        row = _parsed(line, wrong := f"{where}: expected one JSON object with prompt, tag and include")
        if not isinstance(row, dict):
            raise BadRequestError(wrong)
        checked_prompt(row.get("tag"), where, "tag")
        prompt = checked_prompt(row.get("prompt"), where)
        yield Item(name=f"{number - 1:05}", prompt=prompt, where=where, row=line.strip())


def _geneval_files(item: Item, settings: Settings) -> dict[str, Writer]:
    folder = f"images/{item.name}"
    samples: dict[str, Writer] = {
        f"{folder}/samples/{i:04}.png": lambda images, i=i: png(images[i])  # type: ignore[misc]
        for i in range(settings.samples)
    }
    line = f"{item.row}\n".encode()
    return {**samples, f"{folder}/grid.png": grid, f"{folder}/metadata.jsonl": lambda _: line}


def _dpg_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix == ".txt" and p.is_file() and not p.name.startswith("."))


def _dpg_items(path: Path) -> Iterator[Item]:
    if path.suffix != ".txt":
        raise BadRequestError(f"{path}: expected a folder of .txt files; {DPG.wanted}")
    name = checked_name(path.stem, str(path))
    if "." in name:  # the evaluator would look for what stands before the first dot
        raise BadRequestError(f"{path}: id {name!r} holds a dot, at which the evaluator cuts names; rename it")
    yield Item(name=name, prompt=checked_prompt(text_of(path).strip(), str(path)), where=str(path))


def _wise_files(folder: Path) -> list[Path]:
    sets = [[folder / f"{name}{end}.json" for name in _WISE] for end in ("", "_verified")]
    return next((s for s in sets if all(p.is_file() for p in s)), sets[0])


def _wise_items(path: Path) -> Iterator[Item]:
    rows = _parsed(text_of(path), f"{path} is not JSON")
    if not isinstance(rows, list):
        raise BadRequestError(f"{path}: expected a list of objects with prompt_id and Prompt")
    for number, row in enumerate(rows, 1):
        where = f"{path}, entry {number}"
        if not isinstance(row, dict):
            raise BadRequestError(f"{where}: expected an object with prompt_id and Prompt")
        name = checked_name(row.get("prompt_id"), where)
        yield Item(name=name, prompt=checked_prompt(row.get("Prompt"), where, "Prompt"), where=where)


def _parsed(text: str, wrong: str) -> Any:
    """A JSON value. Raises BadRequestError that begins with `wrong`."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise BadRequestError(f"{wrong}: {error}") from error


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


def _shapes_items(path: Path) -> Iterator[Item]:
    for index, riddle in enumerate(riddles(path)):
        for arm, think in _ARMS.items():
            yield Item(
                name=f"{arm}-{index:05}",
                prompt=riddle.instruction,
                where=f"riddle {index}",
                key=f"{index:05}",
                think=think,
                file=f"images/{arm}/{index:05}.png",
                row=riddle,
            )


def _shapes_scores(folder: RunFolder, done: Sequence[Item]) -> dict[str, Any]:
    """The exact share of right pictures by arm, read from the files."""
    marks: dict[str, list[bool]] = {}
    for item in sorted(done, key=lambda item: not item.think):
        with Image.open(folder.folder / item.picture, formats=("PNG",)) as image:
            pixels = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)
        title = "exact, with thinking" if item.think else "exact, without thinking"
        marks.setdefault(title, []).append(right(item.row, pixels))
    return {title: Score(right=sum(found), n=len(found)).to_dict() for title, found in marks.items()}


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
    find=lambda folder: [folder / "evaluation_metadata.jsonl"],
    items=_geneval_items,
    files=_geneval_files,
    commands=lambda run: [
        'python evaluation/evaluate_images.py "$RUN/images" --outfile "$RUN/geneval.jsonl" --model-path DETECTOR',
        '(cd evaluation && python summary_scores.py "$RUN/geneval.jsonl")',
    ],
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
    find=_dpg_files,
    items=_dpg_items,
    files=one_grid,
    commands=lambda run: [
        'PROCESSES=1 PIC_NUM={samples} bash dpg_bench/dist_eval.sh "$RUN/images" {size}'.format_map(run["settings"])
    ],
)
WISE = Suite(
    name="wise",
    title="WISE",
    prompts=f"the folder data with {', '.join(f'{n}.json' for n in _WISE)}, or one of these",
    project="PKU-YuanGroup/WISE",
    evaluated="gpt_eval.py reads images/PROMPT_ID.png, Calculate.py what that wrote",
    published={"with thinking": "0.71", "without thinking": "0.43"},
    defaults=replace(_DEFAULTS, samples=1),
    find=_wise_files,
    items=_wise_items,
    files=one_grid,
    commands=_wise_commands,
)
SHAPES = Suite(
    name="shapes",
    title="shapes",
    prompts="nothing: benchmarks/quality/shapes.jsonl is built in",
    project="this one",
    evaluated="benchmarks/quality/judge.py, at once; for demo (the small model) and what training made of it",
    published={},
    defaults=Settings(samples=1, max_new_tokens=48),  # the arms think or not, whatever the setting says
    items=_shapes_items,
    builtin=RIDDLES,
    files=one_grid,
    scores=_shapes_scores,
)
SUITES = {suite.name: suite for suite in (GENEVAL, DPG, WISE, SHAPES)}
