"""Precisions by name: what is stored, what is computed, how many bits. Export, planner and fast path read this table.

One name means one thing everywhere: "int8" rounds weights and activations, "int8wo" the weights alone. A floating type
has two spellings, torch's ("bfloat16") and a short one ("bf16").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from ..errors import BadRequestError


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One precision of matrix products. bits: of a stored weight, scales included; activations: what multiplies it;
    exported: whether bundles have it, whose runtimes choose how they sum."""

    name: str
    short: str
    weights: str
    activations: str
    bits: float
    calibrated: bool = False
    exported: bool = True

    @property
    def floating(self) -> bool:
        """Whether weights are stored in the type that they were trained or loaded in, without scales."""
        return self.weights == self.name


def _float(name: str, short: str, bits: int) -> Kind:
    return Kind(name=name, short=short, weights=name, activations=name, bits=bits)


_KINDS = (
    _float("float32", "fp32", 32),
    _float("float16", "fp16", 16),
    _float("bfloat16", "bf16", 16),
    Kind(name="int8", short="int8", weights="int8, a scale a channel", activations="int8", bits=8, calibrated=True),
    Kind(name="int8wo", short="int8wo", weights="int8, a scale a channel", activations="the compute type", bits=8),
    Kind(name="fp8", short="fp8", weights="e4m3, a scale a channel", activations="e4m3", bits=8, calibrated=True),
    # Sums stay in the tensor cores' registers, which are shorter than float32 on Ada and Hopper.
    Kind(
        name="fp8fast", short="fp8fast", weights="e4m3, a scale a channel", activations="e4m3", bits=8, exported=False
    ),
    # One 16-bit scale and zero for 128 weights.
    Kind(name="int4", short="int4", weights="int4 in groups of 128", activations="the compute type", bits=4.25),
    # One 8-bit scale for 16 weights.
    Kind(name="nvfp4", short="nvfp4", weights="e2m1 in blocks of 16", activations="e2m1", bits=4.5, calibrated=True),
)
KINDS: Mapping[str, Kind] = {k.name: k for k in _KINDS}
BITS: Mapping[str, float] = {k.name: k.bits for k in _KINDS}
FLOATS = tuple(k.name for k in _KINDS if k.floating)
COMPUTE: Mapping[str, int] = {name: round(BITS[name]) // 8 for name in FLOATS}
"""Bytes of a number of each type that is computed in."""
ATTENTIONS = ("auto", "segment", "sdpa", "flash", "cudnn", "int8")
KEYS = ("language", "decoder", "head", "vae")
PRESETS = ("bfloat16", "float16", "float32", "fp8", "fp8fast", "int8", "int4")
_SPELLINGS = {spelling: k for k in _KINDS for spelling in (k.name, k.short)}


def kind(name: str) -> Kind:
    """The precision of that name, in either spelling. Raises BadRequestError."""
    if name not in _SPELLINGS:
        raise BadRequestError(f"precision {name!r}: expected one of {', '.join(KINDS)}")
    return _SPELLINGS[name]


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How weights are stored and what is computed in. Any spelling is taken; the fields hold torch's.

    head: of the output embedding; vae: weights and activations; embedding: of the language model's input table.
    """

    compute: str = "bfloat16"
    language: str = "bfloat16"
    decoder: str = "bfloat16"
    head: str = "bfloat16"
    vae: str = "float32"
    embedding: str = field(default="")

    def __post_init__(self) -> None:
        if not self.embedding:
            object.__setattr__(self, "embedding", self.compute)
        for entry in fields(self):
            value = getattr(self, entry.name)
            allowed = FLOATS if entry.name in ("compute", "vae", "embedding") else tuple(KINDS)
            name = _SPELLINGS[value].name if value in _SPELLINGS else value
            if name not in allowed:
                raise BadRequestError(f"{entry.name} precision {value!r}: expected one of {', '.join(allowed)}")
            object.__setattr__(self, entry.name, name)

    @classmethod
    def uniform(cls, dtype: str, vae: str = "float32") -> Precision:
        """One type for everything but the VAE, as an unquantized checkpoint runs."""
        return cls(compute=dtype, language=dtype, decoder=dtype, head=dtype, vae=vae)

    @classmethod
    def of_stages(cls, stages: Mapping[str, str], compute: str) -> Precision:
        """From the precision of each stage of a bundle; compute: what unquantized parts are in.

        A rounded language model has its head in 8 bits and its input table in 16: `export.quantize` makes them so.
        """
        language, decoder = kind(stages["language"]).name, kind(stages["denoiser"]).name
        vae = "float32" if stages["vae"] == "mixed" else kind(stages["vae"]).name
        rounded = not KINDS[language].floating
        return cls(
            compute=compute,
            language=language,
            decoder=decoder,
            head="int8wo" if rounded else compute,
            vae=vae,
            embedding="float16" if rounded and kind(compute).name == "float32" else compute,
        )

    def __str__(self) -> str:
        return f"language {self.language}, head {self.head}, decoder {self.decoder}, vae {self.vae}"


def plain_vae(compute: str, device: str) -> str:
    """The VAE's type without a precision: SDXL's overflows in float16, not in bfloat16."""
    return "bfloat16" if compute == "bfloat16" and device.split(":")[0] == "cuda" else "float32"


def parse_precision(text: str, compute: str, vae: str = "float32") -> Precision:
    """`load(precision=…)`: a preset, or "part=kind" pairs joined by commas, over a compute type.

    Presets: "fp8" has the decoder in fp8 and the language model in the compute type, "fp8fast" is the same with sums in
    fewer bits on Ada and Hopper; "int8" has the decoder in int8,
    language and head in int8wo; "int4" has language in int4, head in int8wo, decoder in int8; a floating type has
    everything in it. Pairs, such as "language=int4,decoder=fp8", change single parts: language, decoder, head, vae.
    The VAE is bfloat16 with every preset but the floating ones; pairs that do not name it leave it in `vae`, as loading
    without a precision has it (`plain_vae`). Raises BadRequestError.
    """
    base = Precision.uniform(compute)
    small = replace(base, vae="float32" if compute == "float32" else "bfloat16")
    presets = {
        "fp8": replace(small, decoder="fp8"),
        "fp8fast": replace(small, decoder="fp8fast"),
        "int8": replace(small, language="int8wo", head="int8wo", decoder="int8"),
        "int4": replace(small, language="int4", head="int8wo", decoder="int8"),
    }
    name = text.strip()
    if name in presets:
        return presets[name]
    if name in _SPELLINGS and _SPELLINGS[name].floating:
        if _SPELLINGS[name].name != base.compute:
            raise BadRequestError(f"precision {name!r} with dtype {compute!r}: name one of them only")
        return base
    found = replace(base, vae=vae)
    for pair in name.split(","):
        part, _, value = pair.strip().partition("=")
        if part not in KEYS or not value:
            raise BadRequestError(
                f"precision {text!r}: expected one of {', '.join(PRESETS)}, or pairs such as language=int4,decoder=fp8"
            )
        found = replace(found, **{part: value})  # type: ignore[arg-type]  # Precision checks the name
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


# What the fast path has a product for. Decoding is bound by reading weights, so the language model's activations are
# never rounded; the decoder is bound by arithmetic and takes 8-bit activations.
_FAST = {"language": ("int8wo", "int4"), "head": ("int8wo", "int4"), "decoder": ("int8", "fp8", "fp8fast", "int4")}


def stored(precision: Precision) -> dict[str, str]:
    """Names of the fast path's products for the language's blocks, its head and the decoder's blocks.

    Raises BadRequestError for a kind that a part has no product for.
    """
    found = {}
    for part, allowed in _FAST.items():
        name = str(getattr(precision, part))
        if name not in (*allowed, precision.compute):
            raise BadRequestError(
                f"{part} in {name} while computing in {precision.compute}: "
                f"expected {precision.compute}, {', '.join(allowed)}"
            )
        found[part] = name
    return found
