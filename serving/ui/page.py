"""The page: its components, and which handler each event has."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hmac import compare_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from starlette.routing import Mount

from mindomni_rt.checkpoint.config import MAX_SIDE
from mindomni_rt.errors import BadRequestError

from ..model import Model
from .examples import defaults_of, examples_of
from .handlers import Handlers, Source
from .look import CSS, HEAD, theme
from .sessions import Sessions
from .views import status

if TYPE_CHECKING:
    from fastapi import FastAPI

# The source has the queue, which a cancelled request can leave. Each of these waits in one of Gradio's 40 threads.
_MOST_WAITING = 32
_MAX_FILE = "64mb"


def build(source: Source, model: Model) -> gr.Blocks:
    """The page of a model. source: an `Engine`, or anything with its `stream`."""
    sessions, defaults = Sessions(), defaults_of(model)
    handlers, examples = Handlers(source, sessions, model), examples_of(model)
    with gr.Blocks(title="MindOmni", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        name = Path(model.path).name
        gr.HTML(f"<h1>MindOmni</h1><p>Thinks in words, then paints. Model: <code>{name}</code></p>", elem_id="head")
        history, selected = gr.State([]), gr.State(None)
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                painted = _paint_tab("generate", examples.generate, defaults, None)
            with gr.Tab("Edit", id="edit"):
                edited = _paint_tab("edit", examples.edit, defaults, _picture("Picture to change"))
            with gr.Tab("Ask", id="ask"):
                asked = _ask_tab(examples.understand, defaults)
        with gr.Accordion("Pictures of this session", open=True), gr.Row():
            with gr.Column(scale=2, min_width=320):
                gallery = gr.Gallery(
                    label="Newest first", columns=6, fit_columns=False, height=200,
                    allow_preview=False, interactive=False, object_fit="contain", elem_id="history",
                )  # fmt: skip
                with gr.Row():
                    reuse = _small("Use its settings", "reuse")
                    change = _small("Change it", "to-edit")
                    ask = _small("Ask about it", "to-ask")
                with gr.Accordion("Settings in the file of the chosen picture", open=False, elem_id="settings-of"):
                    settings = gr.JSON(show_label=False, elem_id="settings")
            with gr.Column(scale=1, min_width=240):
                dropped = gr.File(
                    label="Drop a picture made here: its settings come back", file_types=["image"], height=200,
                    elem_id="drop",
                )  # fmt: skip
        shown = [gallery, history, selected, settings]
        _run(painted, handlers.generate, handlers.cancel, [history, *painted.controls], [*painted.shown, *shown])
        _run(edited, handlers.edit, handlers.cancel, [history, edited.image, *edited.controls], [*edited.shown, *shown])
        _run(asked, handlers.understand, handlers.cancel, [asked.image, *asked.controls], asked.shown)
        quiet: dict[str, Any] = dict(show_progress="hidden", api_visibility="private")
        gallery.select(handlers.select, history, [painted.shown[3], selected, settings], **quiet)
        restored = [tabs, painted.shown[0], *painted.controls]
        dropped.upload(handlers.restore, dropped, restored, **quiet)
        reuse.click(handlers.restore, selected, restored, **quiet)
        for tab in (painted, edited):
            tab.reuse_seed.click(handlers.seed_of, selected, tab.controls[1], **quiet)
        for button, target, tab_id in ((change, edited.image, "edit"), (ask, asked.image, "ask")):
            go = partial(_go, tab_id)
            button.click(go, selected, [target, tabs], **quiet)
        page.unload(handlers.close)
    page.queue(default_concurrency_limit=1, max_size=64)
    return page


@dataclass(frozen=True, kw_only=True)
class _Tab:
    """Components of a tab. shown: status and what follows it in the outputs of its handler."""

    submit: gr.Button
    cancel: gr.Button
    prompt: gr.Textbox
    controls: list[Any]
    shown: list[Any]
    image: Any = None
    reuse_seed: Any = None


def _go(tab: str, path: str | None) -> tuple[Any, Any]:
    return path, gr.Tabs(selected=tab)


def _picture(label: str) -> Callable[[], gr.Image]:
    """image_mode None leaves the file as it is: transparency and all."""
    return lambda: gr.Image(
        label=label, type="filepath", image_mode=None, sources=["upload", "clipboard"], height=260,
        elem_classes="source",
    )  # fmt: skip


def _paint_tab(kind: str, prompts: tuple[str, ...], defaults: Any, picture: Callable[[], gr.Image] | None) -> _Tab:
    with gr.Row(elem_classes="work"):
        with gr.Column(min_width=320):
            image = picture() if picture else None
            prompt, submit, cancel, line = _prompt(
                kind, "What to paint" if image is None else "What to change", "Paint"
            )
            _examples(kind, prompts, prompt)
            with gr.Row(elem_classes=["bottoms", "later"]):
                seed = gr.Textbox(label="Seed", placeholder="random", elem_id=f"{kind}-seed", min_width=120)
                reuse = _small("Seed of the chosen picture", f"{kind}-reuse-seed")
            settings = _settings(kind, defaults, sized=image is None)
        with gr.Column(min_width=320):
            result = gr.Image(
                label="Picture", type="filepath", format="png", interactive=False, height=420,
                buttons=["download", "fullscreen"], elem_id=f"{kind}-picture", elem_classes="result",
            )  # fmt: skip
            thinking = _text("Thinking", f"{kind}-thinking", 3)
            answer = _text("Answer", f"{kind}-answer", 1)
    return _Tab(
        submit=submit, cancel=cancel, prompt=prompt, controls=[prompt, seed, *settings],
        shown=[line, thinking, answer, result], image=image, reuse_seed=reuse,
    )  # fmt: skip


def _settings(kind: str, defaults: Any, sized: bool) -> list[Any]:
    """The controls after prompt and seed, in the order of `fields.NAMES`."""
    with gr.Accordion("Settings", open=False, elem_id=f"{kind}-settings", elem_classes="later"):
        with gr.Row():
            think = gr.Checkbox(defaults["think"], label="Think first")
            cascade = gr.Checkbox(defaults["cascade"], label="Think a second time")
        with gr.Row(visible=sized):
            width = gr.Number(
                defaults["width"], label="Width", precision=0, minimum=16, maximum=MAX_SIDE, step=16, min_width=90
            )
            height = gr.Number(
                defaults["height"], label="Height", precision=0, minimum=16, maximum=MAX_SIDE, step=16, min_width=90
            )
        with gr.Row():
            steps = gr.Number(
                defaults["num_inference_steps"], label="Steps", precision=0, minimum=1, maximum=1000, min_width=90
            )
            guidance = gr.Number(
                defaults["guidance_scale"], label="Guidance (1 is none)", minimum=0, step=0.1, min_width=90
            )
            count = gr.Number(
                defaults["num_images"], label="Pictures", precision=0, minimum=1, maximum=16, min_width=90
            )
        negative = gr.Textbox(defaults["negative_prompt"], label="What to avoid (with guidance)", lines=1, max_lines=4)
        with gr.Row():
            tokens = gr.Number(
                defaults["max_new_tokens"], label="Most tokens of thinking", precision=0, minimum=1, min_width=120
            )
            temperature = gr.Number(
                defaults["temperature"], label="Temperature (0 is greedy)", minimum=0, step=0.1, min_width=120
            )
        others = gr.Textbox(
            label="Other fields of Request, as JSON", placeholder='{"solver": "multistep"}', lines=1, max_lines=4
        )
    return [think, cascade, width, height, steps, guidance, count, negative, tokens, temperature, others]


def _ask_tab(prompts: tuple[str, ...], defaults: Any) -> _Tab:
    with gr.Row(elem_classes="work"):
        with gr.Column(min_width=320):
            image = _picture("Picture to ask about")()
            prompt, submit, cancel, line = _prompt("ask", "Question", "Ask")
            _examples("ask", prompts, prompt)
            with gr.Accordion("Settings", open=False, elem_classes="later"), gr.Row():
                tokens = gr.Number(defaults["max_new_tokens"], label="Most tokens", precision=0, minimum=1)
                temperature = gr.Number(defaults["temperature"], label="Temperature (0 is greedy)", minimum=0, step=0.1)
        with gr.Column(min_width=320):
            answer = _text("Answer", "ask-answer", 8)
    return _Tab(
        submit=submit, cancel=cancel, prompt=prompt, controls=[prompt, tokens, temperature], shown=[line, answer],
        image=image,
    )  # fmt: skip


def _prompt(kind: str, label: str, verb: str) -> tuple[gr.Textbox, gr.Button, gr.Button, gr.HTML]:
    prompt = gr.Textbox(
        label=label, lines=1, max_lines=6, autofocus=kind == "generate", elem_id=f"{kind}-prompt",
        info="Enter starts, Shift+Enter is a new line, Escape cancels",
    )  # fmt: skip
    with gr.Row():
        submit = gr.Button(verb, variant="primary", elem_id=f"{kind}-submit", min_width=120)
        cancel = gr.Button("Cancel", elem_id=f"{kind}-cancel", elem_classes="cancel", min_width=120)
    return prompt, submit, cancel, gr.HTML(status("ready"), elem_id=f"{kind}-status")


def _examples(kind: str, prompts: tuple[str, ...], target: gr.Textbox) -> None:
    """Buttons, since Gradio's own examples cut their text at 60 characters. They work in the browser alone."""
    with gr.Column(elem_id=f"{kind}-examples", elem_classes="examples"):
        gr.HTML("<p>Examples</p>", padding=False)
        for prompt in prompts:
            button = gr.Button(prompt, size="sm")
            button.click(None, None, target, js=f"() => {json.dumps(prompt)}", api_visibility="private")


def _small(label: str, elem_id: str) -> gr.Button:
    return gr.Button(label, size="sm", elem_id=elem_id, min_width=100)


def _text(label: str, elem_id: str, lines: int) -> gr.Textbox:
    return gr.Textbox(label=label, lines=lines, max_lines=12, interactive=False, buttons=["copy"], elem_id=elem_id)


def _run(tab: _Tab, handler: Any, cancel: Any, inputs: list[Any], outputs: list[Any]) -> None:
    gr.on(
        [tab.submit.click, tab.prompt.submit], handler, inputs, outputs, show_progress="hidden",
        concurrency_limit=_MOST_WAITING, concurrency_id="device", api_visibility="private",
    )  # fmt: skip
    tab.cancel.click(cancel, None, tab.shown[0], queue=False, show_progress="hidden", api_visibility="private")


def launch(page: gr.Blocks, *, host: str, port: int, inbrowser: bool = False, block: bool = True) -> str:
    """Serves the page by itself until Ctrl-C; without `block` returns its address at once."""
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port or None, inbrowser=inbrowser, share=False, prevent_thread_lock=True,
            quiet=True, **_served(),
        )  # fmt: skip
    except OSError as error:
        raise BadRequestError(f"--host {host} --port {port}: {' '.join(str(error).split())}") from error
    if block:
        sys.stdout.write(f"the page is at {address} (Ctrl-C ends it)\n")
        sys.stdout.flush()
        page.block_thread()
    return address


def mount(app: FastAPI, source: Source, model: Model, path: str = "/ui", key: str | None = None) -> Callable[[], None]:
    """Adds the page to an application. key: what a visitor must give as the password, with any name.

    Returns what closes the connections of open pages, to call in the event loop when the server is to stop: else it
    would wait for them.
    """
    auth = None if key is None else (lambda _, given: compare_digest(given.encode(), key.encode()))
    message = "Any name; the password is the API key."
    gr.mount_gradio_app(app, build(source, model), path, auth=auth, auth_message=message, **_served())
    mounted = next(route for route in app.routes if isinstance(route, Mount) and route.path == path)
    return lambda: mounted.app.stop_event.set()  # type: ignore[attr-defined]


def _served() -> dict[str, Any]:
    return dict(
        theme=theme(), css=CSS, head=HEAD, footer_links=[], ssr_mode=False, pwa=False, mcp_server=False,
        run_history=False, show_error=True, max_file_size=_MAX_FILE,
    )  # fmt: skip
