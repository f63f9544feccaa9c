"""MMMU, MMBench and RealWorldQA: answers in words to the questions of VLMEvalKit's TSV files.

Read: columns `index`, `question`, `image` (base64, a list of them, or the index of the row that holds it), `hint`, one
letter each for the options, `answer`. Written: MODEL_DATASET.tsv, the rows without their images and with a column
`prediction`, from which `vlmutil eval` takes the data set by the file's name and which it loads as .tsv, .xlsx or .json
alike; for MMMU also {id: answer}, which main_eval_only.py reads.

Sources: open-compass/VLMEvalKit (vlmeval/dataset/image_base.py, image_mcq.py, vlmeval/tools.py, vlmeval/smp/file.py)
and MMMU-Benchmark/MMMU (eval/main_eval_only.py, eval/README.md: strictly a letter for multiple choice, any text for an
open question, and ids of the validation split only).

MindOmni takes one image: a question's several are put side by side into one picture, which the others' scores are not.
"""

from __future__ import annotations

import csv
import io
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mindomni_rt.errors import BadRequestError
from mindomni_rt.inputs.images import DEFAULT_IMAGE_TOKENS

from ..results import write_atomic, write_json
from .report import Share
from .run import RunFolder, item_file, record_bytes
from .suite import Item, Prompts, Settings, Suite, checked_items, checked_name, checked_prompt, hashed, located
from .tsv import decoded, images_of, read_rows

if TYPE_CHECKING:
    from mindomni_rt.pipeline import Pipeline

LETTER = "Answer with the option's letter from the given choices directly."
PHRASE = "Answer the question using a single word or phrase."
_GAP = 16  # pixels of white between two images side by side


def _read(suite: Suite, path: Path | None) -> Prompts:
    path = located(path, suite)
    if path.is_dir():
        raise BadRequestError(f"{path} is a folder: {suite.wanted}")
    rows = read_rows(path, suite)
    cells = {row["index"]: row.get("image", "") for _, row in rows}
    items = []
    for where, row in rows:
        images = images_of(cells, row, where)
        for image in images:
            decoded(image, where).close()  # checked before hours are spent; decoded again when its turn comes
        options = {c: row[c] for c in string.ascii_uppercase if row.get(c, "").strip()}
        items.append(
            Item(
                name=checked_name(row["index"], where),
                prompt=_prompt(row, options, len(images), where),
                where=where,
                row={"cells": row, "images": images, "options": options},
            )
        )
    return Prompts(files=(path,), items=checked_items(items, path, suite), sha256=hashed([path]))


def _prompt(row: Mapping[str, str], options: Mapping[str, str], images: int, where: str) -> str:
    question = checked_prompt(row["question"], where, "question").strip()
    lines = [row["hint"].strip()] if row.get("hint", "").strip() else []
    if images > 1:
        lines.append(f"The picture shows images 1 to {images} from left to right.")
    lines += [question, *(f"{letter}. {text.strip()}" for letter, text in options.items())]
    return "\n".join([*lines, LETTER if options else PHRASE])


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right on white, their tops aligned, none resized."""
    width = sum(i.width for i in images) + _GAP * (len(images) - 1)
    whole = Image.new("RGB", (width, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + _GAP
    return whole


def _outputs(item: Item, settings: Settings) -> list[str]:
    return [item_file(item.name)]


def _make(pipe: Pipeline, item: Item, settings: Settings) -> dict[str, bytes]:
    images = [decoded(text, item.where) for text in item.row["images"]]
    result = pipe.understand(
        item.prompt,
        side_by_side(images) if images else None,
        max_new_tokens=settings.max_new_tokens,
        max_image_tokens=settings.max_image_tokens or None,
    )
    record = {
        "id": item.name,
        "prompt": item.prompt,
        "images": len(images),
        "text": result.text,
        "tokens": len(result.token_ids),
    }
    return {item_file(item.name): record_bytes(record)}


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The option that an answer names: by its letter first, after "answer is", or by its whole text; else None."""
    text, letters = text.strip(), "".join(options)
    if not letters:
        return None
    if first := re.match(rf"\(?([{letters}])\)?\s*(?:$|[.:,)\n])", text):
        return first[1]
    if named := re.findall(rf"(?i:answer)(?:\s+is)?\s*:?\s*\(?([{letters}])\b", text):
        return str(named[-1])
    same = [k for k, v in options.items() if v.strip().rstrip(".").casefold() == text.rstrip(".").casefold()]
    return same[0] if len(same) == 1 else None


def _finish(folder: RunFolder, done: Sequence[Item], chosen: Sequence[Item], run: Mapping[str, Any]) -> dict[str, Any]:
    """The plain letter match of what is done; the prediction files once all chosen items are."""
    right = unread = n = 0
    replies = {item.name: str(folder.record(item.name)["text"]).strip() for item in done}
    for item in done:
        options, answer = item.row["options"], item.row["cells"].get("answer", "").strip()
        if answer in options:
            found = letter_of(replies[item.name], options)
            n, right, unread = n + 1, right + (found == answer), unread + (found is None)
    out: dict[str, Any] = {"notes": []}
    if n:
        out["scores"] = {
            "plain letter match, not the official score": Share(right=right, n=n).to_dict()
            | {"no letter found": unread}
        }
    several = sum(len(i.row["images"]) > 1 for i in chosen)
    if several:
        out["notes"].append(
            f"questions with several images: {several}, shown side by side as one, unlike what other models were given"
        )
    bare = sum(not i.row["images"] for i in chosen)
    if bare:
        out["notes"].append(
            f"questions with no image: {bare}; VLMEvalKit drops such rows and refuses predictions for them"
        )
    if len(done) == len(chosen):
        write_atomic(folder.folder / predictions_name(run), _predictions(chosen, replies))
        if run["suite"] == "mmmu":
            answers = _official(chosen, replies)
            write_json(folder.folder / "mmmu_answers.json", answers)
            if not answers:
                out["notes"].append("no column id with MMMU's ids: mmmu_answers.json is empty")
    return out


def predictions_name(run: Mapping[str, Any]) -> str:
    """MODEL_DATASET.tsv: `vlmutil eval` takes the data set from the end of the name."""
    return f"{run['model']['name']}_{Path(run['prompts']['files'][0]).stem}.tsv"


def _predictions(chosen: Sequence[Item], replies: Mapping[str, str]) -> str:
    columns = [c for c in chosen[0].row["cells"] if c not in ("image", "prediction")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow([*columns, "prediction"])
    for item in chosen:
        writer.writerow([*(item.row["cells"][c] for c in columns), replies[item.name]])
    return buffer.getvalue()


def _official(chosen: Sequence[Item], replies: Mapping[str, str]) -> dict[str, str]:
    """{id: letter, or the whole reply where none is found or the question is open}; the evaluator knows no dev ids."""
    out = {}
    for item in chosen:
        name = item.row["cells"].get("id", "").strip()
        if name and not name.startswith("dev_"):
            out[name] = letter_of(replies[item.name], item.row["options"]) or replies[item.name]
    return out


def _commands(run: Mapping[str, Any]) -> list[str]:
    lines = [f'vlmutil eval "$RUN/{predictions_name(run)}" --judge exact_matching']
    if run["suite"] == "mmmu":
        lines.append(
            'python main_eval_only.py --output_path "$RUN/mmmu_answers.json" --answer_path answer_dict_val.json'
        )
    return lines


def _suite(name: str, title: str, file: str, published: str, also: str = "") -> Suite:
    suite = Suite(
        name=name,
        title=title,
        prompts=file,
        project="open-compass/VLMEvalKit",
        evaluated=f"vlmutil eval of VLMEvalKit reads MODEL_DATASET.tsv{also}",
        published={"accuracy, %": published},
        defaults=Settings(max_image_tokens=DEFAULT_IMAGE_TOKENS),
        read=lambda path: _read(suite, path),
        outputs=_outputs,
        make=_make,
        finish=_finish,
        commands=_commands,
    )
    return suite


SUITES = (
    _suite(
        "mmmu", "MMMU", "MMMU_DEV_VAL.tsv", "51.6", "; main_eval_only.py of MMMU-Benchmark/MMMU reads mmmu_answers.json"
    ),
    _suite("mmbench", "MMBench", "MMBench_DEV_EN.tsv", "83.2"),
    _suite("realworldqa", "RealWorldQA", "RealWorldQA.tsv", "68.1"),
)
