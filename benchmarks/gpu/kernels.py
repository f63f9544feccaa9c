"""Every kernel at the model's shapes, as data: what it computes, its exact result, its rivals, its launches.

Each case is made, checked against float64 and timed by itself: one that a device cannot compile or that is wrong is
recorded and marked, and the others run. `sweep` times the launches of a case, to fill the launch tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mindomni_rt.backends.fast.attention import Segments, candidates, eight_bit, masked, ours
from mindomni_rt.checkpoint.config import StackConfig
from mindomni_rt.judgement import described, judged
from mindomni_rt.kernels.decode_attention import decode_attention
from mindomni_rt.kernels.gemv import gemv
from mindomni_rt.kernels.int4_linear import int4_linear, quantize_int4
from mindomni_rt.kernels.launch import SHARED_LIMIT, Launch
from mindomni_rt.kernels.linear8 import linear8, linear8_cublas, quantize_weight
from mindomni_rt.kernels.norm_gemv import norm_gemv
from mindomni_rt.kernels.norms import add_norm
from mindomni_rt.kernels.quantize import quantize_rows
from mindomni_rt.kernels.rope import rope
from mindomni_rt.kernels.segment_attention import segment_attention, segment_attention_torch
from mindomni_rt.kernels.swiglu import swiglu
from mindomni_rt.kernels.triton_compat import REFUSALS
from mindomni_rt.memory.layers import Workload

from ..measure import Meter, Run, relative_error
from ..stages import Preset

TOLERANCE = {"bfloat16": 2e-2, "float16": 4e-3, "float32": 1e-5}
Output = Any
"""A tensor, or a tuple of them."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one shape.

    exact() -> the right output; variants: what computes it, "ours" first; baseline: the variant that rounds as ours
    does, by whose distance ours is judged beside the bound. some: the part of an output that is compared (`exact` gives
    that part alone). fresh: called before an output is compared, for kernels that work in place. flops or bytes say
    what its ceiling is: matrix products (`peak` names which) or copies. launches: choices for `launched` to sweep.
    """

    exact: Callable[[], Output]
    bound: float
    variants: Mapping[str, Callable[[], Output]]
    baseline: str = ""
    some: Callable[[Output], Output] = lambda output: output
    fresh: Callable[[], Any] = lambda: None
    flops: float = 0.0
    bytes: float = 0.0
    peak: str = "matmul"
    note: str = ""
    launched: Callable[[Launch], Output] = lambda launch: None
    launches: Sequence[Launch] = ()

    def error(self, variant: str) -> float:
        """Relative error, the largest of several outputs."""
        self.fresh()
        exact, found = self.exact(), self.some(self.variants[variant]())
        both = zip(found, exact, strict=True) if isinstance(exact, tuple) else [(found, exact)]
        errors = [relative_error(a, b) for a, b in both]
        return max(errors) if all(map(math.isfinite, errors)) else math.nan


@dataclass(frozen=True)
class Sizes:
    """Shapes and types that the kernels are measured at: those of a preset's first request."""

    work: Workload
    decoder: StackConfig
    language: StackConfig
    dtype: torch.dtype
    tolerance: float
    device: torch.device

    @classmethod
    def of(cls, preset: Preset, device: torch.device) -> Sizes:
        config, tolerance = preset.config, TOLERANCE[preset.dtype]
        return cls(preset.work(), config.decoder.stack, config.language.stack, preset.torch_dtype, tolerance, device)

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def draw(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, device=self.device, generator=self._generator).to(self.dtype)

    @property
    def gate_up(self) -> tuple[Tensor, Tensor]:
        """One row and the weight of the language model's gate_up."""
        hidden, inner = self.language.hidden_size, self.language.intermediate_size
        return self.draw(1, hidden), self.draw(2 * inner, hidden)


def run_case(name: str, make: Callable[[], Case], meter: Meter, ceilings: Mapping[str, float | None]) -> dict[str, Any]:
    """Errors, then times of every variant. Times are recorded even where the result is wrong: `right` says so."""
    found: dict[str, Any] = {"name": name, "right": False}
    try:
        case = make()
        baseline = case.error(case.baseline) if case.baseline else None
        exact_type = case.bound < 1e-4  # float32: rounding of another order, no ratio
        found |= judged(case.error("ours"), case.bound, None if exact_type else baseline) | {"note": case.note}
    except Exception as failure:  # noqa: BLE001  # a compiler may raise anything; the other kernels must still run
        return {**found, "failed": described(failure)}
    times: dict[str, float | str] = {}
    for variant, run in case.variants.items():
        try:
            times[variant] = meter.kernel(run)
        except Exception as failure:  # noqa: BLE001
            times[variant] = f"does not run: {described(failure)[:120]}"
    ours = times.get("ours")
    if isinstance(ours, float) and (case.flops or case.bytes):
        rate = case.flops / ours / 1e12 or case.bytes / ours / 1e9
        ceiling = ceilings.get(case.peak if case.flops else "copy")
        unit, share = ("tflops", "of_matmul") if case.flops else ("gbps", "of_copy")
        found |= {unit: rate, share: rate / ceiling if ceiling else None}
    return {**found, "seconds": times}


def sweep(sizes: Sizes, meter: Meter, most: int | None = None) -> dict[str, Any]:
    """The ten fastest launches of each kernel in seconds, and how many did not run. most: launches of each to try."""
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        try:
            case = make(sizes)
        except Exception as failure:  # noqa: BLE001  # as in run_case
            found[name] = {"failed": described(failure)}
            continue
        times, refused = list[tuple[float, dict[str, int]]](), 0
        for launch in case.launches[:most]:
            if meter.left() < 5:
                break
            try:
                times.append((meter.kernel(partial(case.launched, launch)), vars(launch)))
            except REFUSALS:
                refused += 1
        times.sort(key=lambda pair: pair[0])
        if case.launches:
            found[name] = {"best": [{"seconds": s, **launch} for s, launch in times[:10]], "refused": refused}
    return {**found, "shared_limits": dict(SHARED_LIMIT)}


def _space(*choices: Sequence[int]) -> tuple[Launch, ...]:
    """All launches of these rows, columns, warps and stages."""
    return tuple(Launch(block_m=m, block_n=n, warps=w, stages=s) for m, n, w, s in product(*choices))


def _attention(sizes: Sizes, pv: str | None = None) -> Case:
    """pv None: `segment_attention`; else `int8_attention` with its second product in that type."""
    stack, n, device = sizes.decoder, sizes.work.image_tokens, sizes.device
    heads, d, lengths = stack.num_heads, stack.head_dim, sizes.work.branches
    q, k, v = (sizes.draw(2, heads, n, d) for _ in range(3))
    keys, values = (sizes.draw(2, heads, max(lengths), d) for _ in range(2))
    tk, tv = (sizes.draw(2, heads, d) for _ in range(2))
    on_device = torch.tensor(lengths, dtype=torch.int32, device=device)
    segments = Segments(keys, values, tk, tv, on_device, lengths)
    few, rows = slice(0, min(2, heads)), slice(0, min(256, n))

    def exact() -> Tensor:
        wide = ((a[:, few].double(), b[:, few].double()) for a, b in ((keys, values), (tk, tv), (k, v)))
        condition, time, image = wide
        return segment_attention_torch(q[:, few, rows].double(), condition, time, image, on_device)

    if pv is None:
        tried = {"ours": ours(), **{name: run for name, run in candidates(device, d).items() if name != "segment"}}
    else:
        tried = {"ours": eight_bit(pv=pv), "segment_attention": ours(), "sdpa": masked()}
    return Case(
        exact=exact,
        bound={None: sizes.tolerance, "fp8": 0.06, "16bit": 0.03}[pv],
        variants={name: partial(run, q, k, v, segments) for name, run in tried.items()},
        baseline="" if pv else "sdpa",
        some=lambda output: output[:, few, rows],
        flops=4.0 * heads * n * d * sum(n + 1 + length for length in lengths),
        note="packing included" if pv else "",
        launched=lambda launch: segment_attention(q, (keys, values), (tk, tv), (k, v), on_device, launch=launch),
        launches=() if pv else _space((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    )


def _decode_attention(sizes: Sizes) -> Case:
    stack, cache = sizes.language, 512 if sizes.device.type == "cuda" else 64
    used = cache - 7
    q = sizes.draw(1, stack.num_heads, 1, stack.head_dim)
    keys, values = (sizes.draw(1, stack.num_kv_heads, cache, stack.head_dim) for _ in range(2))
    length = torch.tensor([used], dtype=torch.int32, device=sizes.device)

    def sdpa(wide: torch.dtype = sizes.dtype) -> Tensor:
        k, v = (t[:, :, :used].to(wide) for t in (keys, values))
        return F.scaled_dot_product_attention(q.to(wide), k, v, enable_gqa=True)

    return Case(
        exact=lambda: sdpa(torch.float64),
        bound=sizes.tolerance,
        variants={"ours": lambda: decode_attention(q, keys, values, length), "sdpa": sdpa},
        baseline="sdpa",
        bytes=2.0 * stack.num_kv_heads * used * stack.head_dim * keys.element_size(),
        note=f"{used} tokens: latency, not bandwidth",
    )


def _plain(sizes: Sizes, run: Callable[..., Output], *given: Tensor, moved: float = 1.0, **more: Any) -> Case:
    """A kernel beside its reference implementation, which is the baseline; in float64 that says what is right.

    moved: bytes that it reads and writes, as a multiple of the first tensor's.
    """
    some = more.get("some", lambda output: output)
    return Case(
        exact=lambda: some(run(*(t.double() for t in given), impl="torch")),
        bound=sizes.tolerance,
        variants={"ours": lambda: run(*given), "plain": lambda: run(*given, impl="torch"), **more.pop("others", {})},
        baseline="plain",
        bytes=moved * given[0].nbytes,
        **more,
    )


def _add_norm(sizes: Sizes) -> Case:
    rows, hidden = 2 * sizes.work.image_tokens, sizes.decoder.hidden_size
    x, residual, weight = sizes.draw(rows, hidden), sizes.draw(rows, hidden), sizes.draw(hidden)
    return _plain(sizes, lambda x, r, w, **how: add_norm(x, w, 1e-5, r, **how), x, residual, weight, moved=4)


def _rope(sizes: Sizes) -> Case:
    heads, d = sizes.decoder.num_heads, sizes.decoder.head_dim
    angle = torch.rand(2, sizes.work.image_tokens, d // 2, device=sizes.device)
    qkv = sizes.draw(2, sizes.work.image_tokens, 3 * heads * d)
    work = qkv.clone()
    return _plain(
        sizes, partial(rope, heads=heads, kv_heads=heads), work, angle.cos(), angle.sin(),
        some=lambda output: output[:2], fresh=lambda: work.copy_(qkv), moved=4 / 3,
    )  # fmt: skip


def _norm_gemv(sizes: Sizes) -> Case:
    x, weight = sizes.gate_up
    r, norm = sizes.draw(*x.shape), sizes.draw(x.shape[1])

    def apart() -> Output:
        return (swiglu(F.linear(add_norm(x, norm, 1e-6, r)[0], weight)),)  # type: ignore[arg-type]

    return _plain(
        sizes, lambda weight, x, norm, r, **how: norm_gemv(x, weight, norm, 1e-6, r, gate=True, **how),
        weight, x, norm, r, some=lambda output: output[0], others={"apart": apart},
    )  # fmt: skip


def _linear8(kind: str, sizes: Sizes) -> Case:
    stack, rows = sizes.decoder, sizes.work.image_tokens
    n, k = 2 * stack.intermediate_size, stack.hidden_size
    x, weight = sizes.draw(rows, k), sizes.draw(n, k)
    some = slice(0, min(rows, 512))
    a, w = quantize_rows(x, kind), quantize_weight(weight, kind)

    def ours(launch: Launch | None = None, impl: str = "auto") -> Tensor:
        return linear8(a, w, sizes.dtype, impl=impl, launch=launch)

    variants: dict[str, Run] = {
        "ours": ours,
        "with quantizing": lambda: linear8(quantize_rows(x, kind), w, sizes.dtype),
        "16 bits": lambda: F.linear(x, weight),
    }
    if x.is_cuda:
        variants |= {"triton": partial(ours, impl="triton"), "cuBLASLt": partial(ours, impl="cublas")}
        if kind == "fp8":
            variants["cuBLASLt, short sums"] = lambda: linear8_cublas(a, w, sizes.dtype, fast=True)
    return Case(
        exact=lambda: a.dequantize(torch.float32)[some].double() @ w.dequantize().double().T,
        bound=sizes.tolerance,
        variants=variants,
        some=lambda output: output[some],
        flops=2.0 * rows * n * k,
        peak=kind,
        note="gate_up of the decoder, one branch",
        launched=ours,
        launches=_space((64, 128), (64, 128, 256), (4, 8), (2, 3, 4)) if kind == "int8" else (),
    )


def _product(
    sizes: Sizes, run: Callable[..., Tensor], rows: int = 1, pack: Callable[[Tensor], Any] | None = None, **more: Any
) -> Case:
    """Few rows times the language model's gate_up in 16 bits, or packed into fewer: its meaning is what is right."""
    _, weight = sizes.gate_up
    x, packed = sizes.draw(rows, weight.shape[1]), pack(weight) if pack else weight
    held = [t for t in vars(packed).values() if isinstance(t, Tensor)] if pack else [weight]
    return Case(
        exact=lambda: x.double() @ (packed.dequantize() if pack else weight).double().T,
        bound=sizes.tolerance,
        variants={"ours": lambda: run(x, packed), "16 bits" if pack else "F.linear": lambda: F.linear(x, weight)},
        baseline="" if pack else "F.linear",
        bytes=float(sum(t.nbytes for t in held)),
        note="gate_up of the language model",
        launched=lambda launch: run(x, packed, launch=launch),
        **more,
    )


CASES: dict[str, Callable[[Sizes], Case]] = {
    "segment_attention": _attention,
    "int8_attention_fp8": partial(_attention, pv="fp8"),
    "int8_attention_16bit": partial(_attention, pv="16bit"),
    "decode_attention": _decode_attention,
    "add_norm": _add_norm,
    "swiglu": lambda s: _plain(s, swiglu, s.draw(2 * s.work.image_tokens, 2 * s.decoder.intermediate_size), moved=1.5),
    "rope": _rope,
    "linear8_int8": partial(_linear8, "int8"),
    "linear8_fp8": partial(_linear8, "fp8"),
    "gemv": partial(_product, run=gemv, launches=_space((1, 2, 4, 8), (512, 1024, 2048), (2, 4, 8), (2, 4))),
    "gemv_int8": partial(_product, run=gemv, pack=partial(quantize_weight, kind="int8")),
    "norm_gemv_gate": _norm_gemv,
    "int4_gemv": partial(
        _product, run=int4_linear, pack=quantize_int4, launches=_space((4, 8, 16), (4, 8, 16), (2, 4, 8), (2, 4))
    ),
    "int4_product_5_rows": partial(_product, run=int4_linear, rows=5, pack=quantize_int4),
}
