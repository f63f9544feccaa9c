"""Runs of `quality`: what evaluators find in the folder, and that shards, kills and full disks change nothing of it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PARITY
from PIL import Image
from quality_cases import PAINT, dpg_folder, geneval_file, quality, tree, wise_folder

import mindomni_rt
from mindomni_rt import files
from mindomni_rt.benchmarks.cli import main
from mindomni_rt.benchmarks.quality import judge as shapes
from mindomni_rt.benchmarks.quality.run import RunFolder, seed_of
from mindomni_rt.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
FILES = {"geneval": geneval_file, "dpg": dpg_folder, "wise": wise_folder}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return mindomni_rt.load(PARITY, device="cpu")


def painted(pipe: Pipeline, prompt: str, seed: int, **more: Any) -> np.ndarray:
    result = pipe.generate(
        prompt, seed=seed, height=32, width=32, num_inference_steps=2, max_new_tokens=3, output="pil", **more
    )
    return np.asarray(result.images[0])


def record(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / "items" / f"{name}.json").read_text(encoding="utf-8"))


def test_geneval_folder_as_its_evaluator_walks_it(tmp_path: Path, pipe: Pipeline) -> None:
    prompts, out = geneval_file(tmp_path, 3), tmp_path / "run"
    assert quality("geneval", prompts, out, "--samples", "2") == 0
    lines = [x for x in prompts.read_text(encoding="utf-8").split("\n") if x]
    folders = [f for f in os.listdir(out / "images") if f.isdigit()]  # noqa: PTH208  as the evaluator does
    assert sorted(folders) == ["00000", "00001", "00002"] and len(os.listdir(out / "images")) == 3  # noqa: PTH208
    for folder in folders:
        with (out / "images" / folder / "metadata.jsonl").open(encoding="utf-8") as file:
            metadata = json.load(file)
        assert metadata == json.loads(lines[int(folder)])
        found = sorted(p.name for p in (out / "images" / folder / "samples").iterdir() if re.match(r"\d+\.png", p.name))
        assert found == ["0000.png", "0001.png"]
        seeds = record(out, folder)["seeds"]
        for name, seed in zip(found, seeds, strict=True):
            with Image.open(out / "images" / folder / "samples" / name) as image:
                assert np.array_equal(np.asarray(image), painted(pipe, metadata["prompt"], seed))
        with Image.open(out / "images" / folder / "grid.png") as image:
            assert image.size == (64, 32)
    assert len({s for f in folders for s in record(out, f)["seeds"]}) == 6


def test_dpg_grid_as_its_evaluator_cuts_it(tmp_path: Path, pipe: Pipeline) -> None:
    out, side = tmp_path / "run", 32
    assert quality("dpg", dpg_folder(tmp_path), out, "--no-think") == 0
    assert sorted(os.listdir(out / "images")) == ["12.png", "a b.png", "partiprompts3.png", "ü.png"]  # noqa: PTH208
    boxes = [(0, 0, side, side), (side, 0, 2 * side, side), (0, side, side, 2 * side), (side, side, 2 * side, 2 * side)]
    with Image.open(out / "images" / "a b.png") as image:
        assert image.size == (64, 64) and image.mode == "RGB"
        for box, seed in zip(boxes, record(out, "a b")["seeds"], strict=True):
            assert np.array_equal(np.asarray(image.crop(box)), painted(pipe, "Ein a b neben “a b”.", seed, think=False))
    assert record(out, "a b")["think"] is False and record(out, "a b")["tokens"] == 0
    assert "PIC_NUM=4" in (out / "report.md").read_text() and "Thinking: off" in (out / "report.md").read_text()


def test_wise_names_images_by_prompt_id_and_keeps_thoughts_apart(tmp_path: Path, pipe: Pipeline) -> None:
    prompts, out = wise_folder(tmp_path), tmp_path / "run"
    assert quality("wise", prompts, out) == 0
    rows = [row for path in prompts.iterdir() for row in json.loads(path.read_text())]
    assert {p.name for p in (out / "images").iterdir()} == {f"{row['prompt_id']}.png" for row in rows}
    kept = record(out, "402")
    assert (
        kept["text"] == pipe.generate(kept["prompt"], height=32, width=32, num_inference_steps=1, max_new_tokens=3).text
    )
    report = json.loads((out / "report.json").read_text())
    assert report["published"] == {"with thinking": "0.71", "without thinking": "0.43"} and not report["partial"]
    assert len([c for c in report["commands"] if "gpt_eval.py" in c]) == 3


@pytest.mark.parametrize("suite", ["geneval", "dpg", "wise"])
def test_any_sharding_gives_the_same_bytes(suite: str, tmp_path: Path) -> None:
    prompts = FILES[suite](tmp_path)
    assert quality(suite, prompts, tmp_path / "one") == 0
    whole = tree(tmp_path / "one")
    for shard in ("2/3", "3/3"):
        assert quality(suite, prompts, tmp_path / "three", "--shard", shard) == 0
    part = json.loads((tmp_path / "three" / "report.json").read_text())
    assert part["partial"] and 0 < part["done"] < part["total"]
    assert quality(suite, prompts, tmp_path / "three", "--shard", "1/3") == 0
    assert tree(tmp_path / "three") == whole


def test_a_part_of_the_items_goes_on_to_all(tmp_path: Path) -> None:
    prompts, out = geneval_file(tmp_path), tmp_path / "run"
    assert quality("geneval", prompts, out, "--samples", "1", "--n", "1") == 0
    assert "partial: 1 of 4 items" in (out / "report.md").read_text()
    before = tree(out)
    assert quality("geneval", prompts, out, "--samples", "1", "--n", "99", "--shard", "5/9") == 0  # an empty shard
    assert tree(out).keys() == before.keys()
    assert quality("geneval", prompts, out, "--samples", "1", "--n", "99") == 0
    assert all(tree(out)[name] == data for name, data in before.items() if not name.startswith("report"))
    assert "partial" not in (out / "report.md").read_text()


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    prompts, out = geneval_file(tmp_path, 300), tmp_path / "run"
    command = [sys.executable, "-m", "benchmarks", "quality", "geneval", str(PARITY), "--prompts", str(prompts)]
    child = subprocess.Popen([*command, "--out", str(out), *PAINT, "--samples", "1"], cwd=ROOT, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while len(list((out / "items").glob("*.json")) if (out / "items").is_dir() else []) < 3:
        assert child.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    done = len(list((out / "items").glob("[!.]*.json")))
    assert 3 <= done < 300 and not (out / "report.md").exists()
    kept = {name: data for name, data in tree(out).items() if ".part" not in name}
    images = {name.split("/")[1] for name in kept if name.startswith("images/")}
    assert len(images) - done in (0, 1)  # the item under way at most
    n = str(done + 2)
    (out / "images" / ".00000.png.x.part").write_bytes(b"half")  # what a kill within a write leaves
    assert quality("geneval", prompts, out, "--samples", "1", "--n", n) == 0
    assert quality("geneval", prompts, tmp_path / "one", "--samples", "1", "--n", n) == 0
    assert tree(out) == tree(tmp_path / "one") and kept.items() <= tree(out).items()


def test_an_interrupt_keeps_what_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, store = wise_folder(tmp_path), tmp_path / "run", RunFolder.store

    def interrupted(self: RunFolder, files: dict[str, bytes]) -> None:
        if "items/401.json" in files:
            raise KeyboardInterrupt
        store(self, files)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "store", interrupted)
        assert quality("wise", prompts, out) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert "partial: 2 of 6 items" in (out / "report.md").read_text()
    assert quality("wise", prompts, out) == 0 and quality("wise", prompts, tmp_path / "one") == 0
    assert tree(out) == tree(tmp_path / "one")


def test_a_full_disk_is_named_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out, left = wise_folder(tmp_path), tmp_path / "run", [5]
    sync = os.fsync

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        assert quality("wise", prompts, out) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "Traceback" not in error and error.count("error: ") == 1
    there = tree(out)
    assert "run.json" in there and len(there) == 5 and not any(".part" in name for name in there)
    assert quality("wise", prompts, out) == 0 and there.items() <= tree(out).items()


def test_other_settings_are_refused_in_every_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = geneval_file(tmp_path), tmp_path / "run"
    assert quality("geneval", prompts, out, "--samples", "1", "--shard", "1/4") == 0
    before = tree(out)
    for more, name in (
        (["--seed", "1"], "settings.seed"),
        (["--samples", "2"], "settings.samples"),
        (["--steps", "3"], "settings.steps"),
        (["--guidance", "1"], "settings.guidance"),
        (["--no-think"], "settings.think"),
        (["--dtype", "bfloat16"], "runs_on.dtype"),
    ):
        assert quality("geneval", prompts, out, "--samples", "1", *more, "--shard", "2/4") == 2
        assert name in capsys.readouterr().err
    assert quality("wise", wise_folder(tmp_path), out) == 2 and "suite" in capsys.readouterr().err
    assert quality("geneval", prompts, out, "--samples", "1", model=ROOT / "assets" / "shapes-world") == 2
    assert "model." in capsys.readouterr().err
    prompts.write_text(prompts.read_text(encoding="utf-8").replace("bells", "balls"), encoding="utf-8")
    assert quality("geneval", prompts, out, "--samples", "1") == 2 and "sha256" in capsys.readouterr().err
    assert tree(out) == before


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = geneval_file(tmp_path), tmp_path / "run"
    assert quality("geneval", prompts, tmp_path) == 2 and "choose an empty folder" in capsys.readouterr().err
    assert quality("geneval", prompts, prompts) == 2 and "error: " in capsys.readouterr().err
    out.mkdir()
    for text in ("{", "[]", "{}"):
        (out / "run.json").write_text(text)
        assert quality("geneval", prompts, out) == 2 and "run.json" in capsys.readouterr().err


def test_shards_that_start_at_once_do_not_take_each_other_for_strangers(tmp_path: Path) -> None:
    asked = {"settings": {"seed": 0}, "runs_on": {}}
    barrier, errors = threading.Barrier(4), list[OSError | mindomni_rt.MindOmniError]()

    def start(shard: int) -> None:
        for round_ in range(100):
            folder = RunFolder(tmp_path / str(round_))
            barrier.wait()
            try:
                folder.check(asked)
                folder.claim(asked)
                folder.store({f"items/{shard}.json": b"{}"})
            except (OSError, mindomni_rt.MindOmniError) as error:
                errors.append(error)

    threads = [threading.Thread(target=start, args=(shard,)) for shard in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(tree(tmp_path)) == 500 and not any(".part" in name for name in tree(tmp_path))


def test_two_shards_that_start_at_once_agree_on_one_record(tmp_path: Path) -> None:
    one, two = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run")
    asked = {"settings": {"seed": 0}, "runs_on": {}}
    assert not one.check(asked) and not two.check(asked)
    two.claim(asked)
    one.claim(asked)
    with pytest.raises(mindomni_rt.BadRequestError, match=r"settings\.seed"):
        one.claim({"settings": {"seed": 1}, "runs_on": {}})
    assert list(tree(tmp_path)) == ["run/run.json"]


def test_seeds_follow_from_the_id_alone() -> None:
    found = {seed_of(base, key, i) for base in (0, 1) for key in ("1", "11", "ü") for i in (0, 1, 11)}
    assert len(found) == 18 and all(0 <= s < 2**32 for s in found)


def test_the_built_in_suite_is_scored_from_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="the bundle runs on onnxruntime")
    bundle = str(ROOT / "assets" / "shapes-world-bundle")
    assert main(["quality", "shapes", bundle, "--out", str(tmp_path / "run"), "--n", "48", "--device", "cpu"]) == 0
    asked, scores = shapes.riddles(), json.loads((tmp_path / "run" / "report.json").read_text())["scores"]
    for arm, name in (("think", "exact, with thinking"), ("direct", "exact, without thinking")):
        count = 0
        for index in range(24):
            with Image.open(tmp_path / "run" / "images" / arm / f"{index:05}.png") as image:
                count += shapes.right(asked[index], np.asarray(image, np.float32) / 255)
        assert (scores[name]["right"], scores[name]["n"]) == (count, 24)
    assert scores["exact, with thinking"]["interval"][0] > scores["exact, without thinking"]["interval"][1]
    assert record(tmp_path / "run", "think-00003")["seeds"] == record(tmp_path / "run", "direct-00003")["seeds"]
    assert "| exact, with thinking |" in capsys.readouterr().out
    assert str(Path.home()) not in (tmp_path / "run" / "report.md").read_text()


def test_list_tells_files_and_published_scores(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quality", "--list"]) == 0
    out = capsys.readouterr().out
    for text in ("evaluation_metadata.jsonl", "djghosh13/geneval", "0.83", "82.5", "0.43"):
        assert text in out
