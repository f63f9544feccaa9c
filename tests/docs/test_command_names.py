"""Commands that users read start with `mindomni`: a wheel holds no top-level `training` and `benchmarks`."""

from __future__ import annotations

import re

from test_words import ROOT, sources

_OF_A_CHECKOUT = re.compile(r"python3? -m (training|benchmarks)\b")
ALLOWED = {  # the modules themselves, and what was true when it was written
    "training/__main__.py",
    "benchmarks/__main__.py",
    "CHANGELOG.md",
    "docs/log.md",
}


def test_commands_work_in_a_wheel() -> None:
    pages = [*sources(), *(ROOT / "examples").rglob("*.ipynb"), *(ROOT / "deploy").rglob("*.y*ml")]
    found = []
    for path in pages:
        name = path.relative_to(ROOT).as_posix()
        if name in ALLOWED or name.startswith("benchmarks/results/"):
            continue
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{name}:{n}: {line.strip()}" for n, line in enumerate(lines, 1) if _OF_A_CHECKOUT.search(line)]
    assert not found, "write `mindomni train` or `mindomni bench`:\n" + "\n".join(found)
