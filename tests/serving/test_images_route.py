"""/v1/images through OpenAI's own client, against the pipeline in this process."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import openai
import pytest
from PIL import Image

import mindomni_rt
from mindomni_rt.request import Request
from serving.serving_tools import PROMPT, SMALL, Served, decoded, png, same


def generate(client: openai.OpenAI, **options: Any) -> Any:
    given = {"model": "shapes-world-bundle", "prompt": PROMPT, **options}
    extra = {k: given.pop(k) for k in tuple(given) if k in Request.__dataclass_fields__ and k != "prompt"}
    extra |= {"deadline": given.pop("deadline")} if "deadline" in given else {}
    return client.images.generate(**given, extra_body=extra)


def test_an_image_is_the_pipelines(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    answer = generate(client, seed=7)
    alone = pipe.generate(PROMPT, seed=7, **SMALL)
    found = decoded(answer.data[0].b64_json)
    assert same(found, alone.images[0]) and found.size == (48, 48)
    assert answer.data[0].revised_prompt == alone.answer and answer.thinking == alone.thinking
    assert answer.output_format == "png" and answer.size == "48x48"
    usage = answer.usage
    assert usage.output_tokens_details.text_tokens == len(alone.token_ids)
    assert usage.output_tokens_details.image_tokens == 9 and usage.input_tokens > 10
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_settings_travel_in_the_file(client: openai.OpenAI, tmp_path: Any) -> None:
    import base64

    for kind in ("png", "jpeg", "webp"):
        answer = generate(client, seed=7, n=2, output_format=kind)
        for index, item in enumerate(answer.data):
            path = tmp_path / f"a.{kind}"
            path.write_bytes(base64.b64decode(item.b64_json))
            assert Image.open(path).format == kind.upper()
            settings = mindomni_rt.read_settings(path)
            assert settings["prompt"] == PROMPT and settings["seed"] == 7 + index == item.seed
            assert settings["num_images"] == 1


def test_options_reach_the_request(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    options: dict[str, Any] = dict(
        seed=3, num_inference_steps=3, guidance_scale=2.5, negative_prompt="red", think=False
    )
    answer = generate(client, size="64x32", n=2, **options)
    alone = pipe.generate(PROMPT, **{**SMALL, **options, "width": 64, "height": 32, "num_images": 2})
    assert all(same(decoded(d.b64_json), i) for d, i in zip(answer.data, alone.images, strict=True))
    assert answer.size == "64x32"
    answer = generate(client, seed=3, cascade=True)
    assert same(decoded(answer.data[0].b64_json), pipe.generate(PROMPT, **SMALL, seed=3, cascade=True).images[0])


def test_url_is_a_data_uri_and_quality_counts(client: openai.OpenAI) -> None:
    answer = generate(client, response_format="url", output_format="jpeg", output_compression=20)
    assert answer.data[0].b64_json is None and answer.data[0].url.startswith("data:image/jpeg;base64,")
    assert len(answer.data[0].url) < len(generate(client, response_format="url", output_format="jpeg").data[0].url)


@pytest.mark.parametrize("partial", [0, 1, 3])
def test_streaming(client: openai.OpenAI, pipe: mindomni_rt.Pipeline, partial: int) -> None:
    """What a client that knows OpenAI's two types reads; our own events come between them and break nothing."""
    seen = list(generate(client, seed=7, stream=True, partial_images=partial, num_inference_steps=8))
    previews = [e for e in seen if e.type == "image_generation.partial_image"]
    done = [e for e in seen if e.type == "image_generation.completed"]
    assert [e.partial_image_index for e in previews] == list(range(partial)) and len(done) == 1
    alone = pipe.generate(PROMPT, seed=7, **{**SMALL, "num_inference_steps": 8})
    assert same(decoded(done[0].b64_json), alone.images[0])
    assert done[0].usage.output_tokens_details["text_tokens"] == len(alone.token_ids)
    assert all(decoded(e.b64_json).size == (48, 48) for e in previews)
    text = "".join(e.delta for e in seen if e.type == "image_generation.text" and e.kind == "thinking")
    assert text.strip() == alone.thinking != ""
    assert [(e.step, e.total) for e in seen if e.type == "image_generation.step"] == [(i, 8) for i in range(1, 9)]


def test_streaming_several_images(client: openai.OpenAI) -> None:
    seen = list(generate(client, seed=7, n=2, stream=True, partial_images=1, think=False))
    done = [e for e in seen if e.type == "image_generation.completed"]
    assert [(e.image_index, e.seed) for e in done] == [(0, 7), (1, 8)]
    whole = generate(client, seed=7, n=2, think=False).data
    assert [e.b64_json for e in done] == [d.b64_json for d in whole]
    assert [e.usage is not None for e in done] == [False, True]


def test_the_asynchronous_client(served: Served, pipe: mindomni_rt.Pipeline) -> None:
    async def both() -> tuple[Any, list[Any]]:
        async with served.asynchronous() as client:
            options: dict[str, Any] = dict(model="shapes-world-bundle", prompt=PROMPT, extra_body={"seed": 7})
            whole, stream = await asyncio.gather(
                client.images.generate(**options), client.images.generate(**options, stream=True, partial_images=1)
            )
            return whole, [event async for event in stream]

    whole, events = asyncio.run(both())
    assert whole.data[0].b64_json == events[-1].b64_json
    assert same(decoded(whole.data[0].b64_json), pipe.generate(PROMPT, seed=7, **SMALL).images[0])


def test_edits(client: openai.OpenAI, pipe: mindomni_rt.Pipeline) -> None:
    """At the size of `Pipeline.edit`, within what the model was trained for; a file's name is of no account."""
    data = png(64, 48)
    extra = {"seed": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "max_new_tokens": 8, "think": True}
    answer = client.images.edit(image=("../../etc/passwd", io.BytesIO(data)), prompt="make it red", extra_body=extra)
    options = {k: v for k, v in SMALL.items() if k not in ("height", "width")}
    alone = pipe.edit(data, "make it red", **{**options, **extra})
    assert same(decoded(answer.data[0].b64_json), alone.images[0]) and answer.size == "96x96"
    seen = list(
        client.images.edit(
            image=io.BytesIO(data), prompt="make it red", size="32x32", stream=True, partial_images=1, extra_body=extra
        )
    )
    assert {e.type for e in seen} >= {"image_edit.partial_image", "image_edit.completed", "image_edit.step"}
    assert decoded(seen[-1].b64_json).size == (32, 32)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "the prompt is empty"),
        ({"prompt": None}, "prompt", "expected text"),
        ({"prompt": "a <|image_pad|>"}, "prompt", "image placeholder"),
        ({"prompt": "x" * 40000}, "prompt", "at most 32000"),
        ({"size": "100x100"}, "size", "multiple of 16"),
        ({"size": "big"}, "size", "expected WIDTHxHEIGHT"),
        ({"size": "9" * 5000 + "x16"}, "size", "expected WIDTHxHEIGHT"),
        ({"size": "3072x3072"}, "size", "at most"),
        ({"n": 0}, "n", "whole number"),
        ({"n": 11}, "n", "at most 10"),
        ({"num_inference_steps": 201}, "num_inference_steps", "at most 200"),
        ({"num_inference_steps": "many"}, "num_inference_steps", "whole number"),
        ({"guidance_scale": "nan"}, "guidance_scale", "finite number"),
        ({"seed": 2**70}, "seed", "whole number"),
        ({"think": False, "cascade": True}, None, "cascade thinking needs think"),
        ({"output_format": "gif"}, "output_format", "one of png, jpeg, webp"),
        ({"response_format": "file"}, "response_format", "one of b64_json, url"),
        ({"stream": True, "partial_images": 4}, "partial_images", "from 0 to 3"),
        ({"quality": "hd"}, "quality", "no such option"),
        ({"background": "transparent"}, "background", "no such option"),
        ({"deadline": 601}, "deadline", "at most 600"),
    ],
)
def test_mistakes(client: openai.OpenAI, options: dict[str, Any], param: str | None, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        generate(client, **options)
    error = caught.value
    assert error.status_code == 400 and error.param == param and words in str(error), error
    assert error.type == "invalid_request_error" and error.code and error.request_id


def test_unknown_fields_are_mistakes(client: openai.OpenAI) -> None:
    for name, words in (("num_inference_step", "did you mean num_inference_steps"), ("latents", "no option 'latents'")):
        with pytest.raises(openai.BadRequestError, match=words):
            client.images.generate(prompt="x", extra_body={name: 3})
    with pytest.raises(openai.NotFoundError, match="shapes-world-bundle"):
        client.images.generate(prompt="x", model="gpt-image-1")
    generate(client, user="someone", moderation="low", quality="auto", background="opaque")


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["shapes-world-bundle"]
    assert client.models.retrieve("shapes-world-bundle").owned_by == "mindomni-rt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
