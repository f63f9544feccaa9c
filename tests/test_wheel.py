"""What a user installs: the wheel's names, and its commands in a clean environment outside the checkout."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from mindomni_rt import extras

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[1]
SUBPACKAGES = ("export", "kernels", "training", "benchmarks", "serving")


def run(arguments: Sequence[str | Path], folder: Path) -> str:
    """Standard output of a command that must succeed, without this test's PYTHONPATH."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(a) for a in arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel built from it: the way in which an index builds them."""
    pytest.importorskip("build", reason="building needs the dev extra")
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--outdir", out, ROOT], out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a clean environment that holds the wheel with `onnx`, and Hugging Face's `kernels`."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    run([python, "-m", "pip", "install", "-q", f"{built[1]}[onnx]", "kernels"], folder)
    return python


def contents(wheel: Path) -> dict[str, str]:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: hashlib.sha256(archive.read(name)).hexdigest() for name in names}


def package_files() -> set[str]:
    """Files of the packages in the checkout, as the import root names them; benchmark results are not installed."""
    found = {p.relative_to(ROOT / "mindomni_rt") for p in (ROOT / "mindomni_rt").rglob("*") if p.is_file()}
    found = {p for p in found if p.parts[0] not in SUBPACKAGES}
    found |= {p.relative_to(ROOT) for name in SUBPACKAGES for p in (ROOT / name).rglob("*") if p.is_file()}
    names = {p.as_posix() for p in found if "__pycache__" not in p.parts}
    return {n for n in names if not n.startswith("benchmarks/results/") or n.endswith("counts-baseline.json")}


def test_wheel_owns_only_our_names(built: tuple[Path, Path]) -> None:
    files = contents(built[1])
    tops = {name.split("/")[0] for name in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mindomni_rt", "export"}
    assert [name for name in files if name.startswith("export/")] == ["export/__main__.py"]
    expected = {f"mindomni_rt/{name}" for name in package_files()}
    assert {n for n in files if n.startswith("mindomni_rt/") and not n.startswith("mindomni_rt/assets/")} == expected
    shipped = {p.relative_to(ROOT).as_posix() for p in (ROOT / "assets").rglob("*") if p.is_file()}
    assert {n.removeprefix("mindomni_rt/") for n in files if n.startswith("mindomni_rt/assets/")} == shipped
    assert "assets/shapes-world/connector.safetensors" in shipped and "mindomni_rt/py.typed" in files


def test_wheel_of_the_archive_equals_the_wheel_of_the_tree(built: tuple[Path, Path], tmp_path: Path) -> None:
    run([sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT], tmp_path)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(built[1])


def test_archive_holds_each_file_once(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    names = {member.name.split("/", 1)[1] for member in members}
    for package in SUBPACKAGES:
        assert f"{package}/cli.py" in names or package == "kernels"
        assert not [name for name in names if name.startswith(f"mindomni_rt/{package}/")]


def test_metadata_is_what_an_index_takes(built: tuple[Path, Path]) -> None:
    pytest.importorskip("twine", reason="checking metadata needs the dev extra")
    assert run([sys.executable, "-m", "twine", "check", "--strict", *built], ROOT).count("PASSED") == 2


def test_demo_thinks_and_paints(installed: Path, tmp_path: Path) -> None:
    command = installed.with_name("mindomni")
    said = json.loads(run([command, "demo", "--json", "--out", tmp_path / "demo.png"], tmp_path))
    assert said["thinking"].startswith("1 + 2 = 3.") and said["answer"] == "three yellow circles"
    assert (tmp_path / "demo.png").stat().st_size > 1000


def test_kernels_of_hugging_face_stays_whole(installed: Path, tmp_path: Path) -> None:
    script = "import kernels, mindomni_rt.kernels; print(callable(kernels.get_kernel), *mindomni_rt.kernels.__path__)"
    callable_, ours = run([installed, "-c", script], tmp_path).split()
    assert callable_ == "True" and Path(ours).parent.name == "mindomni_rt"
    for name in ("training", "benchmarks", "serving"):
        run([installed, "-c", f"import importlib.util as u; assert u.find_spec({name!r}) is None"], tmp_path)


@pytest.mark.parametrize("command", [["mindomni", "export"], ["-m", "export"], ["-m", "mindomni_rt.export"]])
def test_export_is_installed_under_each_name(installed: Path, tmp_path: Path, command: list[str]) -> None:
    start = [installed.with_name(command[0]), *command[1:]] if command[0] == "mindomni" else [installed, *command]
    assert "inspect" in run([*start, "--help"], tmp_path)
    assert "language" in run([*start, "inspect", bundle(installed, tmp_path)], tmp_path)


def test_configurations_and_extras_are_known(installed: Path, tmp_path: Path) -> None:
    """Files of a checkout are not at hand: configurations come with the package, extras from its metadata."""
    script = (
        "import json, pathlib; from mindomni_rt import extras; from mindomni_rt.training.config import *\n"
        "stages = {name: load_config(pathlib.Path(name)).stage for name in named_configs()}\n"
        "found = {name: sorted(extras.packages(name)) for name in ('onnx', 'fast', 'bench', 'ui')}\n"
        "print(json.dumps([stages, found]))"
    )
    stages, found = json.loads(run([installed, "-c", script], tmp_path))
    assert set(stages) == {p.stem for p in (ROOT / "training" / "configs").glob("*.toml")}
    assert stages["shapes-sft"] == "sft"
    expected = {name: sorted(p.replace("_", "-") for p in extras.packages(name)) for name in found}
    assert found == expected


@pytest.mark.parametrize("command", [["mindomni", "bench"], ["-m", "mindomni_rt.benchmarks"]])
def test_latency_is_measured(installed: Path, tmp_path: Path, command: list[str]) -> None:
    start = [installed.with_name(command[0]), *command[1:]] if command[0] == "mindomni" else [installed, *command]
    options = ["--size", "96", "--steps", "2", "--max-new-tokens", "8", "--runs", "1", "--warmup", "0"]
    out = tmp_path / "result.json"
    run([*start, "latency", bundle(installed, tmp_path), *options, "--no-cold-start", "--out", out], tmp_path)
    assert json.loads(out.read_text(encoding="utf-8"))


def test_installed_wheel_exports(installed: Path, tmp_path: Path) -> None:
    """With torch at hand: this environment's packages come after the clean one's."""
    pytest.importorskip("onnxscript", reason="building graphs needs the export extra")
    site = run([installed, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], tmp_path).strip()
    link = Path(site) / "torch-at-hand.pth"
    link.write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    try:
        source = ROOT / "tests" / "fixtures" / "parity"
        run([installed, "-m", "export", "build", source, "--target", "cpu", "--out", tmp_path / "bundle"], tmp_path)
        script = "import mindomni_rt, sys; print(mindomni_rt.load(sys.argv[1]).backend.name, mindomni_rt.__file__)"
        backend, where = run([installed, "-c", script, tmp_path / "bundle"], tmp_path).split()
    finally:
        link.unlink()
    assert backend == "onnx" and where.startswith(site)


def test_user_code_sees_our_types(installed: Path, tmp_path: Path) -> None:
    """mypy --strict on a user's file: right code passes, and wrong code is refused, so no type is Any."""
    pytest.importorskip("mypy", reason="type checking needs the dev extra")
    user = tmp_path / "user.py"
    user.write_text(
        "import mindomni_rt\n"
        "pipe = mindomni_rt.load('model', memory_budget='8GiB')\n"
        "result: mindomni_rt.GenerationResult = pipe.generate('a cat', seed=7)\n"
        "words: str = pipe.understand('what is this?').text\n"
        "for event in pipe.stream('a cat'):\n"
        "    if isinstance(event, mindomni_rt.StepEvent):\n"
        "        done: float = event.step / event.total\n",
        encoding="utf-8",
    )
    check = [sys.executable, "-m", "mypy", "--strict", "--python-executable", installed, user]
    assert "no issues" in run(check, tmp_path)
    with user.open("a", encoding="utf-8") as file:
        file.write("mindomni_rt.load(3)\nseed: str = result.thinking + 1\npipe.stream(prompt=4)\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([str(a) for a in check], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.count(": error:") == 3, done.stdout


def bundle(installed: Path, folder: Path) -> str:
    """The folder of the bundle that the wheel carries."""
    script = (
        "import mindomni_rt, pathlib; print(pathlib.Path(mindomni_rt.__file__).parent / 'assets/shapes-world-bundle')"
    )
    return run([installed, "-c", script], folder).strip()
