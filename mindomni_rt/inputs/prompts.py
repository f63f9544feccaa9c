"""Chat turns, tokens and tags: from a prompt to token ids, and from token ids to thinking and answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadCheckpointError, BadRequestError

if TYPE_CHECKING:
    import tokenizers

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
        self.tokenizer = _load_tokenizer(folder)
        self.template = _load_template(folder)

    @cached_property
    def _compiled(self) -> Any:
        # jinja2 is imported here, not on import of the package; the sandbox because a template is somebody's file.
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def raise_exception(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = raise_exception
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        try:
            return environment.from_string(self.template)
        except TemplateError as error:
            raise BadCheckpointError(f"{self.folder}: chat template does not parse: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The text of a chat with the generation prompt appended."""
        from jinja2 import TemplateError

        try:
            return str(self._compiled.render(messages=list(messages), add_generation_prompt=True))
        except TemplateError as error:
            raise BadCheckpointError(f"{self.folder}: chat template failed: {error}") from error

    def token_id(self, token: str) -> int | None:
        """The id of one (special) token, or None."""
        found = self.tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def encode(self, messages: Sequence[Message], image_tokens: Sequence[int] = ()) -> list[int]:
        """Token ids of a chat; the i-th image placeholder is repeated image_tokens[i] times."""
        ids = self.tokenizer.encode(self.render(messages), add_special_tokens=False).ids
        pad = self.token_id("<|image_pad|>")
        if pad is None:
            if not image_tokens:
                return list(ids)
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
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


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
    else the content of <think>, else everything."""
    if "<answer>" in text:
        return text.split("<answer>", 1)[1].strip()
    if "<think>" in text:
        return text.split("<think>", 1)[1].split("</think>", 1)[0].strip()
    return text.strip()


def _load_template(folder: Path) -> str:
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            try:
                template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise BadCheckpointError(f"{path} is not readable JSON: {error}") from error
            if isinstance(template, list):  # several named templates: the default one is ours
                template = next((t["template"] for t in template if t.get("name") == "default"), None)
            if isinstance(template, str):
                return template
    raise BadCheckpointError(
        f"{folder}: expected chat_template.json, chat_template.jinja or one in tokenizer_config.json"
    )


def _load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        if path.exists():
            return Tokenizer.from_file(str(path))
        if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            return _byte_level_bpe(folder)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise BadCheckpointError(f"{folder}: the tokenizer does not load: {error}") from error
    raise BadCheckpointError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt")


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from its slow files: byte-level BPE, NFC, the special tokens of tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    config = folder / "tokenizer_config.json"
    added = json.loads(config.read_text(encoding="utf-8")).get("added_tokens_decoder", {}) if config.exists() else {}
    for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
        token = AddedToken(entry["content"], normalized=False, special=bool(entry.get("special")))
        tokenizer.add_special_tokens([token]) if entry.get("special") else tokenizer.add_tokens([token])
    return tokenizer
