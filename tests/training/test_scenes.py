"""The world against arithmetic and geometry of the tests' own."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindomni_rt.errors import BadRequestError
from mindomni_rt.training.data.world.scene import BRIGHTNESS, COLOURS, COUNTS, SHAPES, Scene, all_scenes, render, verify
from mindomni_rt.training.data.world.sources import MIXTURES, WorldStream, make
from mindomni_rt.training.data.world.text import (
    COLOUR_CLUES,
    QUESTIONS,
    SHAPE_CLUES,
    all_sums,
    answer_to,
    caption,
    edit,
    parse,
    riddle,
    slip,
    words,
)
from mindomni_rt.training.fresh import write_tokenizer

SCENES = st.sampled_from(all_scenes())


def draw(seed):
    return np.random.default_rng(seed)


def test_the_verifier_reads_every_picture():
    assert len(all_scenes()) == 96
    for scene in all_scenes():
        for brightness in BRIGHTNESS:
            assert verify(render(scene, brightness)) == scene


@given(SCENES, SCENES, st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_a_picture_with_one_foreign_cell_is_read_as_neither(scene, other, place):
    pixels, foreign = np.array(render(scene)), np.array(render(other))
    y, x = place // 3 * 32, place % 3 * 32
    pixels[y : y + 32, x : x + 32] = foreign[y : y + 32, x : x + 32]
    mixed = not np.array_equal(pixels, np.array(render(scene))) and not np.array_equal(pixels, foreign)
    found = verify(pixels.astype(np.float32) / 255)
    if mixed:
        count = {1: (4,), 2: (0, 8), 3: (0, 4, 8), 4: (0, 2, 6, 8), 5: (0, 2, 4, 6, 8), 6: (0, 2, 3, 5, 6, 8)}
        filled = tuple(i for i in range(9) if (pixels[i // 3 * 32 + 16, i % 3 * 32 + 16].astype(int) < 250).any())
        same_kind = (scene.colour, scene.shape) == (other.colour, other.shape)
        # What changes a count along the die stays a picture; anything else is none.
        assert (found is None) or ((same_kind or len(filled) == found.count) and filled == count[found.count])
    else:
        assert found in (scene, other)


@given(SCENES, st.floats(0, 0.05), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_small_noise_does_not_matter(scene, level, seed):
    pixels = np.asarray(render(scene), np.float32) / 255
    noisy = pixels + level * draw(seed).standard_normal(pixels.shape).astype(np.float32)
    assert verify(np.clip(noisy, 0, 1)) == scene


def test_what_is_no_picture_is_none():
    assert verify(np.full((96, 96, 3), 0.5, np.float32)) is None
    assert verify(np.ones((96, 96, 3), np.float32)) is None
    assert verify(np.full((96, 96, 3), np.nan, np.float32)) is None
    assert verify(np.ones((64, 64, 3), np.float32)) is None
    with pytest.raises(ValueError, match="expected a count of 1 to 6"):
        Scene(7, "red", "circle")


@given(SCENES)
@settings(deadline=None)
def test_captions_parse_back(scene):
    assert parse(caption(scene)) == scene
    assert parse(f"{caption(scene)}.") == scene
    assert parse(caption(scene).split()[0]) is None


@given(SCENES, st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_riddles_are_right(scene, seed):
    task = riddle(scene, draw(seed))
    left, sign, right = re.search(r"\((\d) ([+-]) (\d)\)", task.instruction).groups()
    value = int(left) + int(right) if sign == "+" else int(left) - int(right)
    assert value == scene.count and f"{left} {sign} {right} = {value}." in task.thought
    assert any(clue in task.instruction and f"{clue} is {scene.colour}." in task.thought for clue in COLOUR_CLUES)
    assert any(clue in task.instruction and f"{clue} is a {scene.shape}." in task.thought for clue in SHAPE_CLUES)
    assert parse(task.answer) == scene
    # A slip is another scene whenever the sum is a difference, and says what it paints.
    text, meant = slip(task.thought)
    assert (meant != scene) or (sign == "+")
    assert str(meant.count) in text and meant.colour in text and meant.shape in text


@given(SCENES, st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_edits_lead_to_their_scene(scene, seed):
    task = edit(scene, draw(seed))
    change = {"as many": 0, "one more": 1, "one fewer": -1}
    named = next(n for n in change if n in task.instruction)
    assert task.source.count + change[named] == scene.count
    clue = next((c for c in COLOUR_CLUES if c in task.instruction), None)
    assert (COLOUR_CLUES[clue] if clue else task.source.colour) == scene.colour
    assert task.source.shape == scene.shape and parse(task.answer) == scene


def test_what_is_held_out_is_never_asked_for_in_reinforcement_learning():
    scenes = [s for s in all_scenes() if s.held_out]
    assert 0.15 < len(scenes) / 96 < 0.25
    assert {s.count for s in scenes} == set(COUNTS)
    assert {s.colour for s in scenes} == set(COLOURS) and {s.shape for s in scenes} == set(SHAPES)
    sums = {str(s) for s in all_sums() if s.held_out}
    assert 0.1 < len(sums) / len(all_sums()) < 0.3
    assert {s.value for s in all_sums() if s.held_out} == set(COUNTS)
    for record in WorldStream("rgpo", 0).next_batch(2000):
        assert not parse(record.gt_prompt).held_out
        assert re.search(r"\((.*?)\)", record.instruction).group(1) not in sums
        assert record.output_image is None and not record.think_content and not record.answer


def test_answers_to_questions():
    scene = Scene(6, "blue", "cross")
    assert [answer_to(q, scene) for q in QUESTIONS] == ["six", "blue", "crosses", "six blue crosses"]


@pytest.mark.parametrize("name", MIXTURES)
def test_the_stream_is_a_function_of_seed_and_place(name):
    one, two = WorldStream(name, 5), WorldStream(name, 5)
    first = one.next_batch(40)
    two.load_state_dict({"position": 30})
    assert two.next_batch(10) == first[30:]
    assert WorldStream(name, 6).next_batch(40) != first
    assert len({r.source for r in first}) == 40


def test_mixtures_have_their_shares():
    records = WorldStream("sft", 0).next_batch(2000)
    thinking = sum(bool(r.think_content) for r in records) / 2000
    shares = MIXTURES["sft"]
    assert abs(thinking - (shares["riddle"] + shares["edit"]) / sum(shares.values())) < 0.04
    assert all(r.output_image is not None for r in records)
    with pytest.raises(BadRequestError, match=r"data\.split"):
        WorldStream("everything", 0)


def test_the_prior_errs_as_often_as_it_should():
    kinds = Counter()
    for index in range(1500):
        record = make("thought", draw(index))
        kinds["broken" if not record.answer else "right" if record.answer == record.gt_prompt else "wrong"] += 1
    assert abs(kinds["broken"] / 1500 - 0.12) < 0.03
    # 60 % slip; a slip may leave a sum with clues that it does not confuse as it was.
    assert 0.4 < kinds["wrong"] / 1500 < 0.56


def test_the_tokenizer_knows_every_word(tmp_path):
    from tokenizers import Tokenizer

    write_tokenizer(tmp_path, words())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    unknown = tokenizer.token_to_id("<unk>")
    for name in MIXTURES:
        for record in WorldStream(name, 1).next_batch(200):
            for text in (record.instruction, record.think_content, record.answer, record.reply, record.gt_prompt):
                assert unknown not in tokenizer.encode(text).ids, text
    text = "<think> 5 - 2 = 3. a lemon is yellow. </think> <answer> three yellow circles </answer>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
