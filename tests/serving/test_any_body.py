"""Whatever a client sends, the answer is a good one or an error in OpenAI's form, and never one inside the server."""

from __future__ import annotations

import json
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.serving_tools import PROMPT, Served, data_uri, png

NASTY = [
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    10**40,
    1.5,
    1e308,
    "",
    "x",
    "1",
    "\ud800",
    "\0",
    "a\r\nb: c",
    [],
    {},
    [[]],
    ["x"],
]
NASTY += [{"type": "text"}, "48x48", "auto", "png", "url", "<|image_pad|>", "../../etc/passwd", "é" * 50]
NAMES = """
    model prompt n size response_format output_format output_compression stream partial_images seed think cascade
    negative_prompt guidance_scale deadline temperature max_new_tokens solver first_step guidance_interval step_cache
    draft_tokens edit_features max_image_tokens image latents height width num_images background quality style user
    messages modalities max_tokens stream_options tools stop top_p unknown preview_every output __class__
"""
FIELDS = [*NAMES.split(), "\ud800", ""]
PARTS = [
    {"type": "text", "text": "what?"},
    {"type": "text", "text": 3},
    {"type": "image_url", "image_url": {"url": data_uri(png(32, 32))}},
    {"type": "image_url", "image_url": "data:image/png;base64,x"},
    {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}},
    {"type": "image_url"},
    "x",
    None,
]
ROLES = ["user", "user", "assistant", "system", None]
CONTENTS = st.lists(st.sampled_from(PARTS), max_size=3) | st.sampled_from(["hello", "", None, 3])
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": CONTENTS}), max_size=3)
BODIES = st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(NASTY), max_size=4)
GOOD = (200, 400, 404, 413, 504)


def check(answer: httpx.Response, body: Any) -> None:
    assert answer.status_code in GOOD, (answer.status_code, answer.text, body)
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, body
    elif "text/event-stream" in answer.headers["content-type"]:
        last = [line for line in answer.text.splitlines() if line.startswith("data: ")][-1]
        assert "internal" not in last, (answer.text[-500:], body)


def post(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    return http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(body=BODIES, messages=MESSAGES)
def test_any_body(served: Served, body: dict[str, Any], messages: list[Any]) -> None:
    small = {"num_inference_steps": 1, "max_new_tokens": 4}
    with served.http() as http:
        for given_body in (body, {"prompt": PROMPT, **small, **body}):
            check(post(http, "/v1/images/generations", given_body), given_body)
        for modalities in (["text"], ["image"]):
            chat = {"messages": messages, "modalities": modalities, "max_tokens": 4, **body}
            check(post(http, "/v1/chat/completions", chat), chat)
        form = {k: v if isinstance(v, str) else json.dumps(v) for k, v in {"prompt": "x", **small, **body}.items()}
        fields = {k.encode("utf-8", "replace").decode(): v.encode("utf-8", "replace") for k, v in form.items()}
        check(http.post("/v1/images/edits", files={"image": ("a", png(32, 32))}, data=fields), fields)
