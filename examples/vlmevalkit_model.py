"""MindOmni as a model of VLMEvalKit: answers to MMMU, MMBench, RealWorldQA and its other image benchmarks.

VLMEvalKit (https://github.com/open-compass/VLMEvalKit) downloads the data sets, goes on where a run ended, splits work
over processes and computes the scores. From a checkout of it, with mindomni-rt installed in the same environment:

    python /path/to/vlmevalkit_model.py MODEL --data MMMU_DEV_VAL MMBench_DEV_EN RealWorldQA --judge exact_matching

MODEL is a checkpoint folder, hub id or bundle; all other arguments are those of VLMEvalKit's `run.py`. To have the
model in its own list instead, add to `vlmeval/config.py`:

    supported_VLM["MindOmni"] = partial(MindOmni, model="path/to/MindOmni")

Published for MindOmni (README of the released project): MMMU 51.6, MMBench 83.2, RealWorldQA 68.1.

Two things differ from other models' runs. MindOmni takes one image: several are put side by side into one picture, and
the prompt says so. A reply to a multiple-choice question is reduced to its option letter where it names one, in any of
the forms that `letter_of` reads ("**B**", "Option B", "\\boxed{B}"), so that exact matching needs no judge model.
"""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

import mindomni_rt
from mindomni_rt.inputs.images import DEFAULT_IMAGE_TOKENS, load_image

try:
    from vlmeval.vlm.base import BaseModel
except ImportError:  # the class works without it; `main` needs it and says so
    BaseModel = object

_GAP = 16  # pixels of white between two images side by side
_MARKUP = re.compile(r"[*_`$\"'“”]|\\(?:text|mathrm|mathbf|textbf)\b")
_ENCLOSED = re.compile(r"<answer>(.*?)</answer>|\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL | re.IGNORECASE)
_OPTION = re.compile(r"^\(?([A-Z])[.)]\s+(.+)$", re.MULTILINE)


class MindOmni(BaseModel):
    """A model of VLMEvalKit. model, and `load`'s keyword arguments such as device, dtype or memory_budget.

    max_image_tokens: cap on an image's tokens, None for no cap.
    """

    INTERLEAVE = True

    def __init__(
        self,
        model: str,
        *,
        max_new_tokens: int = 512,
        max_image_tokens: int | None = DEFAULT_IMAGE_TOKENS,
        **load: Any,
    ) -> None:
        self._pipe = mindomni_rt.load(model, **load)
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "max_image_tokens": max_image_tokens}

    def generate_inner(self, message: Sequence[Mapping[str, str]], dataset: str | None = None) -> str:
        """The answer to one question. message: {"type": "image" or "text", "value": a path or the text} in order."""
        images = [load_image(Path(part["value"])) for part in message if part["type"] == "image"]
        texts = [part["value"] for part in message if part["type"] == "text"]
        if len(images) > 1:
            texts.insert(0, f"The picture shows images 1 to {len(images)} from left to right.")
        prompt = "\n".join(texts)
        picture = side_by_side(images) if images else None
        reply = self._pipe.understand(prompt, picture, **self._options).text.strip()
        options = dict(_OPTION.findall(prompt))
        return (letter_of(reply, options) if len(options) > 1 else None) or reply


def letter_of(text: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names, None if it names none or it is not clear which.

    In this order: within the last `<answer>…</answer>` or `\\boxed{…}`; a letter that begins the text ("B", "(B)",
    "B. …", "**B**", "Option B"); after "answer is" or "Answer:", the last one; the only letter after "option" or
    "choice"; the whole text of one option. Reasoning within <think> is not read.
    """
    letters = "".join(options)
    if not letters:
        return None
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    if enclosed := [a or b for a, b in _ENCLOSED.findall(text)]:
        inner = enclosed[-1].strip()
        return letter_of(inner.upper() if len(inner) == 1 else inner, options)
    bare = _MARKUP.sub("", text).strip()
    one = rf"[(\[{{]*([{letters}])\b[)\]}}]*"
    if first := re.match(rf"(?:(?i:option|choice)\s+)?{one}\s*(?:$|[.:,)\n])", bare):
        return first[1]
    if named := re.findall(rf"(?i:answer)(?:\s+is)?\s*:?\s*(?:(?i:option|choice)\s+)?{one}", bare):
        return str(named[-1])
    told = set(re.findall(rf"\b(?i:option|choice)(?:\s+is)?\s*:?\s*{one}", bare))
    if len(told) == 1:
        return str(told.pop())
    same = [k for k, v in options.items() if v.strip().rstrip(".").casefold() == bare.rstrip(".").casefold()]
    return same[0] if len(same) == 1 else None


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right on white, their tops aligned, none resized."""
    width = sum(i.width for i in images) + _GAP * (len(images) - 1)
    whole = Image.new("RGB", (width, max(i.height for i in images)), "white")
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width + _GAP
    return whole


def main() -> None:
    """Registers the model and hands over to VLMEvalKit's run.py."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    try:
        from vlmeval.config import supported_VLM
    except ImportError:
        sys.exit("error: VLMEvalKit is not installed: pip install -e . in a checkout of open-compass/VLMEvalKit")
    if not Path("run.py").is_file():
        sys.exit("error: no run.py here: start this in the checkout of VLMEvalKit")
    supported_VLM["MindOmni"] = partial(MindOmni, model=sys.argv.pop(1))
    sys.argv += ["--model", "MindOmni"]
    runpy.run_path("run.py", run_name="__main__")


if __name__ == "__main__":
    main()
