"""Architectures: which runtime serves each, what it computes, which precision is the default and why.

The architectures' abilities are NVIDIA's; that a TensorRT-RTX build accepts or refuses each pair was tried for every
sm_75 to sm_121 entry without a GPU. Speeds and quality on devices are not measured here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindomni_rt.devices.table import find_device, load_devices
from mindomni_rt.errors import BadRequestError, UnsupportedDeviceError
from mindomni_rt.memory.precision import FLOATS, KINDS
from mindomni_rt.stages import STAGES

# "mixed" is of stage vae alone: float32 with the attention's matrices in float16, where there are no float32 products.
PRECISIONS = (*(k.short for k in KINDS.values() if k.exported), "mixed")
# Stages whose matrices are quantized; the others keep the bundle's own type. The vision tower runs once an image and
# the connector is 3 % of the weights: nothing to gain. The VAE is convolutions, and float16 overflows in SDXL's.
QUANTIZED = ("language", "prefix", "denoiser")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An SM version. precisions: what its tensor cores and the runtime take, best-supported type first."""

    sm: str
    runtime: str
    precisions: tuple[str, ...]
    default: Mapping[str, str]
    reason: str

    @property
    def dtype(self) -> str:
        """The 16-bit type: bfloat16 has float32's range, so it is taken where it exists."""
        return "bfloat16" if "bf16" in self.precisions else "float16"


# TensorRT-RTX 1.7 refuses float32 matrix products and 4-bit integers for Turing.
_TURING = ("fp16", "int8", "int8wo", "mixed")
_AMPERE = ("bf16", "fp32", *_TURING, "int4")
_ADA = (*_AMPERE, "fp8")
_BLACKWELL = (*_ADA, "nvfp4")


def _architecture(sm: str, runtime: str, precisions: tuple[str, ...], denoiser: str, reason: str) -> Architecture:
    language = "int4" if "int4" in precisions else "int8wo"
    default = {"language": language, "prefix": denoiser, "denoiser": denoiser}
    why = f"decoding reads every weight for each token, so {language[3]}-bit weights are its speed; {reason}"
    return Architecture(sm=sm, runtime=runtime, precisions=precisions, default=default, reason=why)


ARCHITECTURES = {
    a.sm: a
    for a in (
        _architecture("sm_75", "tensorrt_rtx", _TURING, "int8", "Turing has INT8 but no bfloat16, FP8 or, here, INT4"),
        _architecture("sm_80", "tensorrt", _AMPERE, "int8", "Ampere's INT8 is twice its 16-bit rate; no FP8"),
        _architecture("sm_86", "tensorrt_rtx", _AMPERE, "int8", "Ampere's INT8 is twice its 16-bit rate; no FP8"),
        _architecture("sm_87", "tensorrt", _AMPERE, "int8", "Orin has INT8, no FP8"),
        _architecture("sm_89", "tensorrt_rtx", _ADA, "int8", "Ada's INT8 is twice its FP8 with float32 sums"),
        _architecture("sm_90", "tensorrt", _ADA, "fp8", "Hopper's FP8 keeps more range than INT8 at its rate"),
        _architecture("sm_100", "tensorrt", _BLACKWELL, "nvfp4", "NVFP4 is Blackwell's fastest type"),
        _architecture("sm_110", "tensorrt", _BLACKWELL, "nvfp4", "Thor has Blackwell's NVFP4"),
        _architecture("sm_120", "tensorrt_rtx", _BLACKWELL, "nvfp4", "NVFP4 is Blackwell's fastest type"),
        _architecture("sm_121", "tensorrt_rtx", _BLACKWELL, "nvfp4", "NVFP4 is Blackwell's fastest type"),
    )
}


@dataclass(frozen=True, kw_only=True)
class Target:
    """What to build for: "cpu" (ONNX graphs) or engines of one runtime for one or more architectures."""

    runtime: str
    sms: tuple[str, ...] = ()

    @property
    def architectures(self) -> list[Architecture]:
        return [ARCHITECTURES[sm] for sm in self.sms]


_UNKNOWN = "target {!r}: expected cpu, an architecture such as sm_89, or a device such as rtx4090"


def parse_target(text: str) -> Target:
    """ "cpu", "sm_89", "RTX 4090", or several of one runtime: "sm_86,rtx4090". Raises UnsupportedDeviceError."""
    names = [n.strip() for n in text.split(",") if n.strip()]
    if [n.lower() for n in names] in (["cpu"], ["onnx"]):
        return Target(runtime="onnx")
    if not names:
        raise UnsupportedDeviceError(_UNKNOWN.format(text))
    if {n.lower() for n in names} & {"cpu", "onnx"}:
        raise UnsupportedDeviceError(f"target {text!r}: cpu cannot be combined with others: build a bundle for each")
    sms: list[str] = []
    for name in names:
        sm = _architecture_of(name)
        sms += [sm] if sm not in sms else []
    runtimes = {ARCHITECTURES[sm].runtime for sm in sms}
    if len(runtimes) != 1:
        listed = ", ".join(f"{sm} ({ARCHITECTURES[sm].runtime})" for sm in sms) or "none"
        raise UnsupportedDeviceError(f"target {text!r}: one bundle holds engines of one runtime; these need {listed}")
    return Target(runtime=runtimes.pop(), sms=tuple(sms))


def _architecture_of(name: str) -> str:
    """ "sm_89" of "sm_89", "89" or a device's name. Raises UnsupportedDeviceError."""
    digits = re.fullmatch(r"(?:sm_?)?(\d+)", name.lower())
    if digits and f"sm_{digits[1]}" in ARCHITECTURES:
        return f"sm_{digits[1]}"
    device = load_devices().named(name)
    if device is None and digits and name.lower().startswith("sm"):
        raise UnsupportedDeviceError(f"target {name!r}: expected one of {', '.join(ARCHITECTURES)}")
    if device is None and difflib.get_close_matches(name.lower(), ["cpu", "onnx"]):
        raise UnsupportedDeviceError(_UNKNOWN.format(name))
    return (device or find_device(name)).sm


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Precision of each stage, and the type in which unquantized parts compute."""

    dtype: str
    stages: Mapping[str, str]


_DTYPE_OF = {KINDS[name].short: name for name in FLOATS}
_NAME_OF = {dtype: name for name, dtype in _DTYPE_OF.items()}
# onnxruntime on the CPU: no bfloat16 at all, and no kernels for the 8- and 4-bit floats that serve anyone.
_CPU = ("fp32", "fp16", "int8", "int8wo", "int4", "mixed")


def choose(target: Target, precision: str | None, overrides: Mapping[str, str] | None = None) -> Choice:
    """Precisions for a target: its table's, or `precision` everywhere it applies, then overrides by stage.

    Raises UnsupportedDeviceError naming precision and architecture for one that a target lacks, BadRequestError for
    an unknown name. Nothing has been built by then.
    """
    overrides = dict(overrides or {})
    for stage in overrides:
        if stage not in STAGES:
            raise BadRequestError(f"stage {stage!r}: expected one of {', '.join(STAGES)}")
    asked = [p for p in (precision, *overrides.values()) if p is not None]
    for name in asked:
        if name not in PRECISIONS:
            raise BadRequestError(f"precision {name!r}: expected one of {', '.join(PRECISIONS)}")
        _check(target, name)
    if precision == "mixed" or any(p == "mixed" for s, p in overrides.items() if s != "vae"):
        raise BadRequestError("precision mixed is for stage vae: --stage vae=mixed")
    dtype = _DTYPE_OF.get(precision or "") or _default_dtype(target)
    plain = _NAME_OF[dtype]
    stages = dict.fromkeys(STAGES, plain)
    # float32 is what the released code computes; float16 overflows in SDXL's decoder.
    stages["vae"] = "fp32" if all(_has(a, "fp32") for a in target.architectures) else "mixed"
    if precision is None and target.architectures:
        defaults = [a.default for a in target.architectures]
        for stage in QUANTIZED:  # of several architectures, a choice that all of them have
            shared = next((d[stage] for d in defaults if all(_has(a, d[stage]) for a in target.architectures)), plain)
            stages[stage] = shared
    elif precision is not None and precision not in _DTYPE_OF:
        stages.update(dict.fromkeys(QUANTIZED, precision))
    for stage, name in overrides.items():
        if stage not in QUANTIZED and name not in (*_DTYPE_OF, "mixed"):
            raise BadRequestError(f"stage {stage} is not quantized; give it fp32, fp16 or bf16")
        if stage != "vae" and name in _DTYPE_OF and name != plain:
            raise BadRequestError(
                f"{stage}={name}: all stages but vae share one type, here {plain}; use --precision {name}"
            )
        stages[stage] = name
    if stages["prefix"] != stages["denoiser"]:
        raise BadRequestError("prefix and denoiser share their weights: give both the same precision")
    return Choice(dtype=dtype, stages=stages)


def _default_dtype(target: Target) -> str:
    if target.runtime == "onnx":
        return "float32"
    return "float16" if any(a.dtype == "float16" for a in target.architectures) else "bfloat16"


def _has(architecture: Architecture, precision: str) -> bool:
    return precision in architecture.precisions


def _check(target: Target, precision: str) -> None:
    if target.runtime == "onnx" and precision not in _CPU:
        raise UnsupportedDeviceError(f"precision {precision} on cpu: onnxruntime offers {', '.join(_CPU)} there")
    for architecture in target.architectures:
        if not _has(architecture, precision):
            raise UnsupportedDeviceError(
                f"precision {precision} on {architecture.sm}: it has {', '.join(architecture.precisions)}"
            )


def stages_of(names: Sequence[str]) -> dict[str, str]:
    """ "denoiser=fp8" entries of the command line as a mapping. Raises BadRequestError."""
    out: dict[str, str] = {}
    for name in names:
        stage, equals, precision = name.partition("=")
        if not equals:
            raise BadRequestError(f"{name!r}: expected STAGE=PRECISION, such as denoiser=fp8")
        out[stage] = precision
    return out
