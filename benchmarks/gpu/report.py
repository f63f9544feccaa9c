"""The Markdown report of a GPU run: what was measured, beside its ceiling, its baseline and its target."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from statistics import median
from typing import Any

from ..results import table

Sections = Mapping[str, Any]
_UNITS = {"matmul": "TFLOP/s", "fp8": "TFLOP/s", "int8": "TOP/s", "copy": "GB/s"}
_KERNELS = ("kernel", "error (bound; baseline)", "right", "ours ms", "of its ceiling", "others ms", "note")
_BUDGETS = ("budget", "peak allocated", "reserved", "under it", "whole request", "kept as", "stays loaded")
_INT8, _INT4 = "language=int8wo,head=int8wo", "language=int4,head=int8wo"


def markdown(data: Mapping[str, Any]) -> str:
    """The whole report; of a part that did not run, nothing or dashes."""
    machine, sections = data["machine"], data["sections"]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
    reached = pick(sections, "ceilings") or {}
    lines = [
        f"# Speed, preset {data['preset']}: {machine['gpu'] or machine.get('cpu')}",
        "",
        f"{data['date']}, commit {data.get('commit')}, {versions}, {data['wall_s']} s in all. Random weights.",
        "",
        "Ceilings of this run: " + ", ".join(f"{k} {_text(reached.get(k))} {unit}" for k, unit in _UNITS.items()),
        "",
    ]
    peers = [
        (f"{peer}: {name}", *(_ms(median(pair[f"{side}_s"])) for side in ("ours", "theirs")), _text(pair["ratio"]))
        for peer in ("transformers", "diffusers")
        for name, pair in (pick(sections, peer, "pairs") or {}).items()
    ]
    whys = ((name, [found.get(why) for why in ("failed", "skipped", "missing")]) for name, found in sections.items())
    trouble = [(name, next(filter(None, why))) for name, why in whys if any(why)]
    here = data["preset"] == "full" and "H200" in str(machine["gpu"])
    for title, head, rows in (
        ("Distance from float32", ("what", "ours", "baseline", "bound", "right"), _correctness(sections)),
        ("Stages", ("what", "ours", "eager baseline", "times faster"), _stages(sections)),
        ("Peers, A B A B", ("work", "ours", "peer", "times faster"), peers),
        ("Whole request", ("figure", "value"), _request(sections)),
        ("Kernels", _KERNELS, _kernels(sections)),
        ("Budgets", _BUDGETS, _budgets(sections)),
        ("Targets (H200, full size)", ("target", "wanted", "measured"), _targets(sections, here)),
        ("Not measured", ("part", "why"), trouble),
    ):
        if cells := list(rows):
            lines += [f"## {title}", "", table(head, cells), ""]
    return "\n".join(lines)


def pick(data: Mapping[str, Any], *path: str) -> Any:
    """A value deep within nested objects, None where one is missing."""
    whole: Any = data
    return reduce(lambda found, key: found.get(key) if isinstance(found, Mapping) else None, path, whole)


def _text(value: Any, unit: str = "", scale: float = 1) -> str:
    if value is None:
        return "–"
    return f"{scale * value:.3g}{unit}" if isinstance(value, (int, float)) else f"{value}"


_ms = partial(_text, unit=" ms", scale=1e3)


def _gb(count: Any) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"


_YES = {True: "yes", False: "NO"}


def _ratio(value: float | None, base: float | None) -> float | None:
    """value / base where both are known."""
    return value / base if value and base else None


Rows = Iterator[Sequence[Any]]


def _correctness(sections: Sections) -> Rows:
    """Everything that was judged by its distance from float32."""
    for name, found in sections.items():
        if isinstance(found, Mapping) and {"right", "agrees"} & set(found):
            figures = (_text(found.get(key)) for key in ("error", "baseline_error", "bound"))
            yield name, *figures, _YES[bool(found.get("right", found.get("agrees")))]


def _stages(sections: Sections) -> Rows:
    sides = [name.removeprefix("ours ") for name in sections if name.startswith("ours ")]
    first = sides[0] if sides else ""
    eager, theirs = pick(sections, f"eager {first}", "step_s"), their_token(sections)
    for name, section, key, other in (
        *((f"guided step {s}²", f"ours {s}", "step_s", pick(sections, f"eager {s}", "step_s")) for s in sides),
        *((f"guided step {first}², {kind}", f"decoder={kind}", "step_s", eager) for kind in ("fp8", "int8")),
        ("token", "decoding", "token_s", theirs),
        ("token, int8 weights", _INT8, "token_s", theirs),
        ("token, int4 weights", _INT4, "token_s", theirs),
        ("whole request", "request", "total_s", eager_request(sections)),
    ):
        if ours := pick(sections, section, key):
            yield name, _ms(ours), _ms(other), _text(_ratio(other, ours))


def _request(sections: Sections) -> Rows:
    found = pick(sections, "request") or {}
    yield from ((stage, f"{seconds:.3g} s") for stage, seconds in found.get("stages_s", {}).items())
    for kind in ("peak", "reserved", "planned", "weight"):
        if f"{kind}_bytes" in found:
            yield f"{kind} memory", _gb(found[f"{kind}_bytes"])


def _kernels(sections: Sections) -> Rows:
    for case in pick(sections, "kernels", "cases") or ():
        times = {k: _text(v, scale=1e3) for k, v in case.get("seconds", {}).items()}
        ours, share = times.pop("ours", "–"), case.get("of_matmul") or case.get("of_copy")
        error, bound, baseline = (_text(case.get(key)) for key in ("error", "bound", "baseline_error"))
        told = case.get("failed") or f"{error} ({bound}; {baseline})"
        others = ", ".join(f"{k} {v}" for k, v in times.items()) or "–"
        figures = ours, f"{share:.0%}" if share else "–", others, case.get("note", "")
        yield case["name"], told, _YES[case["right"]], *figures


def _budgets(sections: Sections) -> Rows:
    for name, found in sections.items():
        if name.startswith("budget ") and "total_s" in found:
            peaks = _gb(found["peak_bytes"]), _gb(found["reserved_bytes"]), _YES[found["under"]]
            kept = found["precision"], ", ".join(found["resident"]) or "nothing"
            yield name.removeprefix("budget "), *peaks, _text(found["total_s"], " s"), *kept


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


# Of an H200 at full size (bf16 ceilings there about 790 TFLOP/s and 4.3 TB/s); other machines have none.
_TOKEN, _TOTAL = ("decoding", "token_s"), ("request", "total_s")
TARGETS: tuple[tuple[str, float, str, Callable[[Sections], float | None]], ...] = (
    ("guided 1024² step, bf16", 0.118, "s", lambda s: pick(s, "ours 1024", "step_s")),
    ("guided 1024² step, fp8 products", 0.075, "s", lambda s: pick(s, "decoder=fp8", "step_s")),
    ("token, bf16", 0.0037, "s", lambda s: pick(s, *_TOKEN)),
    ("int4 against bf16 decoding", 2.5, "times", lambda s: _ratio(pick(s, *_TOKEN), pick(s, _INT4, "token_s"))),
    ("whole 1024² image, 300 thinking tokens, bf16", 8.0, "s", lambda s: pick(s, *_TOTAL)),
    ("whole request against eager baselines", 4.0, "times", lambda s: _ratio(eager_request(s), pick(s, *_TOTAL))),
)


def _targets(sections: Sections, here: bool) -> Rows:
    for name, wanted, unit, find in TARGETS:
        value, more = find(sections) if here else None, unit == "times"
        met = value is not None and (value >= wanted if more else value <= wanted)
        missed = "" if met or value is None else f", missed by {abs(value / wanted - 1):.0%}"
        text = f"{value:.3g} {unit}{missed}" if value is not None else "not yet measured"
        yield name, f"{'≥' if more else '≤'} {wanted} {unit}", text
