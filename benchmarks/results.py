"""`mindomni bench check RESULT.json`: whether a result file is complete, before you send it to anyone.

Here every result is written, whole or not at all, and read, with a clear error.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from mindomni_rt.checkpoint.config import ModelConfig
from mindomni_rt.checks import shown
from mindomni_rt.errors import BadCheckpointError, BadRequestError, MissingExtraError, StorageError
from mindomni_rt.files import try_file, why
from mindomni_rt.memory.layers import Workload
from mindomni_rt.outputs import read_json as read_json
from mindomni_rt.outputs import write_atomic as write_atomic
from mindomni_rt.outputs import write_json as write_json

from .shapes import KINDS, WHYS, Part, Shape

FOLDER = Path(__file__).with_name("results")
IN_CHECKOUT = (FOLDER.resolve().parents[1] / "pyproject.toml").is_file()
"""Whether FOLDER is the repository's, to which results are added; that of an installation is left as it is."""
FORMAT = 1


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
    """Raises BadRequestError unless --out, where it is given, ends in .json, and StorageError where no file can be."""
    check_file(path, ".json")


def check_file(path: Path | None, ending: str, option: str = "--out") -> None:
    """The same for another ending and option."""
    if path is None:
        return
    if path.suffix != ending:
        raise BadRequestError(f"{option} {path}: expected a name that ends in {ending}")
    try:
        if path.is_dir():
            raise BadRequestError(f"{option} {path}: is a folder, expected the name of a file")
        try_file(path)
    except OSError as error:
        raise StorageError(f"{option} {path}: cannot be written: {why(error)}") from error


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


def problems(data: Any) -> list[str]:
    """What is wrong with a result, one line each; empty for a good one. Only finite numbers are good."""
    if not isinstance(data, dict) or data.get("kind") not in KINDS:
        kind = data.get("kind") if isinstance(data, dict) else type(data).__name__
        return [f"kind {kind!r}: expected one of {', '.join(KINDS)}"]
    if data.get("format") != FORMAT:
        return [f"format {data.get('format')!r}: expected {FORMAT}"]
    return [*_faults(data, KINDS[data["kind"]], ""), *_not_finite(data, ""), *_not_a_model(data.get("model"))]


def _faults(value: Any, shape: Shape, where: str) -> Iterator[str]:
    name = where.rstrip(".")
    if isinstance(shape, Part):
        yield from _faults_of_part(value, shape, where)
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{name or 'the file'}: expected an object"
        elif any(isinstance(key, re.Pattern) for key in shape):
            yield from _faults_by_name(value, shape, where)
        else:
            yield from _faults_of_object(value, shape, where)
    elif isinstance(shape, list):
        if not isinstance(value, list) or not value:
            yield f"{name}: expected a list that is not empty"
            return
        for index, item in enumerate(value):
            yield from _faults(item, shape[0], f"{where}{index}.")
    elif isinstance(shape, re.Pattern):
        if not (isinstance(value, str) and shape.fullmatch(value)):
            yield f"{name}: expected text of the form {shape.pattern}, found {value!r:.40}"
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape is not bool):
        kinds = shape if isinstance(shape, tuple) else (shape,)
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        yield f"{name}: expected {names}, found {value!r:.40}"


def _faults_of_object(value: dict[Any, Any], shape: dict[Any, Shape], where: str) -> Iterator[str]:
    for key, inner in shape.items():
        if key is str:
            for name, item in value.items():
                yield from _faults(item, inner, f"{where}{name}.")
        elif key.removesuffix("?") in value:
            yield from _faults(value[key.removesuffix("?")], inner, f"{where}{key.removesuffix('?')}.")
        elif not key.endswith("?"):
            yield f"lacks {where}{key}"


def _faults_by_name(value: dict[Any, Any], shape: dict[re.Pattern[str], Shape], where: str) -> Iterator[str]:
    if not value:
        yield f"{where.rstrip('.')}: expected an object that is not empty"
    for name, item in value.items():
        inner = next((inner for pattern, inner in shape.items() if pattern.fullmatch(name)), None)
        if inner is None:
            yield f"{where}{name:.60}: no part of such a result"
        else:
            yield from _faults(item, inner, f"{where}{name}.")


def _faults_of_part(value: Any, shape: Part, where: str) -> Iterator[str]:
    why = [name for name in WHYS if isinstance(value, dict) and name in value]
    fields = {f"{key.removesuffix('?')}?": inner for key, inner in shape.fields.items()} if why else shape.fields
    yield from _faults(value, {**fields, **dict.fromkeys(why, str)}, where)


def _not_a_model(model: Any) -> Iterator[str]:
    """What is wrong with the configuration of the model that was measured."""
    if isinstance(model, dict) and isinstance(model.get("config"), dict):
        try:
            ModelConfig.from_dict(model["config"])
        except BadCheckpointError as error:
            yield str(error)


def _not_finite(value: Any, where: str) -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _not_finite(item, f"{where}{key}.")
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{where.rstrip('.')}: {value} is no finite number"
    elif isinstance(value, int) and abs(value) >= 2**63:
        yield f"{where.rstrip('.')}: {shown(value)} is too large"


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
        try:
            return ModelConfig.from_dict(self.data["model"]["config"])
        except BadCheckpointError as error:
            raise BadRequestError(f"{self.path}: {error}") from error

    @property
    def workload(self) -> Workload:
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in self.data["workload"].items()}
        try:
            return Workload(**values)
        except (TypeError, ValueError) as error:
            raise BadRequestError(f"{self.path}: workload: {error}") from error

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
