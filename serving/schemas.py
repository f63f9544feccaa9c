"""Bodies of requests as OpenAI's clients send them. They name fields and give no limits: `Request` has those.

A field that is not named here is one of `Request`'s own (negative_prompt, seed, think, …) or a mistake, and `Request`
says which.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Body(BaseModel):
    """What every request may have. `deadline`: seconds, at most the server's."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Any = None
    stream: Any = False
    seed: Any = None
    deadline: Any = None

    def extra(self) -> dict[str, Any]:
        """Fields that are not named in the class and are not null."""
        return {k: v for k, v in (self.model_extra or {}).items() if v is not None}


class ImagesBody(Body):
    """POST /v1/images/generations, and the fields of the form of /v1/images/edits."""

    prompt: Any = None
    n: Any = None
    size: Any = None
    response_format: Any = None
    output_format: Any = None
    output_compression: Any = None
    partial_images: Any = None
    negative_prompt: Any = None
    num_inference_steps: Any = None
    guidance_scale: Any = None
    think: Any = None
    cascade: Any = None
    # What only another service has; these values ask for what is done anyway.
    background: Any = None
    moderation: Any = None
    quality: Any = None
    style: Any = None
    user: Any = None


class ChatBody(Body):
    """POST /v1/chat/completions. modalities with "image" paints; else the answer is text."""

    messages: Any = None
    modalities: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    temperature: Any = None
    n: Any = None
    size: Any = None
    output_format: Any = None
    output_compression: Any = None
    stream_options: Any = None
    user: Any = None
    metadata: Any = None


class Answer(BaseModel):
    """Any JSON object; OpenAI's reference describes its fields."""

    model_config = ConfigDict(extra="allow")


class Problem(BaseModel):
    """What is sent where a request fails: {"message", "type", "param", "code"}."""

    error: dict[str, Any] = Field(default_factory=dict)
