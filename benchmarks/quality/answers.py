"""The option that a model's answer names, in the forms that evaluators accept."""

from __future__ import annotations

import re
from collections.abc import Mapping

_MARKUP = re.compile(r"[*_`$\"'“”]|\\(?:text|mathrm|mathbf|textbf)\b")
_ENCLOSED = re.compile(r"<answer>(.*?)</answer>|\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}", re.DOTALL | re.IGNORECASE)


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
