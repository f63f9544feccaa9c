"""The small world's second verifier against the first, and the figures of the lossy options."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindomni_rt.benchmarks.quality.judge import Riddle, cosine, psnr, read, riddles, right, share
from mindomni_rt.benchmarks.quality.lossy import ARMS, table
from mindomni_rt.request import Request
from mindomni_rt.training.data.world.scene import COLOURS, COUNTS, SHAPES, Scene, all_scenes, render, verify
from mindomni_rt.training.data.world.text import all_sums


def pixels(scene: Scene, brightness: int = 0) -> np.ndarray:
    return np.asarray(render(scene, brightness), np.float32) / 255


def test_both_verifiers_read_every_scene() -> None:
    for scene in all_scenes():
        for brightness in (-2, 0, 2):
            assert read(pixels(scene, brightness)) == (scene.count, scene.colour, scene.shape)


@given(st.integers(0, 95), st.floats(0, 0.25), st.integers(0, 1000))
def test_neither_reads_another_scene_into_noise(index: int, noise: float, seed: int) -> None:
    scene = all_scenes()[index]
    picture = pixels(scene) + noise * np.random.default_rng(seed).standard_normal((96, 96, 3)).astype(np.float32)
    assert read(picture) in (None, (scene.count, scene.colour, scene.shape))
    assert verify(picture) in (None, scene)


def test_unclear_pictures_are_none() -> None:
    assert read(np.ones((96, 96, 3), np.float32)) is None
    assert read(np.full((96, 96, 3), 0.5, np.float32)) is None
    assert read(np.ones((64, 64, 3), np.float32)) is None
    mixed = pixels(Scene(2, "red", "circle")).copy()
    mixed[:32, :32] = pixels(Scene(2, "blue", "circle"))[:32, :32]
    assert read(mixed) is None


def test_the_suite_is_held_out_and_true() -> None:
    suite = riddles()
    assert len(suite) == 96 == len({r.instruction for r in suite})
    sums = {str(s): s for s in all_sums()}
    for riddle in suite:
        assert Scene(riddle.count, riddle.colour, riddle.shape).held_out
        total = sums[riddle.instruction.split("(")[1].split(")")[0]]
        assert total.held_out and total.value == riddle.count
        assert riddle.count in COUNTS and riddle.colour in COLOURS and riddle.shape in SHAPES


def test_share() -> None:
    riddle = Riddle(instruction="", count=3, colour="red", shape="cross")
    good, bad = pixels(Scene(3, "red", "cross")), pixels(Scene(2, "red", "cross"))
    assert right(riddle, good) and not right(riddle, bad)
    assert share([riddle, riddle], [good, bad]) == 0.5


def test_figures() -> None:
    a = np.zeros((4, 4, 3), np.float32)
    assert psnr(a, a) == 100 and psnr(a + np.float32(0.1), a) == pytest.approx(20, abs=1e-3)
    assert cosine(np.array([1.0, 0]), np.array([1.0, 1])) == pytest.approx(2**-0.5)
    row = {"psnr": 20.0, "latent_cosine": 0.5, "right": 0.25, "time": 0.5}
    assert "| exact | 20.0 | 0.5000 | 25 % | 0.50 |" in table({"exact": row})


def test_every_arm_is_a_valid_request() -> None:
    for options in ARMS.values():
        Request(prompt="x", **options)
