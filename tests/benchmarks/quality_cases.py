"""What the tests of `quality` share: hand-written prompt files in the official formats, and a folder as bytes."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from conftest import PARITY
from PIL import Image

from mindomni_rt.benchmarks.cli import main

PAINT = ["--size", "32", "--steps", "2", "--max-new-tokens", "3", "--device", "cpu"]


def quality(suite: str, prompts: Path, out: Path, *more: str, model: Path = PARITY) -> int:
    """The command's exit code, at small sizes."""
    return main(["quality", suite, str(model), "--prompts", str(prompts), "--out", str(out), *PAINT, *more])


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


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones too."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
