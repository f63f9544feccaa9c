"""Result files: written whole or not at all, read with a clear error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.errors import BadRequestError, MindOmniError, MissingExtraError
from mindomni_rt.files import replace_file
from mindomni_rt.memory.layers import Workload

from .schema import FORMAT, problems

FOLDER = Path(__file__).with_name("results")


class WriteError(MindOmniError, OSError):
    """A result that could not be stored: full disk, missing rights."""


def write_atomic(path: Path, data: bytes | str) -> None:
    """Stores data at path, replacing what was there only when all of it is on disk. Raises WriteError."""
    data = data.encode() if isinstance(data, str) else data
    try:
        if path.exists() and not path.is_file():  # a device or pipe the user named: nothing to replace
            with path.open("wb") as file:
                file.write(data)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        raise WriteError(
            f"{path} could not be written: {error.strerror or error}; free space or choose --out"
        ) from error


def json_text(data: Any) -> str:
    """JSON with an indent of one."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, data: Any) -> None:
    """`json_text` at path, atomically."""
    write_atomic(path, json_text(data))


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
    def dtype(self) -> str:
        return str(self.data["model"]["dtype"])

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

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(key for run in self.data["runs"] for key in run))


def read_result(path: Path) -> Result:
    """A latency result, or BadRequestError that says what is wrong with it."""
    return Result(path, read_checked(path, "latency"))


def all_results(folder: Path = FOLDER) -> Iterator[Result]:
    """Latency results of a folder, oldest name first; other kinds are passed over, and so is a missing folder."""
    for path in sorted(folder.glob("*.json")):
        data = read_json(path)
        if isinstance(data, dict) and data.get("kind") == "latency":
            yield read_result(path)
