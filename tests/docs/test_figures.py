"""Figures in the documentation equal the committed result that stands beside them, or what the printed command gives.

README's own table and the full-size runs on a CPU have no committed result: their paragraphs say so.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from mindomni_rt.benchmarks.cli import main as benchmarks
from mindomni_rt.checkpoint.config import published
from mindomni_rt.devices.table import RESERVE
from mindomni_rt.errors import OutOfMemoryError
from mindomni_rt.memory.footprint import parameters
from mindomni_rt.memory.layers import BUDGETED
from mindomni_rt.memory.planner import gigabytes, parse_bytes, plan
from mindomni_rt.memory.precision import parse_precision
from mindomni_rt.training.cli import main as training
from mindomni_rt.training.evaluation.plots import arm_label

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: str

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @property
    def prose(self) -> str:
        """In one line."""
        return " ".join(self.text.split())

    def table(self, *head: str) -> list[Row]:
        """The rows of the table whose heading begins with these cells."""
        (found,) = (rows for rows in tables(self.text) if tuple(rows[0])[: len(head)] == head)
        return found


def tables(text: str) -> Iterator[list[Row]]:
    """Rows of each table, by the cells of its heading."""
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in block.splitlines()]
        yield [dict(zip(head, row, strict=True)) for row in rows]


def stored(name: str) -> Any:
    return json.loads((ROOT / name).read_text(encoding="utf-8"))


def _rounded(shown: str, value: float) -> bool:
    """Whether a number is the value at the precision that it shows, whichever way a half was rounded."""
    return abs(float(shown) - value) <= 0.5 * 10 ** -len(shown.partition(".")[2]) + 1e-9


def test_tables_are_read() -> None:
    text = "a\n\n| x | y |\n| --- | --- |\n| 1 | 2 |\n| 3 | |\n\nb | c\n\n| z |\n| --- |\n| 4 |\n"
    assert list(tables(text)) == [[{"x": "1", "y": "2"}, {"x": "3", "y": ""}], [{"z": "4"}]]


def _full_size_latency() -> Iterator[tuple[str, str]]:
    page = "docs/benchmarks.md"
    names = ("2026-11-28-cpu-latency-bf16", "2026-11-28-cpu-latency-int4")
    exact, rounded = ({row["stage"]: row for row in Page(f"benchmarks/results/{n}.md").table("stage")} for n in names)
    for stage in ("language", "prefix", "denoising step", "vae", "total"):
        cells = (exact[stage]["p50 s"], exact[stage]["floor s"], rounded[stage]["p50 s"])
        yield page, f"| {stage} | {' | '.join(f'{float(cell):.1f}' for cell in cells)} |"
    both = (f"{float(rows['total']['p50 s']):.0f} s" for rows in (exact, rounded))
    yield "README.md", "256x256: {} in bfloat16, {} from an int4 bundle".format(*both)
    data = stored(f"benchmarks/results/{names[0]}.json")
    seconds = mean((run["language"] - run["first_token"]) / 11 for run in data["runs"])
    config = published().language
    read = 2 * (parameters(published())["language"].linear + config.vocab_size * config.stack.hidden_size)
    share = read / seconds / 1e9 / data["ceilings"]["copy_gbps"]
    yield (
        page,
        f"takes {seconds:.2f} s, which reads {read / 1e9:.1f} GB of weights at {100 * share:.0f} % of that run's",
    )
    start = data["cold_start"][2]
    yield (
        page,
        f"is loaded after {start['load']:.1f} s, where reading the language model alone takes {start['read']:.1f} s",
    )
    yield page, f"first token comes after {start['first_token']:.0f} s, because a prompt of 254"
    _, second, disk = stored("benchmarks/results/2026-11-28-cpu-cold-int4.json")["cold_start"]
    begun = f"{disk['first_token_begun']:.1f}"
    yield page, f"takes {disk['read']:.1f} s; from the disk work on the first token begins after {begun} s"
    yield page, f"from memory after {second['first_token_begun']:.1f} s"
    yield page, f"first token comes {disk['first_token'] - disk['first_token_begun']:.0f} s later"
    assert max(second["first_token_begun"], disk["first_token_begun"]) <= 1.5 * disk["read"]


@pytest.mark.parametrize(
    ("page", "head", "result"),
    [
        ("docs/benchmarks.md", ("stage", "p50 s"), "2026-11-25-cpu-latency.md"),
        ("docs/benchmarks.md", ("peer", "work"), "2026-11-25-cpu-peers.md"),
        ("README.md", ("peer", "work"), "2026-11-28-cpu-peers-bf16.md"),
        ("README.md", ("peer", "relative error"), "2026-11-28-cpu-peers-rounded.md"),
        ("docs/kernels.md", ("option", "PSNR dB"), "2026-11-28-lossy.md"),
    ],
)
def test_rows_are_those_of_the_result_beside_them(page: str, head: tuple[str, ...], result: str) -> None:
    assert f"benchmarks/results/{result}" in Page(page).text
    rows = Page(page).table(*head)
    source = [{name: row[name] for name in rows[0]} for row in Page(f"benchmarks/results/{result}").table(head[0])]
    assert all(row in source for row in rows), [row for row in rows if row not in source]


def test_lossy_options_with_precisions() -> None:
    found = stored("benchmarks/results/2026-11-28-lossy-precisions.json")["options"]
    columns = {
        "25 steps": "25 steps",
        "and guidance 0:0.6": "25 steps, interval 0:0.6",
        "and step cache 0.1 too": "25 steps, interval 0:0.6, cache 0.1",
    }
    for row in Page("docs/kernels.md").table("precision", "25 steps"):
        precision = row["precision"].split()[0]
        for column, arm in columns.items():
            cell, figures = row[column], found.get(f"{precision}, {arm}")
            if figures is None:
                assert cell == ""
                continue
            short = f"{figures['psnr']:.1f} dB, {figures['passes']:.2f}"
            assert cell in (short, f"{short} of the passes"), (row, figures)
            assert (figures["right"], figures["n"]) == (320, 320)
    for row in Page("docs/kernels.md").table("precision", "PSNR dB"):
        figures = found[row["precision"]]
        low, high = (f"{100 * end:.1f}" for end in figures["interval"])
        assert row["PSNR dB"] == f"{figures['psnr']:.1f}"
        assert row["right (95 % interval)"] == f"{100 * figures['share']:.1f} % ({low} to {high})"


def test_engine_builds() -> None:
    columns = {
        "trace s": ("export_seconds", 1), "trace GB": ("export_peak", 1e9), "build s": ("build_seconds", 1),
        "build GB": ("build_peak", 1e9), "engine GB": ("engine_bytes", 1e9),
    }  # fmt: skip
    record = stored("benchmarks/results/2026-11-24-engine-builds.json")
    graphs = [graph for run in record["runs"] for graph in run["graphs"]]
    for row in Page("docs/export.md").table("graph", "layers", "SM"):
        wanted = (row["graph"], int(row["layers"].split()[0]), f"sm_{row['SM']}")
        (graph,) = (g for g in graphs if (g["graph"], g["layers"], g["target"]) == wanted)
        for column, (name, unit) in columns.items():
            assert _rounded(row[column], graph[name] / unit), (row, column, graph[name])


def test_registers_of_the_attention() -> None:
    """Of the launch with a time token and one prefix an image; SM 75 compiles to other products and is not recorded."""
    sheet = stored("benchmarks/results/kernel-resources.json")
    kernel = re.compile(
        r"segment_attention\.segment_kernel\(share=1,.*HAS_TIME=True,.*BM=(\d+),BN=(\d+),[^]]*\] w(\d+) s(\d+)$"
    )
    before: Row = {}
    for row in Page("docs/kernels.md").table("SM", "tile"):
        if row["tile"].startswith("as "):
            row = {**row, **{name: before[name] for name in ("tile", "warps", "stages")}}
        before = row
        if row["SM"] == "75":
            continue
        launches = sheet[f"sm_{row['SM']}"].items()
        ((match, used),) = ((found, used) for name, used in launches if (found := kernel.search(name)))
        assert row["tile"] == f"{match[1]} x {match[2]}" and (row["warps"], row["stages"]) == (match[3], match[4])
        sizes = (f"{used['shared'] / 1024:.0f}", str(used["registers"]), str(used["spilled"]))
        assert (row["shared KiB"], row["registers"], row["spilled bytes"]) == sizes, row["SM"]


def test_what_budgets_move() -> None:
    """Each row is the planner's; pairs without a row keep everything or do not fit."""
    seen = {}
    for row in Page("docs/kernels.md").table("budget", "precision", "moved a request"):
        seen[row["budget"], row["precision"]] = row["moved a request"], row["hidden"]
    for budget, kind in product(("8 GB", "12 GB", "16 GB", "24 GB"), ("bfloat16", "fp8", "int8", "int4")):
        precision = parse_precision(kind, "bfloat16", "bfloat16")
        try:
            found = plan(published(), BUDGETED, precision=precision, budget=parse_bytes(budget), reserve=RESERVE[False])
        except OutOfMemoryError:
            assert (budget, kind) not in seen
            continue
        wanted = gigabytes(found.moved), gigabytes(found.hidden) if found.hidden else "0"
        assert seen.get((budget, kind), ("0.00 GB", "0")) == wanted, (budget, kind)


Roofline = Callable[[int], dict[tuple[str, str], Row]]


@pytest.fixture(scope="module")
def roofline() -> Roofline:
    """What `roofline --steps N` prints, by device and precision."""
    kept: dict[int, dict[tuple[str, str], Row]] = {}

    def rows(steps: int) -> dict[tuple[str, str], Row]:
        if steps not in kept:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert benchmarks(["roofline", "--steps", str(steps)]) == 0
            kept[steps] = {(row["device"], row["precision"]): row for row in next(tables(out.getvalue()))}
        return kept[steps]

    return rows


def test_roofline(roofline: Roofline) -> None:
    for row in Page("docs/benchmarks.md").table("device", "precision", "floor s"):
        found = roofline(50)[row["device"], row["precision"]]
        assert (row["floor s"], row["prediction s"]) == (found["total floor (s)"], found["total prediction (s)"])


def test_a_thousand_gpus(roofline: Roofline) -> None:
    page = Page("docs/thousand-gpus.md")
    for row in page.table("GPU", "precision", "steps", "predicted s an image"):
        found = roofline(int(row["steps"]))[row["GPU"], row["precision"]]
        seconds = float(found["total prediction (s)"])
        assert row["predicted s an image"] == f"{seconds:.1f}"
        assert row["of that thinking (floor)"] == f"{float(found['language floor (s)']):.1f}"
        rate = 800 / seconds
        assert row["images/s, 1,000 GPUs"] == f"{rate:.0f}" and row["a day, millions"] == f"{rate * 0.0864:.1f}"
    prices = {"H100 SXM": 2.50, "L40S": 1.00, "RTX 4090": 0.40}
    for row in page.table("GPU", "precision", "steps", "USD per 1,000 images (predicted)"):
        seconds = float(roofline(int(row["steps"]))[row["GPU"], row["precision"]]["total prediction (s)"])
        assert float(row["USD per 1,000 images (predicted)"]) == pytest.approx(
            seconds * 1000 / 3600 / 0.8 * prices[row["GPU"]], abs=0.0051
        )


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rgpo"])
def test_memory_of_full_size_training(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = Page("docs/training.md").table("configuration", "trains")
    (row,) = (r for r in rows if f"`{stage}-full`" in r["configuration"])
    assert training(["dry-run", "--config", str(ROOT / f"training/configs/{stage}-full.toml")]) == 0
    shown = capsys.readouterr().out
    (of_eight,) = (line.split() for line in shown.splitlines() if line.split()[:1] == ["8"])
    assert of_eight[-1] == row["predicted GiB on each of 8 GPUs"]
    assert f"{re.findall(r'([0-9.]+ M) parameters train', shown)[0]} (" in row["trains"]


def _shares(rows: list[dict[str, Any]], column: str) -> tuple[float, float, float]:
    values = [100 * row[column] for row in rows]
    return mean(values), min(values), max(values)


def _is(cell: str, shares: tuple[float, float, float]) -> bool:
    """Whether "99.5 (99 to 100)" is this mean and range, at the precision that it shows; "100" has no range."""
    numbers = re.findall(r"[\d.]+", cell)
    wanted = shares if len(numbers) == 3 else shares[:1]
    return all(_rounded(number, share) for number, share in zip(numbers, wanted, strict=True))


STAGE_3 = {
    "stage 1 alone": ("stages", "1"),
    "stages 1 + 2": ("stages", "1+2"),
    "stages 1 + 3": ("stages", "1+3"),
    "stages 1 + 2 + 3, the base: both rewards, both KLs, G = 8": ("stages", "1+2+3"),
    "image KL 0": ("image KL", "0"),
    "image KL, a tenth": ("image KL", "base / 10"),
    "velocity error, weight 10": ("image KL", "velocity error"),
    "text KL 0": ("text KL", "0"),
    "text KL, ten times": ("text KL", "10 x base"),
    "format reward only": ("rewards", "format"),
    "consistency reward only": ("rewards", "consistency"),
    "G = 2, 32 prompts a step": ("group size", "G = 2, 32 prompts"),
    "G = 4, 16 prompts a step": ("group size", "G = 4, 16 prompts"),
}


def test_ablations_of_stage_3() -> None:
    results = stored("docs/ablations/stage-3.json")["results"]
    rows = Page("docs/training.md").table("arm", "text", "image")
    assert [row["arm"] for row in rows] == list(STAGE_3)
    for row in rows:
        study, arm = STAGE_3[row["arm"]]
        found = [r for r in results[study] if r["arm"] == arm]
        for column in ("text", "image", "direct", "captions"):
            wanted = _shares(found, column.rstrip("s"))
            assert _is(row[column], wanted), (row["arm"], column, wanted)


@pytest.mark.parametrize("study", ["connector", "distillation"])
def test_ablations_of_stage_1(study: str) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in stored("docs/ablations/stage-1.json")["results"][study]:
        found.setdefault(arm_label(row), []).append(row)
    for row in Page("docs/training.md").table(study, "100 steps"):
        for column in list(row)[1:]:
            rows = found.pop(f"{row[study]}, {column}", None)
            assert (rows is None) == (row[column] == "")
            assert rows is None or _is(row[column], _shares(rows, "caption")), (row, column, _shares(rows, "caption"))
    assert not found


def test_the_small_models_card() -> None:
    record = stored("assets/shapes-world/evaluation.json")
    found = [rows for rows in tables(Page("assets/shapes-world/README.md").text) if "suite" in rows[0]]
    for rows, kept in zip(found, record.values(), strict=True):
        for row in rows:
            for name, score in kept["scores"][row["suite"]].items():
                if name not in row:  # what is no share, such as the count of tokens
                    continue
                low, high = (100 * end for end in score["interval"])
                assert row[name] == f"{100 * score['share']:.1f} % ({low:.1f} to {high:.1f})", (row["suite"], name)


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['share']:.1f}".removesuffix(".0")


def _sentences() -> Iterator[tuple[str, str]]:
    """Pages, and what stands in them, made of the results."""
    scores = stored("assets/shapes-world/evaluation.json")
    image, before = (_percent(scores[stage]["scores"]["riddles"]["image"]) for stage in ("rgpo", "sft"))
    direct = f"{100 * scores['rgpo']['scores']['direct']['image']['share']:.0f}"
    yield "docs/tutorials/first-image.md", f"right {direct} % of the time instead of {image} %"
    yield "docs/verification.md", f"rise from {float(before):.0f} % to {image} % ({direct} % without thinking"
    load = stored("benchmarks/results/2026-11-28-load.json")
    outcomes = load["outcomes"]
    yield "docs/benchmarks.md", f"{load['requests']:,} requests, {load['clients']} at once"
    said = f"{outcomes['answered']:,} answered and right, {outcomes['left']} left early, none lost or wrong"
    yield "docs/benchmarks.md", said
    yield "docs/benchmarks.md", f"{outcomes['refused']} refusals"
    yield "docs/benchmarks.md", f"{load['rate']:.1f} requests a second"
    cold = Page("benchmarks/results/2026-11-25-cpu-latency.md").table("figure")
    (first, again) = (re.findall(r"[\d.]+", row["value"]) for row in cold if row["figure"].startswith("cold start"))
    yield (
        "docs/benchmarks.md",
        f"loaded after {float(first[0]):.1f} s, first image after {float(first[1]):.1f} s; "
        f"the second time {float(again[0]):.1f} and {float(again[1]):.1f} s",
    )
    builds = stored("benchmarks/results/2026-11-28-full-size-builds.json")["runs"]
    yield "docs/export.md", f"took {builds[0]['seconds']:.0f} s on two cores"  # from an empty cache
    (engines,) = (build for build in builds if build["target"] == "sm_89")
    own, resident = (f"{engines[key] / 1e9:.2f} GB" for key in ("own_memory_peak", "resident_peak"))
    yield "docs/export.md", f"for `sm_89` took {engines['seconds']:.0f} s; the process's own memory peaked at {own}"
    yield "docs/limits.md", f"take {own} of own memory, {float(resident[:-3]):.1f} GB resident"
    yield from _full_size_latency()
    lossy = stored("benchmarks/results/2026-11-28-lossy.json")
    assert lossy["options"]["exact"]["right"] == 1.0
    yield "docs/kernels.md", f"({lossy['n']} riddles, guidance {lossy['guidance']:g}"


SENTENCES = list(_sentences())


@pytest.mark.parametrize(("page", "words"), SENTENCES, ids=[f"{Path(p).stem}: {w[:40]}" for p, w in SENTENCES])
def test_prose_says_what_was_measured(page: str, words: str) -> None:
    assert words in Page(page).prose


def test_every_result_that_is_named_exists() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("assets/*/*.md")]:
        for name in re.findall(r"results/([\w.-]+\.(?:json|md|png))", path.read_text(encoding="utf-8")):
            assert (RESULTS / name).exists(), f"{path.name}: {name}"
