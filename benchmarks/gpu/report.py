"""The Markdown table of a GPU run: what was measured, beside its ceiling, its baseline and its target."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from ..measure import pick, table

# Of an H200 at full size (bf16 ceilings there about 790 TFLOP/s and 4.3 TB/s); other machines have none.
TARGETS = {
    "step": ("guided 1024² step, bf16", 0.118, "s"),
    "step fp8": ("guided 1024² step, fp8 products", 0.075, "s"),
    "token": ("token, bf16", 0.0037, "s"),
    "token int4": ("int4 against bf16 decoding", 2.5, "times"),
    "request": ("whole 1024² image, 300 thinking tokens, bf16", 8.0, "s"),
    "faster": ("whole request against eager baselines", 4.0, "times"),
}
Sections = Mapping[str, Any]


def _text(value: Any, unit: str = "", scale: float = 1) -> str:
    if value is None:
        return "–"
    return f"{scale * value:.3g}{unit}" if isinstance(value, (int, float)) else f"{value}"


def _ratio(value: float | None, base: float | None) -> float | None:
    """value / base where both are known."""
    return value / base if value and base else None


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a heading and a table; none where there are no rows."""
    return [f"## {title}", "", *table(head, rows), ""] if rows else []


def _gb(count: Any) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"


def markdown(data: Mapping[str, Any]) -> str:
    """The whole report; of a part that did not run, nothing or dashes."""
    machine, sections = data["machine"], data["sections"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    lines = [
        f"# Speed, preset {data['preset']}: {machine['gpu'] or machine.get('cpu')}",
        "",
        f"{data['date']}, commit {data.get('commit')}, {versions}, {data['wall_s']} s in all. Random weights.",
        "",
        *_ceilings(sections),
        *_correctness(sections),
        *_stages(sections),
        *_kernels(sections),
        *_budgets(sections),
        *_targets(data),
    ]
    trouble = [
        f"- {name}: {section.get('failed') or section.get('skipped') or section.get('missing')}"
        for name, section in sections.items()
        if isinstance(section, Mapping) and {"failed", "skipped", "missing"} & set(section)
    ]
    return "\n".join([*lines, *(["## Not measured", "", *trouble, ""] if trouble else [])])


def _ceilings(sections: Sections) -> Iterator[str]:
    units = {"matmul": "TFLOP/s", "fp8": "TFLOP/s", "int8": "TOP/s", "copy": "GB/s"}
    found = sections.get("ceilings") or {}
    yield "Ceilings of this run: " + ", ".join(f"{k} {_text(found.get(k))} {unit}" for k, unit in units.items())
    yield ""


def _ms(seconds: Any) -> str:
    return _text(seconds, " ms", 1e3)


def _yes(right: Any) -> str:
    return "yes" if right else "NO"


def _correctness(sections: Sections) -> Iterator[str]:
    """Everything that was judged by its distance from float32."""
    found = [(name, s) for name, s in sections.items() if isinstance(s, Mapping) and {"right", "agrees"} & set(s)]
    keys = ("error", "baseline_error", "bound")
    rows = [[name, *(_text(s.get(k)) for k in keys), _yes(s.get("right", s.get("agrees")))] for name, s in found]
    yield from _section("Distance from float32", ["what", "ours", "baseline", "bound", "right"], rows)


def _stages(sections: Sections) -> Iterator[str]:
    sides = [name.removeprefix("ours ") for name in sections if name.startswith("ours ")]
    first = sides[0] if sides else ""
    eager, theirs = pick(sections, f"eager {first}", "step_s"), their_token(sections)
    rows = [(f"guided step {s}²", f"ours {s}", "step_s", pick(sections, f"eager {s}", "step_s")) for s in sides]
    rows += [(f"guided step {first}², {kind}", f"decoder={kind}", "step_s", eager) for kind in ("fp8", "int8")]
    rows += [
        ("token", "decoding", "token_s", theirs),
        ("token, int8 weights", "language=int8wo,head=int8wo", "token_s", theirs),
        ("token, int4 weights", "language=int4,head=int8wo", "token_s", theirs),
        ("whole request", "request", "total_s", eager_request(sections)),
    ]
    timed = [(name, pick(sections, section, key), other) for name, section, key, other in rows]
    head = ["what", "ours", "eager baseline", "times faster"]
    yield from _section("Stages", head, [[n, _ms(a), _ms(b), _text(_ratio(b, a))] for n, a, b in timed])
    pairs = [
        [f"{section}: {name}", _ms(median(p["ours_s"])), _ms(median(p["theirs_s"])), _text(p["ratio"])]
        for section in ("transformers", "diffusers")
        for name, p in (pick(sections, section, "pairs") or {}).items()
    ]
    yield from _section("Peers, A B A B", ["work", "ours", "peer", "times faster"], pairs)
    if stages := pick(sections, "request", "stages_s"):
        found = sections["request"]
        yield "Whole request: " + ", ".join(f"{k} {v:.3g} s" for k, v in stages.items()) + "."
        yield (
            f"Peak memory {_gb(found['peak_bytes'])} allocated, {_gb(found['reserved_bytes'])} reserved; "
            f"planned {_gb(found['planned_bytes'])}, of which weights {_gb(found['weight_bytes'])}."
        )
        yield ""


def _kernels(sections: Sections) -> Iterator[str]:
    rows = []
    for case in pick(sections, "kernels", "cases") or ():
        times = {k: _text(v, scale=1e3) for k, v in case.get("seconds", {}).items()}
        share = case.get("of_matmul") or case.get("of_copy")
        error = [_text(case.get(key)) for key in ("error", "bound", "baseline_error")]
        others = ", ".join(f"{k} {v}" for k, v in times.items() if k != "ours")
        figures = [times.get("ours", "–"), f"{share:.0%}" if share else "–", others or "–", case.get("note", "")]
        told = case.get("failed") or f"{error[0]} ({error[1]}; {error[2]})"
        rows.append([case["name"], told, _yes(case["right"]), *figures])
    head = ["kernel", "error (bound; baseline)", "right", "ours ms", "of its ceiling", "others ms", "note"]
    yield from _section("Kernels", head, rows)


def _budgets(sections: Sections) -> Iterator[str]:
    rows = [
        [name.removeprefix("budget "), _gb(s["peak_bytes"]), _gb(s["reserved_bytes"]), _yes(s["under"]),
         _text(s["total_s"], " s"), s["precision"], ", ".join(s["resident"]) or "nothing"]
        for name, s in sections.items() if name.startswith("budget ") and "total_s" in s
    ]  # fmt: skip
    head = ["budget", "peak allocated", "reserved", "under it", "whole request", "kept as", "stays loaded"]
    yield from _section("Budgets", head, rows)


def their_token(sections: Sections) -> float | None:
    """Seconds of a token of eager transformers."""
    found = pick(sections, "transformers", "pairs", "decoded token", "theirs_s")
    return median(found) if found else None


def eager_request(sections: Sections) -> float | None:
    """The request as the baselines would run it: their step and their token instead of ours, our other stages."""
    side, theirs = pick(sections, "request", "side"), their_token(sections)
    step, ours = pick(sections, f"eager {side}", "step_s"), pick(sections, f"ours {side}", "step_s")
    mine, stages = pick(sections, "decoding", "token_s"), pick(sections, "request", "stages_s")
    if not (step and ours and theirs and mine and stages):
        return None
    rest = sum(v for k, v in stages.items() if k not in ("language", "denoiser"))
    return float(rest + stages["denoiser"] * step / ours + stages["language"] * theirs / mine)


def _targets(data: Mapping[str, Any]) -> Iterator[str]:
    sections, here = data["sections"], data["preset"] == "full" and "H200" in str(data["machine"]["gpu"])
    token, total = pick(sections, "decoding", "token_s"), pick(sections, "request", "total_s")
    found = {
        "step": pick(sections, "ours 1024", "step_s"),
        "step fp8": pick(sections, "decoder=fp8", "step_s"),
        "token": token,
        "token int4": _ratio(token, pick(sections, "language=int4,head=int8wo", "token_s")),
        "request": total,
        "faster": _ratio(eager_request(sections), total),
    }
    rows = []
    for key, (name, wanted, unit) in TARGETS.items():
        value, more = found[key] if here else None, unit == "times"
        met = value is not None and (value >= wanted if more else value <= wanted)
        missed = "" if met or value is None else f", missed by {abs(value / wanted - 1):.0%}"
        text = f"{value:.3g} {unit}{missed}" if value is not None else "not yet measured"
        rows.append([name, f"{'≥' if more else '≤'} {wanted} {unit}", text])
    yield from _section("Targets (H200, full size)", ["target", "wanted", "measured"], rows)
