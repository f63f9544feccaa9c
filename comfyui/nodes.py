"""The nodes. Their ids are stored in workflows of users, so they never change."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

import mindomni_rt
from mindomni_rt import Pipeline, Request, UnderstandRequest
from mindomni_rt.checkpoint.config import MAX_SIDE, PUBLISHED
from mindomni_rt.pipeline import Thought
from mindomni_rt.request import complete, edit_size
from mindomni_rt.sampling.random import batch_noise

from . import host, models

CATEGORY = "MindOmni"
MODEL = io.Custom("MINDOMNI_MODEL")
THOUGHT = io.Custom("MINDOMNI_THOUGHT")
DEFAULTS = complete(Request(prompt="-"), PUBLISHED)
_HAS_ALIASES = any(f.name == "search_aliases" for f in fields(io.Schema))


@dataclass(frozen=True)
class Thinking:
    """What Think hands to Generate: the request as far as it has come."""

    model: Pipeline
    request: Request
    thought: Thought


def schema(name: str, aliases: list[str], **rest: Any) -> io.Schema:
    """The schema of a node; ComfyUI's older than the search aliases go without them."""
    more = {"search_aliases": aliases} if _HAS_ALIASES else {}
    return io.Schema(
        node_id=f"MindOmni{name}", display_name=f"MindOmni {name}", category=CATEGORY,
        hidden=[io.Hidden.unique_id], **more, **rest,
    )  # fmt: skip


def prompt(default: str, tooltip: str) -> io.Input:
    return io.String.Input("prompt", multiline=True, default=default, tooltip=tooltip)


def seed(of: str, changes: bool = False) -> io.Input:
    """changes: ComfyUI draws another one for each run, unless its user fixes it; nodes that use it then run again."""
    return io.Int.Input("seed", default=0, min=0, max=2**64 - 1, control_after_generate=changes, tooltip=of)


def writing() -> list[io.Input]:
    return [
        io.Int.Input("max_new_tokens", default=DEFAULTS.max_new_tokens, min=1, max=2**16, tooltip="of written text"),
        io.Float.Input(
            "temperature", default=DEFAULTS.temperature, min=0.0, max=100.0, step=0.05, tooltip="0 is greedy"
        ),
    ]


def side(name: str, default: int, lowest: int = 16, tooltip: str = "pixels") -> io.Input:
    return io.Int.Input(name, default=default, min=lowest, max=MAX_SIDE, step=16, tooltip=tooltip)


def painting() -> list[io.Input]:
    return [
        io.Int.Input("steps", default=DEFAULTS.num_inference_steps, min=1, max=1000),
        io.Float.Input(
            "guidance",
            default=DEFAULTS.guidance_scale,
            min=0.0,
            max=100.0,
            step=0.1,
            tooltip="1 is none, in half the time",
        ),
        seed("of the noise", changes=True),
        io.String.Input("negative_prompt", multiline=True, default=DEFAULTS.negative_prompt),
        io.Int.Input("preview_every", default=5, min=0, max=1000, tooltip="steps between previews; 0 shows none"),
    ]


def written() -> list[io.Output]:
    return [io.String.Output("thinking", display_name="thinking"), io.String.Output("answer", display_name="answer")]


class Load(io.ComfyNode):
    """A checkpoint or bundle → the model that the other nodes take."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Load", ["mindomni loader", "load model", "load mindomni"],
            description="Loads a MindOmni checkpoint or bundle from models/mindomni, a path or the hub.",
            inputs=[
                io.Combo.Input("model", options=[*models.found(), models.ELSEWHERE]),
                io.String.Input("path_or_hub_id", default="", tooltip="a folder, or owner/name of the hub"),
                io.Combo.Input("device", options=["auto", "cpu", "cuda"], default="auto"),
                io.Combo.Input(
                    "precision", options=["auto", "fp8", "int8", "int4"], default="auto",
                    tooltip="of a checkpoint on CUDA; auto takes the most exact one that fits",
                ),
            ],
            outputs=[MODEL.Output("loaded", display_name="mindomni")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: str, path_or_hub_id: str, device: str, precision: str) -> io.NodeOutput:
        host.free_memory()
        path = models.path_of(model, path_or_hub_id)
        return io.NodeOutput(
            mindomni_rt.load(path, device=device, precision=None if precision == "auto" else precision)
        )


class Think(io.ComfyNode):
    """A prompt → the reasoning and the hidden states that Generate paints from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Think", ["reason", "chain of thought", "mindomni prompt"],
            description="Reasons about a prompt. Generate paints the thought as often as wanted without thinking anew.",
            inputs=[
                MODEL.Input("mindomni"),
                prompt("", "what to paint, or how to change the image"),
                io.Boolean.Input("cascade", default=False, tooltip="a second round of thinking on the first answer"),
                *writing(),
                seed("of sampled text"),
                io.Image.Input("image", optional=True, tooltip="a reference image"),
            ],
            outputs=[THOUGHT.Output("thought", display_name="thought"), *written()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, mindomni: Pipeline, prompt: str, cascade: bool, max_new_tokens: int, temperature: float, seed: int,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        (picture,) = host.pictures(image)[:1]
        request = Request(
            prompt=prompt, image=picture, cascade=cascade, max_new_tokens=max_new_tokens, temperature=temperature
        )
        events = mindomni.think(request, seed=seed, cancel=host.StopButton())
        thought = host.follow(events, cls.hidden.unique_id, 1)
        last = thought.rounds[-1]
        return io.NodeOutput(Thinking(mindomni, request, thought), last.thinking, last.answer)


class Generate(io.ComfyNode):
    """A prompt, or a thought of Think → images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Generate", ["text to image", "paint", "mindomni sampler"],
            description="Thinks about a prompt and paints the result, or paints a thought that is connected.",
            inputs=[
                MODEL.Input("mindomni"),
                prompt("", "what to paint; not read where a thought is connected"),
                io.Boolean.Input("think", default=True, tooltip="reason in words first"),
                side("width", DEFAULTS.width),
                side("height", DEFAULTS.height),
                *painting(),
                io.Int.Input("batch_size", default=1, min=1, max=256, tooltip="image i is painted from seed + i"),
                THOUGHT.Input("thought", optional=True),
            ],
            outputs=[io.Image.Output("image", display_name="image"), *written()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, mindomni: Pipeline, prompt: str, think: bool, width: int, height: int, steps: int, guidance: float,
        seed: int, negative_prompt: str, preview_every: int, batch_size: int, thought: Thinking | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        base = Request(prompt=prompt, think=think) if thought is None else thought.request
        request = replace(
            base, width=width, height=height, num_inference_steps=steps, guidance_scale=guidance, seed=seed,
            negative_prompt=negative_prompt, preview_every=preview_every, num_images=batch_size, output="numpy",
        )  # fmt: skip
        if thought is None:
            return _run(cls, mindomni, request)
        if thought.model is not mindomni:
            raise ValueError("the thought is of another model; connect the same Load to Think and Generate")
        last = thought.thought.rounds[-1]
        pixels = _paint(cls, mindomni, request, thought.thought)
        return io.NodeOutput(host.to_tensor(pixels), last.thinking, last.answer)


class Edit(io.ComfyNode):
    """An image and a prompt → the changed image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Edit", ["image to image", "instruct edit", "change image"],
            description="Changes each image of a batch as the prompt says, at its own size unless one is given.",
            inputs=[
                MODEL.Input("mindomni"),
                io.Image.Input("image"),
                prompt("", "how to change the image"),
                io.Boolean.Input("think", default=True, tooltip="reason in words first"),
                side("width", 0, 0, "pixels; 0 takes the size of the image, within 1024² pixels"),
                side("height", 0, 0, "pixels; 0 takes the size of the image, within 1024² pixels"),
                *painting(),
                io.Combo.Input(
                    "edit_features", options=["auto", "vit", "vit+vae"], default="auto",
                    tooltip="what the decoder sees of the image; auto is what the checkpoint was trained with",
                ),
            ],
            outputs=[io.Image.Output("edited", display_name="image"), *written()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, mindomni: Pipeline, image: torch.Tensor, prompt: str, think: bool, width: int, height: int, steps: int,
        guidance: float, seed: int, negative_prompt: str, preview_every: int, edit_features: str,
    ) -> io.NodeOutput:  # fmt: skip
        own_width, own_height = edit_size(image.shape[2], image.shape[1], mindomni.recommended)
        request = Request(
            prompt=prompt, think=think, width=width or own_width, height=height or own_height,
            num_inference_steps=steps, guidance_scale=guidance, negative_prompt=negative_prompt,
            preview_every=preview_every, edit_features=None if edit_features == "auto" else edit_features,
            output="numpy",
        )  # fmt: skip
        outputs = [
            _run(cls, mindomni, replace(request, image=picture, seed=(seed + index) % 2**64)).args
            for index, picture in enumerate(host.pictures(image))
        ]
        images, thinking, answers = zip(*outputs, strict=True)
        return io.NodeOutput(torch.cat(images), "\n".join(thinking), "\n".join(answers))


class Understand(io.ComfyNode):
    """A question, about an image if one is connected → words."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "Understand", ["caption", "describe image", "vqa", "question"],
            description="Answers a question in words, about each image of a batch if images are connected.",
            inputs=[
                MODEL.Input("mindomni"),
                prompt("Describe the picture.", "the question"),
                *writing(),
                seed("of sampled text"),
                io.Image.Input("image", optional=True),
            ],
            outputs=[io.String.Output("answer", display_name="answer", is_output_list=True)],
            is_output_node=True,
        )  # fmt: skip

    @classmethod
    def execute(
        cls, mindomni: Pipeline, prompt: str, max_new_tokens: int, temperature: float, seed: int,
        image: torch.Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        answers = []
        for picture in host.pictures(image):
            request = UnderstandRequest(
                prompt=prompt, image=picture, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed
            )
            events = mindomni.stream(request, cancel=host.StopButton())
            answers.append(host.result_of(events, cls.hidden.unique_id, 1).answer.strip())
        host.show_text("\n".join(answers), cls.hidden.unique_id)
        return io.NodeOutput(answers, ui={"text": tuple(answers)})


def _run(node: type[io.ComfyNode], mindomni: Pipeline, request: Request) -> io.NodeOutput:
    """A whole request in one node."""
    whole = mindomni.complete(request)
    events = mindomni.stream(whole, cancel=host.StopButton())
    result = host.result_of(events, node.hidden.unique_id, whole.num_inference_steps)
    return io.NodeOutput(host.to_tensor(result.images), result.thinking, result.answer)


def _paint(node: type[io.ComfyNode], mindomni: Pipeline, request: Request, thought: Thought) -> np.ndarray:
    """The stages after thinking, as `Pipeline.stream` runs them."""
    whole = mindomni.complete(request)
    latents = batch_noise(whole.seed or 0, whole.num_images, whole.latent_shape[1:])
    guided = mindomni.connect(thought, whole)
    unguided = mindomni.connect_negative(whole) if whole.guidance_scale != 1 else None
    events = mindomni.paint(whole, latents, guided, unguided, cancel=host.StopButton())
    return mindomni.decode(host.follow(events, node.hidden.unique_id, whole.num_inference_steps))


NODES: list[type[io.ComfyNode]] = [Load, Think, Generate, Edit, Understand]
