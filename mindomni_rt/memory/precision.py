"""`load(precision=…)`: names for how weights are kept, and what the fast path does with each."""

from __future__ import annotations

from dataclasses import replace

from ..errors import BadRequestError
from .footprint import Precision

NAMES = ("bfloat16", "float16", "float32", "fp8", "int8", "int4")
ATTENTIONS = ("auto", "segment", "sdpa", "flash", "cudnn", "int8")
KEYS = ("language", "decoder", "head", "vae")


def parse_precision(text: str, compute: str) -> Precision:
    """A name, or "part=type" pairs joined by commas, over a compute type.

    "fp8": the decoder in fp8, language bfloat16. "int8": decoder int8 (weights and rows), language and head int8
    (weights only). "int4": language int4, head int8, decoder int8. A floating type: everything in it. Pairs, such as
    "language=int4,decoder=fp8", change single parts; parts are language, decoder, head and vae. The VAE is bfloat16
    with every name but the floating ones. Raises BadRequestError.
    """
    base = Precision.uniform(compute)
    small = replace(base, vae="float32" if compute == "float32" else "bfloat16")
    named = {
        "fp8": replace(small, decoder="fp8"),
        "int8": replace(small, language="int8", head="int8", decoder="int8"),
        "int4": replace(small, language="int4", head="int8", decoder="int8"),
    }
    name = text.strip()
    if name in named:
        return named[name]
    if name in ("bfloat16", "float16", "float32"):
        if name != compute:
            raise BadRequestError(f"precision {name!r} with dtype {compute!r}: name one of them only")
        return base
    found = base
    for pair in name.split(","):
        part, _, kind = pair.strip().partition("=")
        if part not in KEYS or not kind:
            raise BadRequestError(
                f"precision {text!r}: expected one of {', '.join(NAMES)}, or pairs such as language=int4,decoder=fp8"
            )
        found = replace(found, **{part: kind})  # type: ignore[arg-type]  # Precision checks the type's name
    return found


def split_attention(text: str | None) -> tuple[str | None, str]:
    """(the precision without it, the attention) of a text that may have "attention=NAME" among its pairs.

    "int8" is attention with 8-bit scores; the other names force one of the exact ones. Raises BadRequestError.
    """
    pairs = [pair.strip() for pair in (text or "").split(",") if pair.strip()]
    named = [pair.partition("=")[2] for pair in pairs if pair.startswith("attention=")]
    if not named:
        return text, "auto"
    if len(named) > 1 or named[0] not in ATTENTIONS:
        raise BadRequestError(f"precision {text!r}: expected attention to be one of {', '.join(ATTENTIONS)}")
    rest = ",".join(pair for pair in pairs if not pair.startswith("attention="))
    return rest or None, named[0]


def stored(precision: Precision) -> dict[str, str]:
    """How the fast path keeps the products of the language's blocks, its head and the decoder's blocks.

    Decoding is bound by reading weights, so int8 keeps the language's rows as they are; the decoder is bound by
    arithmetic and takes 8-bit rows. Raises BadRequestError for a kind that a part has no product for.
    """
    weights_only = {"int8": "int8_weight_only"}
    found = {
        "language": weights_only.get(precision.language, precision.language),
        "head": weights_only.get(precision.head, precision.head),
        "decoder": precision.decoder,
    }
    for part, allowed in (
        ("language", ("int8_weight_only", "int4")),
        ("head", ("int8_weight_only", "int4")),
        ("decoder", ("int8", "fp8", "int4")),
    ):
        if found[part] not in (*allowed, precision.compute):
            raise BadRequestError(
                f"{part} in {getattr(precision, part)} while computing in {precision.compute}: "
                f"expected {precision.compute}, {', '.join(a.removesuffix('_weight_only') for a in allowed)}"
            )
    return found
