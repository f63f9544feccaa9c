"""What the tests of `quality` share: hand-written prompt files in the official formats, and a folder as bytes."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from conftest import PARITY
from PIL import Image

from mindomni_rt.benchmarks.cli import main

PAINT = ["--size", "32", "--steps", "2", "--max-new-tokens", "3", "--device", "cpu"]
WRITE = ["--max-new-tokens", "3", "--device", "cpu"]


def quality(suite: str, prompts: Path, out: Path, *more: str, model: Path = PARITY) -> int:
    """The command's exit code, at small sizes."""
    small = PAINT if suite in ("geneval", "dpg", "wise") else WRITE
    return main(["quality", suite, str(model), "--prompts", str(prompts), "--out", str(out), *small, *more])


def geneval_file(folder: Path, count: int = 4) -> Path:
    tags = ("single_object", "counting")
    rows = [{"tag": tags[i % 2], "include": [], "prompt": f"a photo of {i} bells"} for i in range(count)]
    rows[0]["prompt"] = "a photo of a line\u2028separator"  # splits lines for str.splitlines, not for JSON Lines
    path = folder / "evaluation_metadata.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def dpg_folder(folder: Path, names: Sequence[str] = ("12", "partiprompts3", "a b", "ü")) -> Path:
    path = folder / "prompts"
    path.mkdir()
    for name in names:
        (path / f"{name}.txt").write_text(f"Ein {name} neben “{name}”.\n", encoding="utf-8")
    (path / "notes.md").write_text("not a prompt")
    (path / "._12.txt").write_bytes(b"\xff\x00")
    return path


def wise_folder(folder: Path) -> Path:
    path = folder / "data"
    path.mkdir()
    for first, name in ((1, "cultural_common_sense"), (401, "spatio-temporal_reasoning"), (701, "natural_science")):
        keys = {"Explanation": "", "Category": "c", "Subcategory": "s"}
        rows = [{"prompt_id": i, "Prompt": f"thing number {i}", **keys} for i in (first, first + 1)]
        (path / f"{name}.json").write_text(json.dumps(rows, indent=4), encoding="utf-8")
    return path


def picture(seed: int, side: int = 56) -> str:
    """A noisy picture in base64: big where its side is."""
    buffer = io.BytesIO()
    draw = np.random.default_rng(seed)
    Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def tsv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    columns = list(dict.fromkeys(c for row in rows for c in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, delimiter="\t", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def questions(folder: Path) -> Path:
    """Six questions of every kind: several images, another row's image, none, no options, quotes, tabs, newlines."""
    choice = {"A": "one", "B": 'the "second"', "C": "", "split": "validation"}
    many = str([picture(1), picture(2), picture(3)])
    rows = [
        {"index": "0", "id": "validation_Art_1", "question": "Which\tof\n“these”?", "image": picture(0), **choice},
        {"index": "1", "id": "validation_Art_2", "question": "Like <image 2>?", "image": many, **choice, "answer": "A"},
        {"index": "1000000", "id": "dev_Art_1", "question": "Again?", "image": "0", **choice, "answer": "B"},
        {"index": "3", "id": "validation_Art_3", "question": "How many?", "image": picture(4), "answer": "3"},
        {"index": "4 b", "id": "validation_Art_4", "question": "No picture?", **choice, "hint": "Look."},
        {"index": "5", "id": "validation_Art_5", "question": 'A "big" one?', "image": picture(5, 256), **choice},
    ]
    return tsv(folder / "MMMU_DEV_VAL.tsv", rows)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
