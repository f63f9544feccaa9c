"""The Markdown table of a `gpu_suite` run: what was measured, beside its ceiling, its baseline and its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .measure import joined, ratio

# Of an H200 at full size (bf16 ceilings there about 790 TFLOP/s and 4.3 TB/s); other machines have none.
TARGETS = {
    "step 1024": ("guided 1024² step, bf16", 0.118, "s"),
    "step fp8": ("guided 1024² step, fp8 products", 0.075, "s"),
    "token": ("token, bf16", 0.0037, "s"),
    "token int4": ("int4 against bf16 decoding", 2.5, "times"),
    "request": ("whole 1024² image, 300 thinking tokens, bf16", 8.0, "s"),
    "faster": ("whole request against eager baselines", 4.0, "times"),
}


def _get(data: Mapping[str, Any], *path: str) -> Any:
    found: Any = data
    for key in path:
        if not isinstance(found, Mapping) or key not in found:
            return None
        found = found[key]
    return found


def _text(value: Any, unit: str = "", digits: int = 3) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.{digits}g}{unit}"
    return f"{value}{unit}"


def markdown(data: Mapping[str, Any]) -> str:
    """The whole report."""
    machine, sections = data["machine"], data["sections"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    lines = [
        f"# Speed, preset {data['preset']}: {machine['gpu'] or machine.get('cpu')}",
        "",
        f"{data['date']}, commit {machine['commit']}, {versions}, {data['wall_s']} s in all. Random weights.",
        "",
        *_ceilings(sections),
        *_kernels(sections),
        *_stages(sections),
        *_budgets(sections),
        *_targets(data),
    ]
    trouble = [f"- {k}: {v.get('failed') or v.get('skipped')}" for k, v in sections.items() if _trouble(v)]
    if trouble:
        lines += ["## Not measured", "", *trouble, ""]
    return "\n".join(lines)


def _trouble(section: Any) -> bool:
    return isinstance(section, Mapping) and ("failed" in section or "skipped" in section)


def _ceilings(sections: Mapping[str, Any]) -> Iterator[str]:
    found = sections.get("ceilings") or {}
    yield "Ceilings of this run: " + ", ".join(
        f"{name} {_text(found.get(key))} {unit}"
        for name, key, unit in (
            ("matrix product", "matmul", "TFLOP/s"),
            ("fp8", "fp8", "TFLOP/s"),
            ("int8", "int8", "TOP/s"),
            ("copy", "copy", "GB/s"),
        )
    )
    yield ""


def _kernels(sections: Mapping[str, Any]) -> Iterator[str]:
    yield "## Kernels"
    yield ""
    yield joined(["kernel", "error (bound)", "ours ms", "of its ceiling", "others ms", "note"])
    yield joined(["---"] * 6)
    for case in _get(sections, "kernels", "cases") or ():
        if "failed" in case:
            yield joined([case["name"], case["failed"], "–", "–", "–", ""])
            continue
        times = case.get("seconds", {})
        ours = times.get("ours")
        share = case.get("of_matmul") or case.get("of_copy")
        others = ", ".join(
            f"{k} {1e3 * v:.3g}" if isinstance(v, float) else f"{k}: {v}" for k, v in times.items() if k != "ours"
        )
        yield joined(
            [
                case["name"],
                f"{case['error']:.1e} ({case['bound']:.0e})",
                _text(1e3 * ours if isinstance(ours, float) else ours),
                f"{share:.0%}" if share else "–",
                others or "–",
                case.get("note", ""),
            ]
        )
    yield ""


def _stages(sections: Mapping[str, Any]) -> Iterator[str]:
    yield "## Stages"
    yield ""
    yield joined(["what", "ours", "eager baseline", "times faster", "error to eager"])
    yield joined(["---"] * 5)
    sides = [name.removeprefix("ours ") for name in sections if name.startswith("ours ")]
    for side in sides:
        ours, eager = _get(sections, f"ours {side}", "step_s"), _get(sections, f"eager {side}", "step_s")
        error = _get(sections, f"ours {side}", "error_to_eager")
        yield joined([f"guided step {side}²", *_pair(ours, eager), _text(error)])
    for kind in ("fp8", "int8"):
        found = sections.get(f"decoder={kind}") or {}
        eager = _get(sections, f"eager {sides[0]}", "step_s") if sides else None
        row = [f"guided step {sides[0] if sides else ''}², {kind}", *_pair(found.get("step_s"), eager)]
        yield joined([*row, _text(found.get("error_to_eager"))])
    theirs = _get(sections, "transformers", "eager", "token_s")
    for name, key in (
        ("token", "decoding"),
        ("token, int8 weights", "language=int8wo,head=int8wo"),
        ("token, int4 weights", "language=int4,head=int8wo"),
    ):
        yield joined([name, *_pair(_get(sections, key, "token_s"), theirs), "–"])
    static = _get(sections, "transformers", "static_compiled", "token_s")
    yield joined(["token, transformers static and compiled", *_pair(None, static), "–"])
    step = _get(sections, "diffusers", "step_s")
    yield joined(["guided step, diffusers' OmniGen", *_pair(None, step), "–"])
    total = _get(sections, "request", "total_s")
    yield joined(["whole request", *_pair(total, eager_request(sections)), "–"])
    yield ""
    stages = _get(sections, "request", "stages_s")
    if stages:
        yield "Whole request: " + ", ".join(f"{k} {v:.3g} s" for k, v in stages.items()) + "."
        peak, weights = _get(sections, "request", "peak_bytes"), _get(sections, "request", "weight_bytes")
        planned = _get(sections, "request", "planned_bytes")
        yield f"Peak memory {peak / 1e9:.2f} GB; weights {weights / 1e9:.2f} GB; planned {planned / 1e9:.2f} GB."
        yield ""


def _budgets(sections: Mapping[str, Any]) -> Iterator[str]:
    found = {name.removeprefix("budget "): s for name, s in sections.items() if name.startswith("budget ")}
    measured = {name: s for name, s in found.items() if "total_s" in s}
    if not measured:
        return
    yield "## Budgets"
    yield ""
    yield joined(["budget", "peak", "under it", "whole request", "kept as", "stays loaded"])
    yield joined(["---"] * 6)
    for name, section in measured.items():
        peak = f"{section['peak_bytes'] / 1e9:.2f} GB"
        under = "yes" if section["under"] else "NO"
        stays = ", ".join(section["resident"]) or "nothing"
        yield joined([name, peak, under, f"{section['total_s']:.3g} s", section["precision"], stays])
    yield ""


def _pair(ours: float | None, theirs: float | None) -> list[str]:
    faster = ratio(theirs, ours)
    return [
        _text(1e3 * ours if ours else None, " ms"),
        _text(1e3 * theirs if theirs else None, " ms"),
        _text(faster, "", 3),
    ]


def eager_request(sections: Mapping[str, Any]) -> float | None:
    """The request as the baselines would run it: their step and their token instead of ours, our other stages."""
    side = _get(sections, "request", "side")
    step, ours = _get(sections, f"eager {side}", "step_s"), _get(sections, f"ours {side}", "step_s")
    token, mine = _get(sections, "transformers", "eager", "token_s"), _get(sections, "decoding", "token_s")
    stages = _get(sections, "request", "stages_s")
    if not (step and ours and token and mine and stages):
        return None
    rest = sum(v for k, v in stages.items() if k not in ("language", "denoiser"))
    return float(rest + stages["denoiser"] * step / ours + stages["language"] * token / mine)


def _targets(data: Mapping[str, Any]) -> Iterator[str]:
    sections, gpu = data["sections"], str(data["machine"]["gpu"])
    measured_here = data["preset"] == "full" and "H200" in gpu
    found = {
        "step 1024": _get(sections, "ours 1024", "step_s"),
        "step fp8": _get(sections, "decoder=fp8", "step_s"),
        "token": _get(sections, "decoding", "token_s"),
        "token int4": ratio(
            _get(sections, "decoding", "token_s"), _get(sections, "language=int4,head=int8wo", "token_s")
        ),
        "request": _get(sections, "request", "total_s"),
        "faster": ratio(eager_request(sections), _get(sections, "request", "total_s")),
    }
    yield "## Targets (H200, full size)"
    yield ""
    yield joined(["target", "wanted", "measured"])
    yield joined(["---"] * 3)
    for key, (name, wanted, unit) in TARGETS.items():
        sign = "≥" if unit == "times" else "≤"
        value = found[key] if measured_here else None
        yield joined([name, f"{sign} {wanted} {unit}", _text(value, f" {unit}") if value else "not yet measured"])
    yield ""
