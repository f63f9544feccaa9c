"""What builds keep: traces serve every precision, killed builds go on, changed weights are noticed."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from conftest import PARITY

from mindomni_rt.bundle.checked import Checked
from mindomni_rt.bundle.manifest import MANIFEST, Manifest, open_bundle, read_manifest, sha256
from mindomni_rt.bundle.writing import writing
from mindomni_rt.errors import BadBundleError
from mindomni_rt.export import parts, traces
from mindomni_rt.export.build import BuildRequest, build
from mindomni_rt.export.cache import Unfinished, cache_sizes, identity, key_of
from mindomni_rt.export.cli import main
from mindomni_rt.export.targets import choose, parse_target


class StoppedError(Exception):
    pass


def request(out: Path, cache: Path, precision: str = "int4", checkpoint: Path = PARITY, stop: int = 0) -> BuildRequest:
    """A build for the CPU; stop: raise after so many graphs."""
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == stop:
            raise StoppedError

    target = parse_target("cpu")
    return BuildRequest(
        checkpoint=checkpoint, out=out, target=target, choice=choose(target, precision), cache=cache, say=say
    )


@pytest.fixture
def cache(bundles: Callable[[str], Path], export_cache: Path, tmp_path: Path) -> Path:
    """A cache of its own with the traces that other tests made."""
    bundles("fp32")
    shutil.copytree(export_cache / "graphs", tmp_path / "cache" / "graphs")
    return tmp_path / "cache"


def same(one: Manifest, other: Manifest) -> bool:
    return {n: f.sha256 for n, f in one.files.items()} == {n: f.sha256 for n, f in other.files.items()}


def test_one_trace_serves_every_precision(
    cache: Path, bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build finds the traces of another precision, and gives the bytes that one without a cache gives."""

    def no_trace(*_: object) -> None:
        raise AssertionError("traced anew")

    monkeypatch.setattr(traces, "trace", no_trace)
    found = build(request(tmp_path / "b", cache))
    assert same(found, read_manifest(bundles("int4")))
    sizes = cache_sizes(cache)
    assert sizes["unfinished"] == 0 and 0 < sizes["graphs"] < 2_000_000  # no weights in it


def test_a_stopped_build_goes_on(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(request(tmp_path / "whole", cache))
    with pytest.raises(StoppedError):
        build(request(tmp_path / "b", cache, stop=6))  # vision, language, choose, connector, features are whole
    assert len(list((cache / "unfinished").iterdir())) == 3
    written: list[str] = []
    before = parts.write_graph

    def count(model: object, path: Path, store: object) -> None:
        written.append(path.stem)
        before(model, path, store)  # type: ignore[arg-type]

    monkeypatch.setattr(parts, "write_graph", count)
    found = build(request(tmp_path / "b", cache))
    assert written == [n for n in whole.graphs if n.startswith(("prefix", "denoiser", "update", "vae"))]
    assert same(found, whole) and not any((cache / "unfinished").iterdir())
    open_bundle(tmp_path / "b")


def test_a_killed_build_goes_on(cache: Path, bundles: Callable[[str], Path], tmp_path: Path) -> None:
    """SIGKILL leaves a partial folder and no bundle; the next build takes over what was done and removes the folder."""
    script = """
import os, signal, sys
from pathlib import Path
from mindomni_rt.export.build import BuildRequest, build
from mindomni_rt.export.targets import choose, parse_target
checkpoint, out, cache = map(Path, sys.argv[1:])
def say(line):
    if "language" in line:
        os.kill(os.getpid(), signal.SIGKILL)
target = parse_target("cpu")
build(BuildRequest(checkpoint=checkpoint, out=out, target=target, choice=choose(target, "fp32"), cache=cache, say=say))
"""
    out = tmp_path / "b"
    command = [sys.executable, "-c", script, str(PARITY), str(out), str(cache)]
    killed = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=120)
    assert killed.returncode == -signal.SIGKILL and not out.exists()
    (half,) = tmp_path.glob(".b.partial-*")
    with writing(tmp_path / "b", overwrite=True) as running:  # of a process that lives: it is left alone
        found = build(request(tmp_path / "c", cache, "fp32"))
        with contextlib.suppress(BadBundleError), writing(tmp_path / "b"):
            raise BadBundleError("not now")
        assert not half.exists() and running.exists()
        (running / MANIFEST).write_text("{}")
    assert same(found, read_manifest(bundles("fp32"))) and cache_sizes(cache)["unfinished"] == 0


def test_damage_and_other_weights_are_noticed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (work / "a.data").write_bytes(b"weights")
    store = Unfinished(tmp_path / "kept")
    store.keep("key", work, ["a.data"], {"a": {"quantized": 1}})
    (work / "a.data").unlink()
    assert store.take("other", work) is None and store.take("key", work) == {"a": {"quantized": 1}}
    assert (work / "a.data").read_bytes() == b"weights"
    (tmp_path / "kept" / "key" / "a.data").write_bytes(b"weighty")
    assert store.take("key", work) is None and not (tmp_path / "kept" / "key").exists()
    assert Unfinished(None).take("key", work) is None


def test_entries_that_another_build_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It drops an entry while this one takes it, and keeps the same parts while this one keeps them."""
    work, store = tmp_path / "work", Unfinished(tmp_path / "kept")
    work.mkdir()
    for name in ("a.data", "b.data"):
        (work / name).write_bytes(name.encode())
    store.keep("key", work, ["a.data", "b.data"], {"a": {}})
    shutil.rmtree(work)
    work.mkdir()

    def dropped(source: Path, target: Path) -> None:
        if source.name == "b.data":
            store.drop("key")
        shutil.copyfile(source, target)

    with monkeypatch.context() as patched:
        patched.setattr("mindomni_rt.export.cache.link", dropped)
        assert store.take("key", work) is None and not any(work.iterdir())  # nothing half taken is in the way

    (work / "a.data").write_bytes(b"ours")

    def kept(self: Unfinished, key: str) -> None:
        shutil.copytree(work, tmp_path / "kept" / key)

    monkeypatch.setattr(Unfinished, "drop", kept)
    store.keep("key", work, ["a.data"], {"a": {}})
    assert [p.name for p in (tmp_path / "kept").iterdir()] == ["key"]


def test_weights_that_changed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1_000_000))
    before = identity([file])
    data = bytearray(file.read_bytes())
    data[500_000] = 1
    file.write_bytes(data)
    assert identity([file]) != before == identity([file])[:0] + before
    assert key_of({"a": 1}, ["export/*.py"]) != key_of({"a": 2}, ["export/*.py"]) != key_of({"a": 2}, ["model/*.py"])


def test_the_cache_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "mindomni-rt" / "graphs").mkdir(parents=True)
    (tmp_path / "mindomni-rt" / "graphs" / "x.onnx").write_bytes(bytes(3_000_000))
    (tmp_path / "mindomni-rt" / "other").write_text("of someone else")
    assert main(["cache"]) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "mindomni-rt") in out and "graphs 3.0 MB" in out and "emptied" not in out
    assert main(["cache", "--clear"]) == 0
    assert [p.name for p in (tmp_path / "mindomni-rt").iterdir()] == ["other"]


def test_files_are_hashed_once(bundles: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process reads no weights to check them; a changed file is read, and found, all the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    bundle = Path(shutil.copytree(bundles("fp32"), tmp_path / "b"))
    hashed: list[str] = []

    def count(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr("mindomni_rt.bundle.manifest.sha256", count)
    monkeypatch.setattr("mindomni_rt.bundle.checked._SETTLED", 0)
    open_bundle(bundle)
    assert len(hashed) == len(read_manifest(bundle).files)
    hashed.clear()
    open_bundle(bundle)
    assert hashed == []
    open_bundle(bundle, again=True)
    assert len(hashed) == len(read_manifest(bundle).files)
    hashed.clear()
    times = (bundle / "vae.data").stat()
    data = bytearray((bundle / "vae.data").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "vae.data").write_bytes(data)
    os.utime(bundle / "vae.data", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(BadBundleError, match=r"vae\.data is corrupt"):
        open_bundle(bundle)


def test_a_file_that_changed_just_now_is_not_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    (tmp_path / "x").write_text("x")
    checked = Checked(tmp_path)
    checked.add("x", "0" * 64)
    checked.save()
    assert not Checked(tmp_path).has("x", "0" * 64)


def test_bundles_share_no_file(cache: Path, tmp_path: Path) -> None:
    """A build that takes what another one keeps, both of them alive: `onnx` refuses weights with two names."""
    ended: list[Manifest] = []

    def say(line: str) -> None:
        if "connect" in line and not ended:  # another process, in the middle of this one
            ended.append(build(request(tmp_path / "b", cache, "fp32")))

    one = request(tmp_path / "a", cache, "fp32")
    build(dataclasses.replace(one, say=say))
    assert ended and not any((cache / "unfinished").iterdir())
    for bundle in (tmp_path / "a", tmp_path / "b"):
        assert [p.name for p in bundle.iterdir() if p.is_file() and p.stat().st_nlink > 1] == []
        onnx.checker.check_model(str(bundle / "language.onnx"))
