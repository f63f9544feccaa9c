"""`mindomni bench gpu` on the stand-in: the published widths, one layer in each stack, one small picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

SIDE, LAYERS = 256, 1


def sections(asked: Sequence[str]) -> dict[str, Any]:
    """What the suite recorded of some parts, or of single sections of them ("part: section")."""
    import torch

    from mindomni_rt.benchmarks.gpu import suite
    from mindomni_rt.model.random.write import cut

    from .quick import remembered

    preset = suite.presets("full")
    preset = replace(preset, config=cut(preset.config, LAYERS), sides=(SIDE,), new=12, steps=3)
    found = suite.Suite(preset, torch.device("cuda", 0), 60, lambda: None)
    found.meter.runs = 2
    with remembered():
        for part, _, wanted in (text.partition(": ") for text in asked):
            for name, run in suite.PARTS[part][2](found).items():
                if not wanted or name == wanted:
                    if not name.startswith(suite._ON_ONE_BACKEND):
                        found.clean()
                    found.record.section(found.meter, name, 0, run)
    return found.record.data
