"""Answers of `quality`: what the model is asked, and the files that scorers read."""

from __future__ import annotations

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image
from quality_cases import picture, quality, questions, tree, tsv

import mindomni_rt
from mindomni_rt.benchmarks.quality.answers import letter_of, side_by_side
from mindomni_rt.benchmarks.quality.command import SUITES
from mindomni_rt.benchmarks.quality.report import Share

OPTIONS = {"A": "one", "B": "a red Cross.", "D": "none"}


def reread(path: Path) -> list[dict[str, str]]:
    """A prediction file as a scorer's table reader sees it."""
    csv.field_size_limit(2**31 - 1)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))
    finally:
        csv.field_size_limit(131_072)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("answers")
    prompts, out = questions(folder), folder / "run"
    assert quality("mmmu", prompts, out) == 0
    return prompts, out


def asked(prompts: Path) -> dict[str, str]:
    return {item.name: item.prompt for item in SUITES["mmmu"].read(prompts).items}


def test_questions_are_asked_as_usual(run: tuple[Path, Path]) -> None:
    texts = asked(run[0])
    letter = "Answer with the option's letter from the given choices directly."
    assert texts["0"] == f'Which\tof\n“these”?\nA. one\nB. the "second"\n{letter}'
    assert texts["1"].startswith("The picture shows images 1 to 3 from left to right.\nLike <image 2>?\nA. one\n")
    assert texts["3"] == "How many?\nAnswer the question using a single word or phrase."
    assert texts["4 b"].startswith("Look.\nNo picture?\nA. one\n")


def test_each_answer_is_the_models_on_that_picture(run: tuple[Path, Path]) -> None:
    prompts, out = run
    pipe = mindomni_rt.load(PARITY, device="cpu")
    texts = asked(prompts)
    open_ = [Image.open(io.BytesIO(base64.b64decode(picture(i)))) for i in range(5)]
    wide = np.full((56, 3 * 56 + 32, 3), 255, np.uint8)
    for index in range(3):
        wide[:, index * 72 : index * 72 + 56] = np.asarray(open_[index + 1])
    shown = {"0": open_[0], "1": wide, "1000000": open_[0], "3": open_[4], "4 b": None}
    for name, image in shown.items():
        record = json.loads((out / "items" / f"{name}.json").read_text(encoding="utf-8"))
        assert record["text"] == pipe.understand(texts[name], image, max_new_tokens=3).text
        assert record["tokens"] == 3 and record["images"] == {"1": 3, "4 b": 0}.get(name, 1)


def test_predictions_are_the_rows_with_one_column_more(run: tuple[Path, Path]) -> None:
    prompts, out = run
    rows, found = reread(prompts), reread(out / "parity_MMMU_DEV_VAL.tsv")
    assert len(found) == 6 and list(found[0]) == [c for c in rows[0] if c != "image"] + ["prediction"]
    for row, line in zip(rows, found, strict=True):
        assert {k: v for k, v in line.items() if k != "prediction"} == {k: v for k, v in row.items() if k != "image"}
        text = json.loads((out / "items" / f"{row['index']}.json").read_text(encoding="utf-8"))["text"]
        assert line["prediction"] == text.strip()
    answers = json.loads((out / "mmmu_answers.json").read_text(encoding="utf-8"))
    assert list(answers) == [row["id"] for row in rows if row["id"].startswith("validation_")]
    assert answers["validation_Art_3"] == found[3]["prediction"]


def test_the_report_says_what_the_score_is_not(run: tuple[Path, Path]) -> None:
    report = (run[1] / "report.md").read_text(encoding="utf-8")
    assert "| plain letter match, not the official score |" in report and "51.6" in report
    assert "Questions with several images: 1" in report and "Questions with no image: 1;" in report
    assert 'vlmutil eval "$RUN/parity_MMMU_DEV_VAL.tsv"' in report and "main_eval_only.py --output_path" in report
    (score,) = json.loads((run[1] / "report.json").read_text())["scores"].values()
    assert score["n"] == 2  # the others have no options or no known answer


def test_big_images_and_a_limit_that_is_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    big = picture(7, 400)
    assert len(big) > 131_072 == before
    path = tsv(tmp_path / "RealWorldQA.tsv", [{"index": "0", "question": "Big?", "image": big, "A": "yes", "B": "no"}])
    assert quality("realworldqa", path, tmp_path / "run", "--max-image-tokens", "9") == 0
    assert csv.field_size_limit() == before
    broken = tsv(tmp_path / "broken.tsv", [{"index": "0", "question": ""}])
    assert quality("realworldqa", broken, tmp_path / "other") == 2 and csv.field_size_limit() == before
    assert set(tree(tmp_path / "run")) == {
        "run.json", "report.json", "report.md", "items/0.json", "parity_RealWorldQA.tsv"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" B. a red cross", "B"),
        ("(D)", "D"),
        ("D) none", "D"),
        ("B: it is", "B"),
        ("A\nbecause", "A"),
        ("The answer is B", "B"),
        ("Answer: (D)", "D"),
        ("the answer is A, no, the answer is D.", "D"),
        ("A red Cross", "B"),
        ("None.", "D"),
        ("C", None),
        ("a", None),
        ("A red one", None),
        ("Answering", None),
        ("", None),
        ("B C", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert letter_of(text, OPTIONS) == letter
    assert letter_of(text, {}) is None


def test_pictures_side_by_side() -> None:
    tall, wide = Image.new("RGB", (2, 5), "red"), Image.new("RGB", (4, 1), "blue")
    both = np.asarray(side_by_side([tall, wide]))
    assert both.shape == (5, 22, 3) and side_by_side([tall]).size == (2, 5)
    assert (both[:, :2] == (255, 0, 0)).all() and (both[0, 18:] == (0, 0, 255)).all()
    assert (both[:, 2:18] == 255).all() and (both[1:, 18:] == 255).all()


def test_intervals_by_hand() -> None:
    low, high = Share(right=8, n=10).interval  # Wilson by hand: 0.4902, 0.9433
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Share(right=0, n=5).interval[0] == pytest.approx(0, abs=1e-12) and Share(right=5, n=5).interval[1] == 1
