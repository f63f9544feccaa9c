"""Rollouts in the run folder and in TensorBoard."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from toy import toy_config

from mindomni_rt.training.loop.board import text_table
from mindomni_rt.training.loop.logs import Log
from mindomni_rt.training.loop.rollout_dump import labelled_grid
from mindomni_rt.training.stages.base import Sample


def samples(groups=2, each=3, size=48):
    colours = np.random.default_rng(0).integers(0, 255, (groups * each, 3), dtype=np.uint8)
    return [
        Sample(i // each, f"draw {i // each}", f"<think> {i} | </think>", "two", 0.5 * i, np.tile(c, (size, size, 1)))
        for i, c in enumerate(colours)
    ]


def test_the_grid_has_a_row_for_each_group_with_labels():
    given = samples()
    grid = np.asarray(labelled_grid(given))
    for sample in given:  # every image is there, untouched
        assert (grid == sample.image[0, 0]).all(-1).sum() == 48 * 48
    rows = [np.flatnonzero((grid == s.image[0, 0]).all(-1).any(1)) for s in given]
    assert (rows[0] == rows[2]).all() and rows[0].max() < rows[3].min()
    between = grid[rows[0].max() + 1 : rows[3].min()]
    assert (between < 128).any()  # text: rewards below the first row, the prompt above the second
    assert (grid[: rows[0].min()] < 128).any()


def test_rollouts_reach_files_and_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="events need the train extra")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = toy_config("rgpo", tmp_path, tmp_path / "run")
    with Log(config, 0, bar=False) as log:
        log.write(1, {"loss": 2.0})
        log.samples(1, samples())
    folder = tmp_path / "run"
    rows = [json.loads(x) for x in (folder / "rollouts" / "step-000001.jsonl").read_text().splitlines()]
    assert [r["reward"] for r in rows] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5] and rows[3]["group"] == 1
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert events.Scalars("loss")[0].value == 2.0
    shown = events.Images("rollouts/images")[0]
    assert (shown.width, shown.height) == Image.open(folder / "rollouts" / "step-000001.png").size
    assert b"&lt;think" in events.Tensors("rollouts/texts/text_summary")[0].tensor_proto.string_val[0]


def test_the_table_of_texts_is_one_row_each():
    lines = text_table(samples()).splitlines()
    assert len(lines) == 2 + 6
    assert lines[2] == "| 1 | 0.000 | draw 0 | &lt;think> 0 \\| &lt;/think> |"
