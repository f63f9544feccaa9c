"""Peers on the same weights: they agree, a disagreement is not timed, and a missing one is one line."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PARITY
from PIL import Image

from mindomni_rt.benchmarks.cli import main
from mindomni_rt.benchmarks.measure import Meter, Record, relative_error
from mindomni_rt.benchmarks.peers import command
from mindomni_rt.benchmarks.peers import torch as peer_torch
from mindomni_rt.benchmarks.peers.baselines import omnigen_decoder, omnigen_inputs, omnigen_step
from mindomni_rt.benchmarks.peers.pairs import Group, Match, Pair, after_first, run_group, timed
from mindomni_rt.benchmarks.stages import Preset, make_backend, noise, random_conditions
from mindomni_rt.memory.footprint import Precision
from mindomni_rt.memory.machine import Machine
from mindomni_rt.model.random.scaled import scaled
from mindomni_rt.model.random.weights import random_model

pytest.importorskip("transformers", reason="the bench extra is not installed")
pytest.importorskip("diffusers", reason="the bench extra is not installed")

QUICK = ["--runs", "2", "--warmup", "1"]
ASSETS = Path(__file__).parents[2] / "assets"
PRESET = Preset(config=scaled("tiny"), dtype="float32", sides=(96,), steps=2, prompt=6, new=4, negative=5)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("peers") / "peers.json"
    assert main(["peers", *QUICK, "--out", str(out)]) == 0
    return json.loads(out.read_text()), out


def test_every_peer_agrees_and_is_timed(result: tuple[dict[str, Any], Path]) -> None:
    data, out = result
    assert data["kind"] == "peers" and data["commit"] and data["versions"]["diffusers"]
    groups = data["groups"]
    assert list(groups) == ["language", "decoder", "graphs"]
    assert groups["language"]["tokens_equal"] and groups["graphs"]["tokens_equal"]
    for group in groups.values():
        assert group["agrees"] and group["error"] < 1e-5 and len(group["pairs"]) >= 2
        for pair in group["pairs"].values():
            assert pair["n"] == len(pair["ours_s"]) == len(pair["theirs_s"]) == 2 and pair["warmup"] == 1
            assert 0 < pair["low"] <= pair["ratio"] <= pair["high"]
    assert str(Path.home()) not in out.read_text() and str(Path.cwd()) not in out.read_text()
    with Image.open(out.with_suffix(".png")) as plot:
        assert plot.width > 500


def test_on_a_cpu_the_table_gives_ratios_alone(result: tuple[dict[str, Any], Path]) -> None:
    table = result[1].with_suffix(".md").read_text()
    assert table.count("| guided step |") == 2 and " ms" not in table and "tokens/s" not in table
    assert "A B A B" in table and "| 2 |" in table


def test_a_checkpoint_with_long_rope(tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    assert main(["peers", str(PARITY), "--runs", "1", "--warmup", "0", "--out", str(out)]) == 0
    groups = json.loads(out.read_text())["groups"]
    assert groups["decoder"]["error_latents"] < 1e-5 and groups["language"]["equal_tokens"] == 24


def test_outputs_that_disagree_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers' model with another bias than ours: exit code 1, no ratio, and the other pairs go on."""

    def wrong(decoder: Any, found: Any) -> Any:
        model = omnigen_decoder(decoder, found)
        model.proj_out.bias = torch.nn.Parameter(model.proj_out.bias + 0.1, requires_grad=False)
        return model

    monkeypatch.setattr(peer_torch, "omnigen_decoder", wrong)
    out = tmp_path / "p.json"
    assert main(["peers", *QUICK, "--out", str(out)]) == 1
    decoder = json.loads(out.read_text())["groups"]["decoder"]
    assert decoder["agrees"] is False and "pairs" not in decoder
    printed = capsys.readouterr().out
    assert "DISAGREES" in printed and printed.count("| guided step |") == 1


def test_texts_that_differ_and_numbers_that_are_none() -> None:
    never = Pair(name="x", ours=timed(lambda: pytest.fail("timed")), theirs=timed(lambda: pytest.fail("timed")))
    for match in (
        Match(error=0.0, bound=1e-4, tokens_equal=False),
        Match(error=float("nan"), bound=1e-4),
        Match(error=1e-4, bound=1e-4, tokens_equal=True),
    ):
        found = run_group(Group(peer="p", match=match, pairs=[never]), Meter(CPU), 1, 1)
        assert found["agrees"] is False and "pairs" not in found


def test_sixteen_bits_are_judged_by_their_distance_from_float32_and_always_timed() -> None:
    pair = Pair(name="x", ours=lambda _: 1.0, theirs=lambda _: 2.0)
    for error, agrees in ((0.011, True), (0.013, False), (float("nan"), False)):  # the peer's distance is 0.01
        match = Match(error=error, bound=0.1, baseline=0.01, exact=False)
        found = run_group(Group(peer="p", match=match, pairs=[pair]), Meter(CPU), 1, 0)
        assert found["agrees"] is agrees and found["pairs"]["x"]["ratio"] == 2
    far = Match(error=0.11, bound=0.1, baseline=0.1, exact=False)
    assert not far.record()["agrees"]  # within 1.2 times the peer's distance, but past the bound


@pytest.mark.parametrize("fast_products", [False, True])
def test_bfloat16_groups_have_a_float32_reference(fast_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(host=None, bfloat16=fast_products)
    monkeypatch.setattr(peer_torch, "read_machine", lambda **_: machine)
    preset = dataclasses.replace(PRESET, dtype="bfloat16")
    for make in (peer_torch.language_group, peer_torch.decoder_group):
        match = make(preset, random_model(preset.config, torch.bfloat16, CPU), CPU).match
        assert match.baseline is not None and 1e-4 < match.baseline < 0.1
        # Without bfloat16 products, `load` computes in float32: much nearer to the reference than the peer.
        assert 1e-4 < match.error < 0.1 if fast_products else match.error < match.baseline / 2
        assert not match.exact and match.tokens_equal is None


def test_a_pair_that_fails_leaves_the_others() -> None:
    def broken(_: Meter) -> float:
        raise RuntimeError("no kernel")

    pairs = [Pair(name="a", ours=broken, theirs=broken), Pair(name="b", ours=lambda _: 1.0, theirs=lambda _: 1.0)]
    found = run_group(Group(peer="p", match=Match(error=0, bound=1), pairs=pairs), Meter(CPU), 1, 0)
    assert list(found["pairs"]) == ["b"] and found["failed_pairs"] == {"a": "RuntimeError: no kernel"}


def test_a_ratio_by_hand() -> None:
    """Peer / ours, the median of pairs; parts are counted from the moment that the run marks."""
    ours, theirs = iter([9.0, 1.0, 2.0, 4.0]), iter([9.0, 2.0, 6.0, 16.0])
    pair = Pair(name="x", ours=lambda _: next(ours), theirs=lambda _: next(theirs), rate="tokens/s")
    found = run_group(Group(peer="p", match=Match(error=0, bound=1), pairs=[pair]), Meter(CPU), 3, 1)["pairs"]["x"]
    assert found["ratio"] == 3 and found["low"] == 2 and found["high"] == 4  # of 2, 3, 4
    assert found["rates"] == {"of": "tokens/s", "ours": 1 / 2, "theirs": 1 / 6}

    def run(mark: Callable[[], None]) -> None:
        time.sleep(0.2)
        mark()

    assert 0 < after_first(run, 4)(Meter(CPU)) < 0.05  # what came before the mark is not in it


def test_diffusers_turns_every_row_by_row_zero() -> None:
    """Why the longest branch comes first: with the shorter one in row 0 the padding of the other is at its position 0,
    and the longer row is turned by the wrong positions."""
    model = random_model(PRESET.config, torch.float32, CPU)
    found = random_conditions(PRESET.config, PRESET.work(), torch.float32, CPU)
    theirs = omnigen_decoder(model.decoder, found)
    inputs = omnigen_inputs([c.shape[1] for c in found], 36, CPU)
    latents = torch.from_numpy(noise(PRESET.config, PRESET.work()))
    right = omnigen_step(theirs, latents, 0.3, inputs)
    alone = [model.decoder(c, latents, torch.tensor([0.3])) for c in found]
    for row, exact in zip(right, alone, strict=True):
        assert relative_error(row[None], exact) < 1e-5
    turned = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    assert relative_error(omnigen_step(theirs, latents, 0.3, turned)[1:], alone[0]) > 1e-4


def test_a_missing_peer_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what Python itself keeps for a module that is not there
    out = tmp_path / "p.json"
    assert main(["peers", *QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| diffusers | decoder | not installed: pip install " in printed
    groups = json.loads(out.read_text())["groups"]
    assert "missing" in groups["decoder"] and groups["graphs"]["pairs"] and groups["language"]["pairs"]
    for name in ("transformers", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    other = tmp_path / "none.json"
    assert main(["peers", *QUICK, "--out", str(other)]) == 2
    error = capsys.readouterr().err
    assert "not installed" in error and "(the extra bench)" in error and not other.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "0"], ["--out", "p.txt"], ["--device", "tpu"], ["no-such-folder"], ["--rounded", "bundle"]]
    + ([] if torch.cuda.is_available() else [["--device", "cuda", "--preset", "full"]]),
)
def test_mistakes_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_bundle_against_peers_on_its_checkpoint(tmp_path: Path) -> None:
    """The shipped bundle is in float32, so as near to the peers as our PyTorch code; another model is refused."""
    small, bundle = ASSETS / "shapes-world", ASSETS / "shapes-world-bundle"
    out = tmp_path / "rounded.json"
    assert main(["peers", *QUICK, str(small), "--rounded", str(bundle), "--out", str(out)]) == 0
    data = json.loads(out.read_text())
    assert data["model"]["name"] == "shapes-world, ours from shapes-world-bundle"
    for name in ("language", "decoder"):
        group = data["groups"][name]
        assert group["agrees"] and group["error"] < 1e-5 and group["bound"] == 1.0 and len(group["pairs"]) == 2
    assert main(["peers", *QUICK, str(PARITY), "--rounded", str(bundle), "--out", str(out)]) == 1
    groups = json.loads(out.read_text())["groups"]
    assert all("another model" in groups[name]["failed"] for name in ("language", "decoder"))


def test_a_broken_bundle_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["peers", *QUICK, "--bundle", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert (
        "| onnxruntime | graphs | failed: " in printed
        and "| decoded token |" in printed
        and "decoded token after" not in printed
    )


def test_the_fast_path_against_the_same_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on CUDA, here without graphs: it takes block weights over that the peers share."""
    monkeypatch.setattr(
        peer_torch, "backend_of", lambda model, device, _: make_backend(model, "cpu", Precision.uniform("float32"))
    )
    for make in (peer_torch.language_group, peer_torch.decoder_group):
        found = run_group(make(PRESET, random_model(PRESET.config, torch.float32, CPU), CPU), Meter(CPU), 1, 0)
        assert found["agrees"] and found["error"] < 1e-5 and len(found["pairs"]) == 2


def test_each_peer_is_stored_when_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run leaves behind: all peers before."""
    out, stored = tmp_path / "p.json", list[list[str]]()

    def group(*_: Any) -> Group:
        stored.append(list(json.loads(out.read_text())["groups"]) if out.exists() else [])
        raise RuntimeError("no kernel")

    for name in ("language_group", "decoder_group", "onnx_group"):
        monkeypatch.setattr(command, name, group)
    assert main(["peers", *QUICK, "--out", str(out)]) == 1
    assert stored == [[], ["language"], ["language", "decoder"]]
    assert len(json.loads(out.read_text())["groups"]) == 3


def test_no_memory_for_one_pair_is_recorded() -> None:
    def full() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 15 GiB")

    found = Record().section(Meter(CPU), "language", 0, full)
    assert found["failed"].startswith("out of memory: ") and "15 GiB" in found["failed"]
    assert torch.OutOfMemoryError is torch.cuda.OutOfMemoryError


def test_a_group_whose_pairs_all_failed_does_not_disagree() -> None:
    from mindomni_rt.benchmarks.peers.command import _why

    group = {"agrees": True, "error": 1e-6, "bound": 1e-4, "tokens_equal": None, "pairs": {}}
    failed = _why({**group, "failed_pairs": {"decode": "OutOfMemoryError: 1 GiB"}})
    assert failed == "every pair failed: {'decode': 'OutOfMemoryError: 1 GiB'}"
    assert _why({**group, "agrees": False, "tokens_equal": False}) == "DISAGREES: 1.0e-06, bound 1e-04, texts differ"
