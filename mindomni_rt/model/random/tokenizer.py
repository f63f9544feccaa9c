"""A tokenizer with the id space of the published model and none of its words.

Byte-level BPE: the 256 bytes, then strings of up to four letters, with and without a space before them, until the ids
below the special tokens are used up. Each of these ids decodes to readable letters, and any text can be encoded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from string import ascii_lowercase

from ...checkpoint.config import LanguageConfig
from ...errors import BadRequestError
from ...files import write_text
from ...inputs.prompts import LATENT_TOKEN
from ..tiny import CHAT_TEMPLATE

# In the order of Qwen2.5's own ids; the configuration fixes those of vision_start, vision_end and image_pad.
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_EXTRA = ("<img>", "</img>", LATENT_TOKEN)
_SPACE = "Ġ"  # how byte-level BPE spells a space


def _merges() -> Iterator[tuple[str, str]]:
    """Pairs that build every string of letters from the one that is a letter shorter."""
    yield from ((_SPACE, letter) for letter in ascii_lowercase)
    for length in (1, 2, 3):
        for start in ("", _SPACE):
            for letters in product(ascii_lowercase, repeat=length):
                yield from ((start + "".join(letters), letter) for letter in ascii_lowercase)


def write_random_tokenizer(folder: Path, language: LanguageConfig) -> None:
    """tokenizer.json and chat_template.json in `folder`, with the special tokens at the configuration's ids.

    Raises BadRequestError if the configuration's ids are not spaced as Qwen2.5's.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    first = language.image_token_id - _SPECIAL.index("<|image_pad|>")
    special = {token: first + index for index, token in enumerate(_SPECIAL + _EXTRA)}
    found = (special["<|vision_start|>"], special["<|vision_end|>"])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if (language.vision_start_token_id, language.vision_end_token_id) != found or first < len(alphabet):
        raise BadRequestError(
            f"token ids of vision_start and vision_end: expected {found[0]} and {found[1]}, beside image_token_id "
            f"{language.image_token_id}, and at least {len(alphabet)} ids below {first}"
        )
    vocab = {token: index for index, token in enumerate(alphabet)}
    merges = []
    for left, right in _merges():
        if len(vocab) == first:
            break
        vocab[left + right] = len(vocab)
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Added in order, the special tokens take the ids that follow the vocabulary's.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    assert all(tokenizer.token_to_id(token) == index for token, index in special.items()), special
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str())
    template = json.dumps({"chat_template": CHAT_TEMPLATE}, indent=1)
    write_text(folder / "chat_template.json", template + "\n")
