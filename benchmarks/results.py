"""`python -m benchmarks check RESULT.json`: whether a result file is complete, before you send it to anyone.

Here every result is written, whole or not at all, and read, with a clear error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.errors import BadRequestError, MissingExtraError
from mindomni_rt.memory.layers import Workload
from mindomni_rt.outputs import write_atomic as write_atomic
from mindomni_rt.outputs import write_json as write_json

from .schema import FORMAT, problems

FOLDER = Path(__file__).with_name("results")


def write_result(out: Path, data: Any, text: str, plot: Callable[[Path], None] | None = None) -> None:
    """The result at `out`, its report beside it as .md and its plot as .png (where matplotlib is installed)."""
    write_json(out, data)
    write_atomic(out.with_suffix(".md"), text.rstrip("\n") + "\n")
    try:
        if plot:
            plot(out.with_suffix(".png"))
    except MissingExtraError as error:
        sys.stderr.write(f"no picture: {error}\n")


def check_out(path: Path | None) -> None:
    """Raises BadRequestError unless --out, where it is given, ends in .json."""
    if path and path.suffix != ".json":
        raise BadRequestError(f"--out {path}: expected a name that ends in .json")


def read_json(path: Path) -> Any:
    """A JSON file, or BadRequestError naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadRequestError(f"no file at {path}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BadRequestError(f"{path} is not readable JSON: {error}") from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `check`."""
    parser.add_argument("result", type=Path, help="a .json file that a benchmark wrote")


def run(options: argparse.Namespace) -> int:
    """Prints what is wrong, one line each; 1 if anything is."""
    found = problems(read_json(options.result))
    sys.stdout.write("".join(f"{line}\n" for line in found) or f"{options.result}: a complete result\n")
    return int(bool(found))


def read_checked(path: Path, kind: str) -> dict[str, Any]:
    """A result of a kind, or BadRequestError that names the file and what is wrong with it."""
    data = read_json(path)
    if not isinstance(data, dict) or data.get("kind") != kind:
        raise BadRequestError(f"{path}: not a {kind} result (expected kind {kind!r})")
    if data.get("format") != FORMAT:
        raise BadRequestError(f"{path}: result format {data.get('format')}; this version reads {FORMAT}")
    if found := problems(data):
        raise BadRequestError(f"{path}: {'; '.join(found[:12])}")
    return data


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells that a row lacks at its end are dashes."""
    lines = [head, ["---"] * len(head), *([*row, *["-"] * (len(head) - len(row))] for row in rows)]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


@dataclass(frozen=True)
class Result:
    """A latency result: seconds by stage of every run, and all that was recorded with them."""

    path: Path
    data: dict[str, Any]

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.data["model"]["config"])

    @property
    def workload(self) -> Workload:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.data["workload"].items()}
        return Workload(**values)

    @property
    def machine(self) -> str:
        machine = self.data["machine"]
        return str(machine.get("gpu") or machine.get("cpu") or "unknown")

    def samples(self, metric: str) -> list[float]:
        """Seconds of each run for a stage or "total"; empty where it did not run."""
        return [float(run[metric]) for run in self.data["runs"] if metric in run]

    def median(self, metric: str) -> float:
        values = self.samples(metric)
        return median(values) if values else 0.0


def read_result(path: Path) -> Result:
    """A latency result, or BadRequestError that says what is wrong with it."""
    return Result(path, read_checked(path, "latency"))


def all_results(folder: Path = FOLDER) -> Iterator[Result]:
    """Latency results of a folder, oldest name first; other kinds are passed over, and so is a missing folder."""
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if isinstance(data, dict) and data.get("kind") == "latency":
            yield read_result(path)
