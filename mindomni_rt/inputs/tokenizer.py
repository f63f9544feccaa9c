"""A checkpoint's tokenizer, chat template and special tokens, read from its files."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.json_files import MOST_BYTES, Keys, optional_json, read_json
from ..errors import BadCheckpointError
from ..files import parse_json, read_bytes, read_text, require_regular, why

if TYPE_CHECKING:
    import tokenizers

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MOST_GROWTH = 64  # known tokenizers make a text at most twice as long before they split it


@contextmanager
def tokenizer_errors(folder: Path, doing: str) -> Iterator[None]:
    """Raises BadCheckpointError for what the tokenizers library raises: bare Exception for damaged data, and panics,
    which derive from BaseException alone."""
    try:
        yield
    except (BadCheckpointError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise BadCheckpointError(f"{folder}: the tokenizer does not {doing}: {why(error)}") from error


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """tokenizer.json, or vocab.json and merges.txt. Truncation and padding that a file stores are off, as transformers
    has them: they belong to whoever saved it. Raises BadCheckpointError."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    with tokenizer_errors(folder, "load"):
        if path.exists():
            data = read_bytes(path, 4 * MOST_BYTES)
            _check_growth(parse_json(data), path)
            tokenizer = Tokenizer.from_buffer(data)
        elif (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
            tokenizer = _byte_level_bpe(folder)
        else:
            raise BadCheckpointError(f"{folder}: expected tokenizer.json, or vocab.json and merges.txt")
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def _check_growth(data: Any, path: Path) -> None:
    """Refuses normalizers and decoders that make texts many times longer: a few in a row fill memory."""
    for name in ("normalizer", "decoder"):
        if _growth(data.get(name)) > _MOST_GROWTH:
            raise BadCheckpointError(f"{path}: the {name} may make a text more than {_MOST_GROWTH} times as long")


def _growth(part: Any) -> float:
    """How many times as long as its input the text after a part of a tokenizer may be."""
    if not isinstance(part, dict):
        return 1.0
    if part.get("type") == "Sequence":
        return math.prod(_growth(inner) for key in ("normalizers", "decoders") for inner in part.get(key) or ())
    pattern = part.get("pattern")
    matched = max(1, len(pattern["String"])) if isinstance(pattern, dict) and "String" in pattern else 1
    return max(1.0, len(part.get("content") or "") / matched) + len(part.get("prepend") or "")


def _byte_level_bpe(folder: Path) -> tokenizers.Tokenizer:
    """Qwen2's tokenizer from its slow files: byte-level BPE, NFC, the special tokens of tokenizer_config.json."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    for name in ("vocab.json", "merges.txt"):
        if require_regular(folder / name) > 4 * MOST_BYTES:
            raise BadCheckpointError(f"{folder / name} has more than {4 * MOST_BYTES} bytes")
    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = Keys(optional_json(folder / "tokenizer_config.json"), str(folder)).part("added_tokens_decoder").data
    for _, entry in sorted(added.items(), key=lambda item: int(item[0])):
        token = AddedToken(entry["content"], normalized=False, special=bool(entry.get("special")))
        tokenizer.add_special_tokens([token]) if entry.get("special") else tokenizer.add_tokens([token])
    return tokenizer


def load_template(folder: Path) -> str:
    """The chat template's text: chat_template.jinja, chat_template.json or tokenizer_config.json, in this order."""
    jinja = folder / "chat_template.jinja"
    if jinja.exists():
        try:
            return read_text(jinja, MOST_BYTES)
        except (OSError, UnicodeDecodeError) as error:
            raise BadCheckpointError(f"{jinja} cannot be read: {why(error)}") from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).exists():
            template = read_json(folder / name).get("chat_template")
            if isinstance(template, list):  # several named templates: the default one is ours
                named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
                template = named[0].get("template") if named else None
            if isinstance(template, str):
                return template
    raise BadCheckpointError(
        f"{folder}: expected chat_template.json, chat_template.jinja or one in tokenizer_config.json"
    )


def load_special_tokens(folder: Path) -> dict[str, Any]:
    """What transformers puts into a template's context: eos_token, pad_token, … where the files name them."""
    config = optional_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # then transformers reads the older file too, and it counts
        config = {**config, **optional_json(folder / "special_tokens_map.json")}
    found = {name: _text(config.get(name)) for name in _SPECIAL}
    return {name: text for name, text in found.items() if text is not None}


def _text(token: Any) -> str | None:
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None
