"""Odd options: each field of a request with values of every type, and the arguments of `load`.

`means` says what a value stands for, by this file's own rules and not by the program's checks: a value that means
nothing must be refused, one that means the value it replaces must change nothing.
"""

from __future__ import annotations

import decimal
import fractions
import io
import math
import pathlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .change import Change, Mutant, Random

BASE: dict[str, Any] = {
    "prompt": "draw a red cat", "think": True, "cascade": False, "height": 32, "width": 32, "num_inference_steps": 2,
    "guidance_scale": 2.0, "negative_prompt": "blurry", "seed": 1, "max_new_tokens": 3, "temperature": 0.0,
    "first_step": "full", "num_images": 1, "max_image_tokens": 1369, "preview_every": 0, "output": "numpy",
    "guidance_interval": (0.0, 1.0), "solver": "euler", "step_cache": 0.0, "draft_tokens": 0, "edit_features": None,
    "latents": None, "image": None,
}  # fmt: skip
ASK = ("prompt", "max_new_tokens", "temperature", "seed", "max_image_tokens", "image")
# field -> lowest, highest, step; whole numbers
WHOLE = {
    "height": (16, 3072, 16), "width": (16, 3072, 16), "num_inference_steps": (1, 1000, 1), "seed": (-(2**63), 2**64 - 1, 1),
    "max_new_tokens": (1, 2**21, 1), "num_images": (1, 256, 1), "max_image_tokens": (4, 2**20, 1), "preview_every": (0, 1000, 1),
    "draft_tokens": (0, 16, 1),
}  # fmt: skip
REAL = {"guidance_scale": (0, 1000), "temperature": (0, 100), "step_cache": (0, 1e9)}
WORDS = {
    "first_step": ("full", "condition_only"), "output": ("pil", "numpy"), "solver": ("euler", "multistep"),
    "edit_features": ("vit", "vit+vae"),
}  # fmt: skip
FLAGS = ("think", "cascade")
# Whole numbers that are allowed, and that the program would rightly work on for longer than a mutant may.
LONG = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 8,
    "num_images": 4,
    "max_new_tokens": 64,
    "max_image_tokens": 2**20,
}


class Odd:
    """An object whose every conversion fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __bool__(self) -> bool:
        raise RuntimeError("no truth")

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no array")


class Text(str):
    """A string of another class."""


def _values() -> tuple[Callable[[], Any], ...]:
    import torch

    return (
        lambda: True, lambda: False, lambda: None, lambda: 0, lambda: 1, lambda: -1, lambda: 2, lambda: 3, lambda: 16, lambda: 31,
        lambda: 48, lambda: 10**9, lambda: 2**63, lambda: -(2**64), lambda: 10**5000, lambda: 0.5, lambda: 2.0, lambda: 1.0, lambda: -0.0,
        lambda: math.nan, lambda: math.inf, lambda: -math.inf, lambda: 1e308, lambda: 1e-320, lambda: 1e-5, lambda: "32", lambda: "", lambda: "full",
        lambda: "euler", lambda: "vit", lambda: "vit+vae", lambda: "pil", lambda: "x" * 10**6, lambda: "\ud800", lambda: "\0", lambda: "<|image_pad|>",
        lambda: "<|im_end|>", lambda: "e\u0301" * 50, lambda: b"32", lambda: bytearray(b"x"), list, lambda: [1], lambda: ["x"], lambda: (0.2, 0.8),
        lambda: [0.0, 1.0], lambda: (1.0, 0.0), lambda: (0, math.nan), lambda: (0.1, 0.5, 0.9), dict, lambda: {"a": 1}, lambda: {1},
        lambda: np.int64(32), lambda: np.uint8(2), lambda: np.float32(2.0), lambda: np.float64("nan"), lambda: np.bool_(True), lambda: np.array(32),
        lambda: np.array([32]), lambda: np.array([], np.float32), lambda: np.datetime64("2020-01-01"), lambda: np.str_("euler"),
        lambda: torch.tensor(32), lambda: torch.tensor([2.0]), lambda: torch.tensor(2.0, requires_grad=True), lambda: torch.float32,
        lambda: complex(2, 0), lambda: decimal.Decimal(2), lambda: fractions.Fraction(2), lambda: fractions.Fraction(1, 3), lambda: Odd(),
        lambda: object(), lambda: int, lambda: len, lambda: range(3), lambda: iter([1]), lambda: pathlib.Path("x"), lambda: io.BytesIO(b"x"),
        lambda: Text("draw a red cat"), lambda: Text("euler"), lambda: memoryview(b"x"), lambda: Exception("x"), lambda: ..., lambda: NotImplemented,
    )  # fmt: skip


def _same(name: str) -> tuple[Callable[[], Any], ...]:
    """Other spellings of the value in BASE."""
    value = BASE[name]
    if isinstance(value, bool):
        return (lambda: np.bool_(value),)
    if isinstance(value, int):
        return (lambda: np.int64(value), lambda: np.uint16(value))
    if isinstance(value, float):
        return (
            lambda: np.float32(value),
            lambda: np.float64(value),
            lambda: fractions.Fraction(value),
            lambda: int(value),
        )
    if isinstance(value, tuple):
        return (lambda: list(value), lambda: (0, 1))
    return (lambda: value,)


def _latents(rng: Random) -> Callable[[], Any]:
    import torch

    shape = rng.choice(((1, 4, 4, 4), (1, 4, 4, 4), (4, 4, 4), (1, 4, 4, 5), (0,), (10**4, 10**4), (1, 4, 4, 4, 1)))
    seed = rng.randrange(2**31)

    def make() -> Any:
        if math.prod(shape) > 10**6:
            return np.broadcast_to(np.float32(1), shape)
        values = np.random.RandomState(seed).standard_normal(shape)
        kinds: list[Any] = [
            np.float64,
            np.float32,
            np.float16,
            np.int8,
            np.complex64,
            bool,
            object,
            "U3",
            "datetime64[s]",
        ]
        if seed % 3 == 0:
            dtype = (torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.int32, torch.float8_e4m3fn)[
                seed % 6
            ]
            tensor = torch.from_numpy(values).to(dtype)
            return tensor.requires_grad_() if dtype.is_floating_point and seed % 5 == 0 else tensor
        if seed % 3 == 1:
            return values.astype(np.float32).tolist()
        with np.errstate(all="ignore"):
            out = values.astype(kinds[seed % len(kinds)] if seed % len(kinds) != 8 else np.float32)
        if seed % 7 == 0 and out.dtype.kind == "f" and out.size:
            out.flat[0] = (np.nan, np.inf, 1e30)[seed % 3]
        return out[..., ::-1] if seed % 11 == 0 else out

    return make


def means(name: str, value: Any) -> str:
    """ "same", "other" or "nothing": what a value stands for in this field."""
    base = BASE[name]
    if type(value) in (Odd,):
        return "nothing"
    if name in FLAGS:
        return _flag(base, value)
    if name in WHOLE:
        if value is None:
            return "other" if name in ("seed", "max_image_tokens") else "nothing"
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
            return "nothing"
        low, high, step = WHOLE[name]
        return _as(int(value) == base) if low <= value <= high and value % step == 0 else "nothing"
    if name in REAL:
        if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer, fractions.Fraction)):
            return "nothing"
        low, high = REAL[name]
        fits = low <= value <= high and not (name == "temperature" and 0 < value < 0.001)
        return _as(float(value) == base) if fits else "nothing"
    if name in WORDS:
        if name == "edit_features" and value is None:
            return "same"
        return _as(value == base) if isinstance(value, str) and value in WORDS[name] else "nothing"
    if name in ("prompt", "negative_prompt"):
        if name == "negative_prompt" and value is None:
            return "other"
        return _as(value == base) if isinstance(value, str) and (value.strip() or name != "prompt") else "nothing"
    if name == "guidance_interval":
        if not isinstance(value, (tuple, list)) or len(value) != 2 or not all(type(v) in (int, float) for v in value):
            return "nothing"
        return _as(tuple(value) == base) if 0 <= value[0] < value[1] <= 1 else "nothing"
    if name == "latents":
        return _latents_mean(value)
    return "same" if value is None else "nothing"  # image: none of the values here is a picture


def _as(same: bool) -> str:
    return "same" if same else "other"


def _flag(base: bool, value: Any) -> str:
    return _as(bool(value) == base) if isinstance(value, (bool, np.bool_)) else "nothing"


def _latents_mean(value: Any) -> str:
    if value is None:
        return "same"
    if hasattr(value, "detach"):
        value = value.detach().float().numpy() if not value.is_complex() else np.zeros(1, np.complex64)
    try:
        values = np.asarray(value)
    except (RuntimeError, ValueError):
        return "nothing"
    fits = values.shape == (1, 4, 4, 4) and values.dtype.kind in "fiu"
    return "other" if fits and np.isfinite(values).all() and np.abs(values).max() <= 1e4 else "nothing"


def _long(name: str, value: Any) -> bool:
    return name in LONG and means(name, value) == "other" and value is not None and int(value) > LONG[name]


def make(rng: Random, seed: int, number: int) -> Mutant:
    """One request with one or two odd options."""
    method = rng.choice(("generate", "generate", "generate", "understand", "edit", "load", "callback"))
    if method == "load":
        return _load(rng, seed, number)
    if method == "callback":
        return _callback(rng, seed, number)
    names = [n for n in (ASK if method == "understand" else BASE) if not (method == "edit" and n == "image")]
    chosen = rng.sample(names, rng.choice((1, 1, 2)))
    options: dict[str, Callable[[], Any]] = {}
    for name in chosen:
        pool = _same(name) if rng.random() < 0.2 else _values()
        value = _latents(rng) if name == "latents" and rng.random() < 0.8 else rng.choice(pool)
        while _long(name, value()):
            value = rng.choice(pool)
        options[name] = value
    verdicts = {name: means(name, value()) for name, value in options.items()}
    unknown = rng.random() < 0.05
    asked = "other options" if "other" in verdicts.values() else ""
    if "nothing" in verdicts.values() or unknown:
        asked = ""

    def call(pipe: Any) -> Any:
        given = {name: value() for name, value in options.items()}
        if unknown:
            given["hieght"] = 32
        return request(pipe, method, given)

    note = f"{method}: {', '.join(f'{n} is {_kind(options[n])} and means {v}' for n, v in verdicts.items())}"
    refused = "nothing" in verdicts.values() or unknown
    kind = f"{method} option" if len(chosen) == 1 else f"{method} two options"
    change = Change(files={}, note=note, asked=asked)
    return Mutant(
        seed=seed,
        number=number,
        target="options",
        kind=kind,
        source=_baseline(method, refused),
        change=change,
        call=call,
    )


def _baseline(method: str, refused: bool) -> str:
    """What the result must equal; a value that means nothing has no right result."""
    return f"{method} refused" if refused else method


def _kind(value: Callable[[], Any]) -> str:
    made = value()
    return type(made).__name__


def request(pipe: Any, method: str, given: dict[str, Any]) -> Any:
    """The base request with these options instead. Returns its result."""
    if method == "understand":
        return pipe.understand(**{**{n: BASE[n] for n in ASK}, **given})
    options = {**BASE, **given}
    if method == "edit":
        del options["image"]
        return pipe.edit(np.zeros((32, 32, 3), np.uint8), options.pop("prompt"), **options)
    return pipe.generate(**options)


def _callback(rng: Random, seed: int, number: int) -> Mutant:
    which = rng.choice(("callback", "cancel"))
    value = rng.choice(
        [make for make in _values() if not callable(make())]
    )  # what a caller's function raises is his own

    def call(pipe: Any) -> Any:
        return pipe.generate(**{**BASE, which: value()})

    source = "generate" if value() is None else "generate refused"
    change = Change(files={}, note=f"{which} is {_kind(value)}", asked="")
    return Mutant(seed=seed, number=number, target="options", kind=which, source=source, change=change, call=call)


def _load(rng: Random, seed: int, number: int) -> Mutant:
    name = rng.choice(
        ("path_or_repo_id", "backend", "device", "dtype", "precision", "memory_budget", "fast", "revision")
    )
    words = (
        "auto",
        "cpu",
        "cuda",
        "cuda:99",
        "onnx",
        "torch",
        "float16",
        "float32",
        "8GiB",
        "-1GiB",
        "1e400",
        "fp8",
        "int4",
        "decoder=fp8",
        "",
    )
    value: Callable[[], Any] = rng.choice(_values()) if rng.random() < 0.6 else partial(str, rng.choice(words))
    model = rng.choice(("checkpoint", "bundle"))

    def call(pipe: Any) -> Any:
        import mindomni_rt

        folder = pipe.sources[model]
        options = {"path_or_repo_id": folder, "device": "cpu", "local_files_only": True, name: value()}
        made = mindomni_rt.load(**options)
        return made.generate(**BASE)

    change = Change(files={}, note=f"load {model}: {name} is {_kind(value)}", asked="another way to load")
    return Mutant(
        seed=seed, number=number, target="options", kind="load option", source=f"load {model}", change=change, call=call
    )


KINDS = (
    *(f"{method} {count}" for method in ("generate", "understand", "edit") for count in ("option", "two options")),
    "callback",
    "cancel",
    "load option",
)
