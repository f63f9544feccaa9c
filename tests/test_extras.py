"""Advice on what to install: packages by name, from a checkout's file and from an installation's metadata."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import pytest

from mindomni_rt import extras
from mindomni_rt.errors import MissingExtraError

METADATA = [  # as a wheel holds it: extras within extras are resolved, names and markers written by the builder
    "numpy>=1.26",
    "alpha>=2; extra == 'fast'",
    "beta; extra == 'fast'",
    "gamma>=3; (platform_system == 'Linux') and extra == 'fast'",
    "alpha>=2; extra == 'all'",
    *(f"package{i}; extra == 'many'" for i in range(9)),
]
PYPROJECT = """[project]
name = "mindomni-rt"
[project.optional-dependencies]
core = ["alpha>=2"]
fast = ["mindomni-rt[core]", "beta", "gamma>=3; platform_system == 'Linux'", "alpha>=2"]
many = ["package0", "package1", "package2", "package3", "package4", "package5", "package6", "package7", "package8"]
"""


@pytest.fixture(params=["checkout", "installation"])
def known(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    if request.param == "checkout":
        file.write_text(PYPROJECT)
    monkeypatch.setattr(extras, "_PYPROJECT", file)
    monkeypatch.setattr(extras, "requires", lambda _: METADATA)


def having(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(extras, "version", version)


@pytest.mark.usefixtures("known")
def test_advice_names_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    having(monkeypatch)
    assert extras.install("fast") == 'pip install "alpha>=2" beta "gamma>=3"'
    having(monkeypatch, alpha="1.10", beta="0.1")
    assert extras.install("fast") == 'pip install "alpha>=2" "gamma>=3"'
    having(monkeypatch, alpha="2.0+cpu", beta="0.1", gamma="3.1rc1")
    assert extras.lacking("fast") == [] and extras.install("fast").startswith('pip install "alpha>=2" beta')
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert extras.packages("fast") == ["alpha>=2", "beta"]


@pytest.mark.usefixtures("known")
def test_many_packages_are_the_extra_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that a console shows whole. pip finds the project itself where it is installed, without an index."""
    having(monkeypatch)
    assert extras.install("many") == 'pip install "mindomni-rt[many]"'
    having(monkeypatch, **{f"package{i}": "1" for i in range(7)})
    assert extras.install("many") == "pip install package7 package8"
    monkeypatch.setattr(extras, "requires", lambda _: [])
    having(monkeypatch)
    assert extras.install("many") == 'pip install ".[many]" in a checkout of mindomni-rt'


def test_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A copy of the package alone; and a pyproject.toml above it that is another project's."""
    monkeypatch.setattr(extras, "PROJECT", "mindomni-rt-of-nobody")
    assert extras.install("onnx") == 'pip install ".[onnx]" in a checkout of mindomni-rt-of-nobody'


def test_every_extra_of_the_project_is_packages_alone() -> None:
    """The advice must not lead back to a name that no index may hold."""
    known = extras._of_checkout()
    assert "torch" in known
    for extra in known:
        found = extras.packages(extra)
        assert found and not [package for package in found if package.startswith(extras.PROJECT)], extra


@pytest.mark.parametrize("here", ["1.9", "1.10", "2", "2.0.1", "2.13.0+cpu", "2.11rc1", "10.0"])
@pytest.mark.parametrize("least", ["1.9", "1.10", "2.0", "2.0.1", "2.12", "3"])
def test_versions_compare_as_pip_compares_them(here: str, least: str, monkeypatch: pytest.MonkeyPatch) -> None:
    specifiers = pytest.importorskip("packaging.specifiers", reason="pip's own comparison, of the dev extra")
    having(monkeypatch, alpha=here)
    expected = specifiers.SpecifierSet(f">={least}").contains(here, prereleases=True)
    assert extras.satisfied(f"alpha>={least}") == expected


def test_the_error_gives_the_advice() -> None:
    text = str(MissingExtraError("onnxruntime", "onnx"))
    assert text.startswith("onnxruntime is not installed: pip install ") and text.endswith("(the extra onnx)")
    assert "onnxruntime>=" in text or "tqdm" in text
    assert max(len(str(MissingExtraError("torch", extra))) for extra in extras._of_checkout()) < 150
    assert str(MissingExtraError("tensorrt", "trt", "from NVIDIA")) == "tensorrt is not installed: from NVIDIA"
