"""Every command of every program, called with each kind of mistake: exit code 2 and one line that names it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import PARITY

from mindomni_rt import cli
from mindomni_rt.benchmarks import cli as benchmarks
from mindomni_rt.demo import DEMO_MODELS
from mindomni_rt.export import cli as export
from mindomni_rt.options import HANDED_OVER, build_parser
from mindomni_rt.serving import cli as serving
from mindomni_rt.training import cli as training

NOT = "no/such/place"
Main = Callable[[list[str]], int]
# Per command: arguments that are whole but for a model, file or folder that does not exist.
MISSING: dict[str, tuple[Main, dict[str, list[str]]]] = {
    "mindomni": (
        cli.main,
        {
            "generate": ["a cat", "--model", NOT],
            "edit": ["photo.png", "redder", "--model", NOT],
            "understand": ["what?", "--model", NOT],
            "info": ["--model", NOT],
            "demo": ["--out", f"{NOT}\0/x.png"],
            "doctor": [],
            "random-checkpoint": ["/proc/none/x", "--layers", "1", "--quiet"],
        },
    ),
    "export": (
        export.main,
        {
            "build": [NOT, "--target", "cpu", "--out", "x"],
            "verify": [NOT],
            "inspect": [NOT],
            "plan": ["--device", "rtx4060", "--checkpoint", NOT],
            "rehearse": ["vae", "--target", "nowhere"],
            "products": ["--folder", NOT],
            "cache": [],
        },
    ),
    "benchmarks": (
        benchmarks.main,
        {
            "latency": [NOT],
            "compare": [NOT, NOT],
            "check": [NOT],
            "peers": ["--out", "/proc/none/x.json"],
            "counts": ["--out", "/proc/none/x.json"],
            "quality": ["shapes", NOT, "--out", "x"],
            "lossy": [NOT],
            "roofline": ["--results", NOT],
            "plan": ["--memory-budget", "much"],
            "load": [NOT, "--out", "x.txt"],
            "gpu": ["--only", "nothing"],
        },
    ),
    "serving": (
        serving.main,
        {
            "serve": ["--default", "x"],
            "ui": ["--default", "x"],
            "batch": [NOT, "--model", NOT, "--out", "x"],
        },
    ),
    "training": (
        training.main,
        {
            **{stage: ["--config", NOT] for stage in ("prior", "pretrain", "sft", "rgpo", "dry-run")},
            "gpu-step": ["--out", "/proc/none/x.json"],
            "new": ["x", "--vae", NOT],
            "evaluate": [NOT],
            "ablate": [NOT],
            "pack": [NOT, "x"],
            "plot": [NOT, "--out", "x.png"],
            "world": ["/proc/none"],
            "config-reference": ["--out", "/proc/none/x.md"],
        },
    ),
}


def commands() -> Iterator[tuple[str, str]]:
    for program, (_, known) in MISSING.items():
        yield from ((program, command) for command in known)


def run(program: str, arguments: list[str]) -> int:
    try:
        return MISSING[program][0](arguments)
    except SystemExit as end:
        return int(end.code or 0)


def one_line(code: int, capsys: pytest.CaptureFixture[str], *names: str) -> None:
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.count("\n") == 1 and error.startswith("error: ") and len(error) < 1000, error
    assert all(name in error for name in names), error


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize(("program", "command"), list(commands()))
def test_an_unknown_option(program: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    one_line(run(program, [command, *MISSING[program][1][command], "--no-such-option"]), capsys, "no-such-option")


@pytest.mark.parametrize(("program", "command"), [pair for pair in commands() if MISSING[pair[0]][1][pair[1]]])
def test_what_is_missing_is_named(
    program: str, command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one_line(run(program, [command, *MISSING[program][1][command]]), capsys)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".log"] == []  # a build leaves its log


@pytest.mark.parametrize("program", MISSING)
def test_an_unknown_command_and_none(program: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["no-such-command"]):
        one_line(run(program, arguments), capsys, "--help)")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--size", "big"], "size 'big'"),
        (["--size", "100x96"], "width = 100"),
        (["--steps", "many"], "--steps"),
        (["--steps", "0"], "num_inference_steps = 0"),
        (["--guidance", "-1"], "guidance_scale = -1"),
        (["--seed", "x"], "--seed"),
        (["--guidance-interval", "1"], "guidance interval '1'"),
        (["--out", "no/such/x.png"], "--out"),
        (["--out", "x.txt"], "--out"),
        (["--num-images", "0"], "num_images = 0"),
    ],
)
def test_wrong_values_are_found_before_the_model(
    arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one_line(run("mindomni", ["generate", "a cat", "--model", NOT, *arguments]), capsys, name)


def parsers() -> Iterator[argparse.ArgumentParser]:
    """Of every command, under the name that its help prints."""
    for parser in (build_parser(), export._parser(), training._parser()):
        choices = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        yield from (choice for name, choice in (choices or {}).items() if name not in HANDED_OVER)  # type: ignore[misc]
    for package, commands in (("benchmarks", benchmarks._COMMANDS), ("serving", serving._COMMANDS)):
        for name, (module, _) in commands.items():
            parser = argparse.ArgumentParser(prog=f"{package} {name}")
            where = module if module.startswith("mindomni_rt") else f"mindomni_rt.{package}.{module}"
            import_module(where).add_arguments(parser)
            yield parser


def test_every_argument_is_explained() -> None:
    silent = [(p.prog, a.dest) for p in parsers() for a in p._actions if not a.help]
    assert silent == []


def test_no_command_is_left_out() -> None:
    """A new command has to be added above."""
    choices = build_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(choices or ()) == {*MISSING["mindomni"][1], *HANDED_OVER}
    assert set(benchmarks._COMMANDS) == set(MISSING["benchmarks"][1])
    assert set(serving._COMMANDS) == set(MISSING["serving"][1])
    for program, parser in (("export", export._parser()), ("training", training._parser())):
        found = parser._subparsers._group_actions[0].choices  # type: ignore[union-attr]
        assert set(found or ()) == set(MISSING[program][1])
    for module, *_ in HANDED_OVER.values():
        assert import_module(module).main in {main for main, _ in MISSING.values()}


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a folder in which nobody can make a file")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("mindomni", ["demo", "--out", "/proc/x.png"]),
        ("export", ["build", str(PARITY), "--target", "cpu", "--out", "/proc/x"]),
        ("benchmarks", ["latency", str(PARITY), "--out", "/proc/x.json"]),
        ("benchmarks", ["counts", "--out", "/proc/x.json"]),
        ("benchmarks", ["roofline", "--plot", "/proc/x.png"]),
        ("training", ["evaluate", str(PARITY), "--out", "/proc/x.json"]),
        ("training", ["world", "/proc/x"]),
        ("training", ["config-reference", "--out", "/proc/x.md"]),
        ("export", ["build", str(PARITY), "--target", "cpu", "--out", "o", "--record", "/proc/x.json"]),
        ("export", ["rehearse", "vae", "--target", "sm_89", "--out", "/proc/x.json"]),
        ("export", ["products", "--out", "/proc/x.json"]),
        ("benchmarks", ["latency", str(PARITY), "--out", "/proc/x/new/x.json"]),
        ("benchmarks", ["peers", "--out", "/proc/x.json"]),
        ("benchmarks", ["quality", "shapes", str(PARITY), "--out", "/proc/x"]),
        ("benchmarks", ["gpu", "--device", "cpu", "--preset", "toy", "--out", "/proc/x"]),
        ("serving", ["batch", "prompts.jsonl", "--out", "/proc/x"]),
        ("training", ["prior", "--config", "shapes-prior", f"model={PARITY}", "out=/proc/x"]),
        ("training", ["ablate", "--out", "/proc/x"]),
        ("training", ["pack", str(PARITY), "/proc/x"]),
        ("training", ["plot", "--study", "no.json", "--out", "/proc/x"]),
    ],
)
def test_the_users_own_path_is_named(program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Not that of a temporary file beside it; and before any work."""
    Path("prompts.jsonl").write_text('{"prompt": "three yellow circles"}')
    code = run(program, arguments)
    shown, error = capsys.readouterr()
    assert not shown and code == 2 and error.count("\n") == 1 and "/proc/x" in error and "/proc/." not in error, error


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("training", ["dry-run", "--config", "sft-full", "--gpus"]),
        ("training", ["ablate", "--jobs"]),
        ("export", ["products", "--layers"]),
        ("export", ["products", "--rounds"]),
        ("export", ["rehearse", "vae", "--target", "sm_89", "--layers"]),
        ("export", ["plan", "--device", "rtx4060", "--memory-budget"]),
        (
            "export",
            ["build", str(PARITY), "--target", "cpu", "--precision", "int8", "--out", "o", "--calibration-size"],
        ),
        ("benchmarks", ["plan", "--memory-budget"]),
        ("benchmarks", ["quality", "shapes", str(PARITY), "--out", "q", "--shard"]),
        ("serving", ["serve", "--max-batch"]),
        ("mindomni", ["generate", "x", "--model", str(PARITY), "--memory-budget"]),
    ],
)
def test_numbers_that_attack(program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("0", "1" * 5000, str(10**30), "nan"):
        one_line(run(program, [*arguments, number]), capsys)
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("mindomni", ["generate", "x", "--model", str(PARITY), "--device"]),
        ("mindomni", ["generate", "x", "--model", str(DEMO_MODELS[0][0]), "--device"]),
        ("export", ["verify", str(DEMO_MODELS[0][0]), "--device"]),
        ("benchmarks", ["latency", str(PARITY), "--device"]),
        ("benchmarks", ["quality", "shapes", str(PARITY), "--out", "q", "--device"]),
        ("benchmarks", ["peers", "--device"]),
        ("benchmarks", ["gpu", "--device"]),
        ("training", ["evaluate", str(PARITY), "--device"]),
    ],
)
def test_devices_that_are_none(program: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for device in ("cpu:x", "CPU", "tpu", "cuda:" + "9" * 5000, ""):
        one_line(run(program, [*arguments, device]), capsys, "device")


def test_a_level_of_logging_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGLEVEL", "loud")
    assert training.main(["config-reference"]) == 0


def test_a_record_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    """Found before the build whose figures would go there, and left as it is."""
    for text in ("[]", "{}", '{"runs": 3}', "{", "[" * 100_000):
        Path("mine.json").write_text(text)
        build = ["build", str(PARITY), "--target", "cpu", "--out", "o", "--record", "mine.json"]
        one_line(run("export", build), capsys, "mine.json")
        one_line(run("export", ["rehearse", "vae", "--target", "sm_89", "--out", "mine.json"]), capsys, "mine.json")
        assert Path("mine.json").read_text() == text and len(list(Path().iterdir())) == 1


def test_a_folder_of_something_else_takes_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    Path("home").mkdir()
    Path("home/README.md").write_text("mine")
    one_line(run("training", ["pack", str(PARITY), "home"]), capsys, "home holds files that are no checkpoint")
    assert Path("home/README.md").read_text() == "mine" and len(list(Path("home").iterdir())) == 1


def test_a_plot_of_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    for name, what in (("nope", "no such folder"), ("empty", "without metrics.jsonl"), ("begun", "no line yet")):
        one_line(run("training", ["plot", name, "--out", "x.png"]), capsys, name, what)


ROOT = Path(__file__).parents[1]
WITHOUT = """
import sys
for name in "torch onnx onnxruntime onnxscript transformers fastapi uvicorn gradio peft safetensors".split():
    sys.modules[name] = None
from mindomni_rt.cli import main
for line in sys.argv[1:]:
    print(line, "->", main(line.split()), flush=True)
"""
COMMANDS = (
    "demo", "serve", "serve --help", "ui", "export products", "train world x",
    "export rehearse decoder --target sm_89", "train evaluate demo", "train pack a b", "bench peers",
)  # fmt: skip


def test_every_command_names_what_is_not_installed(tmp_path: Path) -> None:
    """As in an environment with the base package alone: one line each that says what to install."""
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT, *COMMANDS], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert [line for line in found.stdout.splitlines() if "->" in line] == [f"{command} -> 2" for command in COMMANDS]
    lines = found.stderr.splitlines()
    assert len(lines) == len(COMMANDS) and all("pip install" in line for line in lines), found.stderr
