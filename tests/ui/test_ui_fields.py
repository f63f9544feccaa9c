"""The parts of the page that need no browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import mindomni_rt
from mindomni_rt import BadRequestError, Request
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.events import GenerationResult, ImageEvent, StepEvent, TextEvent
from mindomni_rt.inputs.prompts import Chat
from mindomni_rt.serving.model import Model
from mindomni_rt.serving.ui import fields
from mindomni_rt.serving.ui.examples import GENERAL, SHAPES_WORLD, defaults_of, examples_of
from mindomni_rt.serving.ui.handlers import Handlers
from mindomni_rt.serving.ui.page import mount
from mindomni_rt.serving.ui.sessions import Sessions
from mindomni_rt.serving.ui.views import status, views

SMALL = Model(path=str(DEMO_MODELS[0][0]))
SIDES = st.integers(1, 8).map(lambda n: 16 * n)
REQUESTS = st.builds(
    Request,
    prompt=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip),
    seed=st.none() | st.integers(0, 2**64 - 1),
    height=SIDES,
    width=SIDES,
    num_inference_steps=st.integers(1, 99),
    guidance_scale=st.floats(0, 9),
    negative_prompt=st.text("abc ", max_size=9),
    temperature=st.just(0.0) | st.floats(0.001, 2),
    solver=st.sampled_from(["euler", "multistep"]),
    guidance_interval=st.sampled_from([(0.0, 1.0), (0.25, 0.5)]),
    max_image_tokens=st.none() | st.integers(4, 999),
)


@given(REQUESTS)
def test_settings_come_back_as_the_same_request(request: Request) -> None:
    stored = json.loads(json.dumps({**request.settings(), "backend": "onnx", "text": "not a field"}))
    assert fields.to_request(fields.from_settings(stored)) == request


def test_numbers_of_a_browser() -> None:
    values: list[Any] = fields.from_settings({"prompt": "x", "width": 32, "height": 48})
    sent = [float(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in values]
    assert fields.to_request(sent) == Request(prompt="x", width=32, height=48)


@pytest.mark.parametrize(
    ("seed", "others", "message"),
    [
        ("7.5", "", "expected a whole number"),
        ("", "{", "other fields: not JSON"),
        ("", "[1]", "expected a JSON object"),
        ("", '{"seed": 1}', "seed cannot be set there"),
        ("", '{"solvers": "euler"}', "did you mean solver"),
    ],
)
def test_mistakes_in_controls(seed: str, others: str, message: str) -> None:
    values = fields.from_settings({"prompt": "x"})
    values[1], values[-1] = seed, others
    with pytest.raises(BadRequestError, match=message):
        fields.to_request(values)


@pytest.mark.parametrize(("steps", "previews"), [(1, 0), (2, 1), (7, 6), (20, 6), (50, 6), (1000, 6)])
def test_few_previews_whatever_the_steps(steps: int, previews: int) -> None:
    every = fields.with_previews(Request(prompt="x", num_inference_steps=steps)).preview_every
    assert len([s for s in range(1, steps) if s % every == 0]) == previews


def test_examples_fit_the_model(tmp_path: Path) -> None:
    chat = Chat(DEMO_MODELS[0][0] / "mllm")
    unknown = chat.token_id("<unk>")
    for prompt in (*SHAPES_WORLD.generate, *SHAPES_WORLD.edit, *SHAPES_WORLD.understand):
        assert unknown not in chat.tokenizer.encode(prompt).ids
    assert all(unknown in chat.tokenizer.encode(prompt).ids for prompt in GENERAL.generate)
    assert examples_of(SMALL) is SHAPES_WORLD
    assert examples_of(Model(path="EasonXiao-888/MindOmni")) is GENERAL
    assert examples_of(Model(path=str(tmp_path))) is GENERAL
    found = defaults_of(SMALL)
    assert (found["width"], found["height"], found["num_inference_steps"], found["guidance_scale"]) == (96, 96, 10, 1.0)
    assert defaults_of(Model(path=SMALL.path, defaults={"height": 48}))["height"] == 48
    assert defaults_of(Model(path=str(tmp_path)))["height"] == 1024


def test_views_hold_all_text_and_the_result() -> None:
    result = GenerationResult(
        images=[Image.new("RGB", (8, 8))], seed=3, timings={"total": 1.25}, finish_reason="length"
    )
    preview = Image.new("RGB", (8, 8))
    pieces = [TextEvent(f" {n}", "thinking") for n in range(50)] + [TextEvent(" so", "answer")]
    found = list(views(iter([*pieces, StepEvent(1, 2, [preview]), StepEvent(2, 2), ImageEvent(result)])))
    assert found[-1].thinking == " ".join(map(str, range(50))) and found[-1].answer == "so"
    assert found[-1].result is result and "Done in 1.2 s, seed 3; the text was cut" in found[-1].status
    assert [v.preview for v in found if v.preview is not None] == [preview]
    assert len(found) < 10  # 50 pieces at once are not 50 updates


def test_text_of_a_request_is_no_markup() -> None:
    assert "<img" not in status("<img src=x>") and "&lt;img" in status("<img src=x>")


def test_closing_a_page_ends_its_request_and_deletes_its_pictures() -> None:
    sessions = Sessions()
    result = GenerationResult(images=[Image.new("RGB", (8, 8))] * 2, seed=3, settings={"prompt": "x", "seed": 3})
    paths = [Path(path) for path in sessions.save("a", result)]
    (other,) = sessions.save("b", GenerationResult(images=[Image.new("RGB", (8, 8))], seed=4, settings={"prompt": "y"}))
    settings = mindomni_rt.read_settings(paths[1])
    assert (settings["seed"], settings["mindomni_rt"]) == (4, mindomni_rt.__version__)
    with sessions.running("a") as cancel:
        assert not cancel.is_set()
        sessions.close("a")
        assert cancel.is_set()
    assert not paths[0].exists() and not paths[1].exists() and Path(other).exists()
    assert not sessions.cancel("a")


def test_errors_that_a_user_can_mend_reach_the_page() -> None:
    handlers = Handlers(None, Sessions(), SMALL)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="no picture yet"):
        handlers.seed_of(None)
    with pytest.warns(UserWarning, match="no picture yet"):
        assert 'role="alert"' in handlers.restore(None)[1]
    with pytest.warns(UserWarning, match="the prompt is empty"):
        (shown,) = handlers.generate(gr.Request(), [], " ", *fields.from_settings({"prompt": "x"})[1:])
    assert "the prompt is empty" in shown[0].lower() and len(shown) == 8


@pytest.mark.parametrize(("password", "code"), [("secret", 200), ("sécret", 400)])
def test_mounted_page_asks_for_the_key(password: str, code: int) -> None:
    app = FastAPI()
    mount(app, None, SMALL, path="/ui", key="secret")  # type: ignore[arg-type]
    client = TestClient(app)
    assert "config" not in client.get("/ui/config").json()
    answer = client.post("/ui/login", data={"username": "anyone", "password": password})
    assert answer.status_code == code
    assert client.get("/ui/config").status_code == (200 if code == 200 else 401)


def test_mounted_page_asks_no_other_server() -> None:
    app = FastAPI()
    mount(app, None, SMALL, path="/ui")  # type: ignore[arg-type]
    client = TestClient(app)
    config = client.get("/ui/config").json()
    assert config["analytics_enabled"] is False
    assert "googleapis" not in client.get("/ui/").text + client.get("/ui/theme.css").text
