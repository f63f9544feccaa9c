"""Answers for evaluators: option letters in the forms they accept, and the model class for VLMEvalKit."""

from __future__ import annotations

import base64
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image
from quality_cases import picture

import mindomni_rt
from mindomni_rt.scores import Score

OPTIONS = {"A": "one", "B": "a red Cross.", "D": "none"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "vlmevalkit_model.py"
ROOT = str(EXAMPLE.parents[1])
QUESTION = 'Question: Which of “these”?\nOptions:\nA. one\nB. the "second"\n'


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The example's module, without VLMEvalKit."""
    spec = importlib.util.spec_from_file_location("vlmevalkit_model", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(example: ModuleType) -> Any:
    return example.MindOmni(str(PARITY), max_new_tokens=3, device="cpu")


def stored(folder: Path, seed: int) -> Path:
    path = folder / f"{seed}.png"
    path.write_bytes(base64.b64decode(picture(seed)))
    return path


def test_each_answer_is_the_models_on_that_picture(model: Any, tmp_path: Path) -> None:
    """One image, several side by side, none: as VLMEvalKit's messages give them."""
    pipe = mindomni_rt.load(PARITY, device="cpu")
    paths = [stored(tmp_path, seed) for seed in range(1, 4)]
    images = [{"type": "image", "value": str(path)} for path in paths]
    text = {"type": "text", "value": QUESTION}
    wide = np.full((56, 3 * 56 + 32, 3), 255, np.uint8)
    for index, path in enumerate(paths):
        wide[:, index * 72 : index * 72 + 56] = np.asarray(Image.open(path))
    several = f"The picture shows images 1 to 3 from left to right.\n{QUESTION}"
    for message, prompt, shown in (
        ([images[0], text], QUESTION, paths[0]),
        ([*images, text], several, wide),
        ([text], QUESTION, None),
    ):
        reply = pipe.understand(prompt, shown, max_new_tokens=3).text.strip()
        assert model.generate_inner(message, "MMMU_DEV_VAL") == reply


def test_a_choice_is_reduced_to_its_letter_and_other_replies_are_kept(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "_pipe", Told("It shows two.\n**Answer:** B. the second"))
    assert model.generate_inner([{"type": "text", "value": QUESTION}]) == "B"
    assert model.generate_inner([{"type": "text", "value": "How many?"}]).startswith("It shows two.")
    monkeypatch.setattr(model, "_pipe", Told(" either "))
    assert model.generate_inner([{"type": "text", "value": QUESTION}]) == "either"


class Told:
    """A pipeline that always answers the same."""

    def __init__(self, text: str) -> None:
        self.text = text

    def understand(self, *_: Any, **__: Any) -> Told:
        return self


def test_it_says_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(PARITY)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_it_hands_over_to_the_evaluators_run(tmp_path: Path) -> None:
    """A stand-in for VLMEvalKit's checkout: its list of models, and a run.py that uses it as that does."""
    package = tmp_path / "vlmeval"
    (package / "vlm").mkdir(parents=True)
    for folder in (package, package / "vlm"):
        (folder / "__init__.py").write_text("")
    (package / "vlm" / "base.py").write_text("class BaseModel:\n    INTERLEAVE = False\n")
    (package / "config.py").write_text("supported_VLM = {}\n")
    (tmp_path / "run.py").write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\nfrom vlmeval.vlm.base import BaseModel\n"
        "model = supported_VLM[sys.argv[sys.argv.index('--model') + 1]](max_new_tokens=2, device='cpu')\n"
        "assert isinstance(model, BaseModel) and sys.argv[1:3] == ['--data', 'MMBench_DEV_EN']\n"
        "print(repr(model.generate_inner([{'type': 'text', 'value': 'What?'}], 'MMBench_DEV_EN')))\n"
    )
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), str(PARITY), "--data", "MMBench_DEV_EN"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    text = mindomni_rt.load(PARITY, device="cpu").understand("What?", max_new_tokens=2).text.strip()
    assert done.stdout.strip().splitlines()[-1] == repr(text)


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
        ("**B**", "B"),
        ("**B.** a red cross", "B"),
        ("`B`", "B"),
        ("[B]", "B"),
        ("Option B", "B"),
        ("option B: it is", "B"),
        ("<answer>B</answer>", "B"),
        ("<answer>A</answer> no: <answer> (B) </answer>", "B"),
        (r"\boxed{B}", "B"),
        (r"so $\boxed{\text{B}}$.", "B"),
        (r"\boxed{b}", "B"),
        ("B.", "B"),
        ("**Answer:** B", "B"),
        ("Final answer: **B. a red cross**", "B"),
        ("The correct option is B", "B"),
        ("The best choice is: (B)", "B"),
        ("<think>It may be A.</think>B", "B"),
        ("option A is wrong, option B is right", None),
        (r"\boxed{C}", None),
    ],
)
def test_letters(example: ModuleType, text: str, letter: str | None) -> None:
    assert example.letter_of(text, OPTIONS) == letter
    assert example.letter_of(text, {}) is None


def test_pictures_side_by_side(example: ModuleType) -> None:
    side_by_side = example.side_by_side
    tall, wide = Image.new("RGB", (2, 5), "red"), Image.new("RGB", (4, 1), "blue")
    both = np.asarray(side_by_side([tall, wide]))
    assert both.shape == (5, 22, 3) and side_by_side([tall]).size == (2, 5)
    assert (both[:, :2] == (255, 0, 0)).all() and (both[0, 18:] == (0, 0, 255)).all()
    assert (both[:, 2:18] == 255).all() and (both[1:, 18:] == 255).all()


def test_intervals_by_hand() -> None:
    low, high = Score(right=8, n=10).interval  # Wilson by hand: 0.4902, 0.9433
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert Score(right=0, n=5).interval[0] == pytest.approx(0, abs=1e-12) and Score(right=5, n=5).interval[1] == 1
