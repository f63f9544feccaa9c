"""Chat turns, tokens and tags: from a prompt to token ids, and from token ids to thinking and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import BadCheckpointError, BadRequestError
from .template import Template
from .tokenizer import load_special_tokens, load_template, load_tokenizer, tokenizer_errors

Message = dict[str, Any]

SYSTEM = "You are a helpful assistant."
SYSTEM_THINK = (
    "You are a helpful assistant. When the user requests an image, the assistant first thinks about the reasoning "
    "process in the mind and then provides the user with concise prompt as the answer. The reasoning process and "
    "answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> reasoning "
    "process here </think><answer> answer here </answer>."
)
INSTRUCTION = "Generate an image according to the following instructions\n"
DEFAULT_NEGATIVE = (
    "low quality, blurry, low resolution, bad anatomy, deformed, disfigured, extra limbs, missing limbs, "
    "bad proportions, watermark, text"
)
IMAGE_TOKEN = "<|image_pad|>"
LATENT_TOKEN = "<|latent_pad|>"  # one for each decoder token of a reference image, between <img> and </img>
CASCADE_SEPARATOR = "\n\ncascade_thinking:"


def generate_messages(prompt: str, think: bool, image: bool = False, latent_tokens: int = 0) -> list[Message]:
    """The chat that asks for an image. latent_tokens > 0 makes room for VAE features of the reference image."""
    content: list[Message] = [{"type": "text", "text": INSTRUCTION}]
    if image:
        inside = LATENT_TOKEN * latent_tokens or "<|image_1|>"
        content += [
            {"type": "text", "text": ""},
            {"type": "image"},
            {"type": "text", "text": f"<img>{inside}</img>"},
            {"type": "text", "text": f" {prompt}"},
        ]
    else:
        content.append({"type": "text", "text": prompt})
    return _chat(SYSTEM_THINK if think else SYSTEM, content)


def understand_messages(prompt: str, image: bool) -> list[Message]:
    """The chat that asks for text. Without an image the released code keeps the image instruction, and so do we."""
    first = {"type": "image"} if image else {"type": "text", "text": INSTRUCTION}
    return _chat(SYSTEM, [first, {"type": "text", "text": prompt}])


def _chat(system: str, content: list[Message]) -> list[Message]:
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


class Chat:
    """Tokenizer and chat template of a checkpoint or bundle.

    folder: holds tokenizer.json (or vocab.json and merges.txt) and chat_template.json, chat_template.jinja or a
    template in tokenizer_config.json. Raises BadCheckpointError if either is missing or unreadable.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.template = load_template(folder)
        self.special_tokens = load_special_tokens(folder)

    @cached_property
    def _compiled(self) -> Template:
        return Template(self.template, str(self.folder))

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a chat with the generation prompt appended."""
        return self._compiled.render(messages, self.special_tokens)

    @cached_property
    def turn_end(self) -> int | None:
        """The special token with which the template ends a turn, or None."""
        mark = "turn"
        text = self.render(_chat(SYSTEM, [{"type": "text", "text": mark}]))
        after = self._ids(text.rpartition(mark)[2])
        special = {i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special}
        return int(after[0]) if after and after[0] in special else None

    def end_tokens(self, configured: Sequence[int]) -> tuple[int, ...]:
        """Token ids that end a text: those of the configuration, and the one that ends the template's turns."""
        more = [self.turn_end] if self.turn_end is not None and self.turn_end not in configured else []
        return (*configured, *more)

    def token_id(self, token: str) -> int | None:
        """The id of one (special) token, or None."""
        found = self.tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, messages: Sequence[Message], image_tokens: Sequence[int] = ()) -> list[int]:
        """Token ids of a chat; the i-th image placeholder is repeated image_tokens[i] times."""
        ids = self._ids(self.render(messages))
        if len(ids) < 2:
            raise BadCheckpointError(
                f"{self.folder}: the chat template makes {len(ids)} tokens of a chat; expected more"
            )
        pad = self.token_id(IMAGE_TOKEN)
        if pad is None:
            if not image_tokens:
                return ids
            raise BadCheckpointError(f"{self.folder}: the tokenizer has no <|image_pad|> token; it cannot take images")
        if ids.count(pad) != len(image_tokens):
            raise BadRequestError(
                f"the prompt holds {ids.count(pad)} image placeholders for {len(image_tokens)} images; "
                "write no <|image_pad|> into it"
            )
        counts = iter(image_tokens)
        return [token for i in ids for token in ([i] * next(counts) if i == pad else [i])]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, special ones left out."""
        with tokenizer_errors(self.folder, "decode"):
            return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def _ids(self, text: str) -> list[int]:
        with tokenizer_errors(self.folder, "encode"):
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)


class TextStream:
    """Text as it grows token by token; a piece is held back while its last character is incomplete."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._ids: list[int] = []
        self._sent = ""

    def push(self, token_id: int) -> str:
        """Takes a token, returns the new text (maybe empty)."""
        self._ids.append(token_id)
        text = self._chat.decode(self._ids)
        return "" if text.endswith("\ufffd") else self._send(text)

    def finish(self) -> str:
        """Whatever is left, incomplete characters as U+FFFD."""
        return self._send(self._chat.decode(self._ids))

    @property
    def text(self) -> str:
        """All text so far."""
        return self._chat.decode(self._ids)

    def _send(self, text: str) -> str:
        if not text.startswith(self._sent):  # a decoder that rewrites its past: wait until it agrees again
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new


_TAGS = {"<think>": "thinking", "</think>": "text", "<answer>": "answer", "</answer>": "text"}


@dataclass
class ThoughtParser:
    """Splits text into pieces of kind "thinking", "answer" and "text" (outside any tag) as it arrives.

    Tags may be split anywhere; a tag that never closes lasts to the next opening tag or the end.
    """

    kind: str = "text"
    tagged: bool = False
    _held: str = field(default="", repr=False)

    def push(self, text: str) -> list[tuple[str, str]]:
        """New text -> [(kind, piece)]; what may be the start of a tag is held back."""
        self._held += text
        pieces: list[tuple[str, str]] = []
        while True:
            found = min(((self._held.find(t), t) for t in _TAGS if t in self._held), default=None)
            if found is None:
                break
            at, tag = found
            pieces.append((self.kind, self._held[:at]))
            self._held = self._held[at + len(tag) :]
            self.kind, self.tagged = _TAGS[tag], True
        keep = max((n for t in _TAGS for n in range(1, len(t)) if self._held.endswith(t[:n])), default=0)
        cut = len(self._held) - keep
        pieces.append((self.kind, self._held[:cut]))
        self._held = self._held[cut:]
        return [(kind, piece) for kind, piece in pieces if piece]

    def finish(self) -> list[tuple[str, str]]:
        """What was held back and turned out to be no tag."""
        held, self._held = self._held, ""
        return [(self.kind, held)] if held else []


def split_thought(text: str) -> tuple[str, str]:
    """(thinking, answer) of a whole output. Without any tag all of it is the answer."""
    parser = ThoughtParser()
    pieces = parser.push(text) + parser.finish()
    if not parser.tagged:
        return "", text.strip()
    join = {kind: "".join(p for k, p in pieces if k == kind).strip() for kind in ("thinking", "answer")}
    return join["thinking"], join["answer"]


def cascade_prompt(text: str) -> str:
    """The second round's prompt: what follows <answer> to the end (a closing tag stays, as in the released code),
    else the content of <think>, else everything. A written image placeholder is left out: it would ask for an image."""
    text = text.replace(IMAGE_TOKEN, "")
    if "<answer>" in text:
        return text.split("<answer>", 1)[1].strip()
    if "<think>" in text:
        return text.split("<think>", 1)[1].split("</think>", 1)[0].strip()
    return text.strip()
