"""Data files and rewards: what reads, what resumes, and the named error for each way a file can be wrong."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy import picture

from mindomni_rt.errors import BadCheckpointError, BadRequestError
from mindomni_rt.training.config import DataConfig
from mindomni_rt.training.data.record import Record
from mindomni_rt.training.data.records import expanded, open_stream
from mindomni_rt.training.data.world.clip import WorldClip, load_clip, save_clip
from mindomni_rt.training.errors import BadDataError
from mindomni_rt.training.stages.rewards import Rollout, make


def write(folder, lines):
    picture(0).save(folder / "a.png")
    path = folder / "data.jsonl"
    path.write_text("".join(x + "\n" for x in lines), encoding="utf-8")
    return path


def stream(path, seed=0, **options):
    return open_stream(DataConfig(source="jsonl", paths=(str(path),), **options), "sft", seed)


def test_a_line_as_a_record(tmp_path):
    line = {
        "instruction": "draw two", "instruction_qwen": "two cats", "think_content": "one and one",
        "input_images": ["a.png"], "output_image": "a.png", "gt_prompt": "two cats on a wall",
    }  # fmt: skip
    path = write(tmp_path, [json.dumps(line)])
    found = stream(path).next_batch(1)[0]
    assert found == Record(
        instruction="draw two", think_content="one and one", answer="two cats", gt_prompt="two cats on a wall",
        input_images=(tmp_path / "a.png",), output_image=tmp_path / "a.png", source=f"{path}:1",
    )  # fmt: skip


def test_every_record_once_a_pass_in_a_new_order_and_resumable(tmp_path):
    path = write(tmp_path, [json.dumps({"instruction": f"draw {i}"}) for i in range(10)] + ["", "  "])
    reader = stream(path, seed=3)
    first = [r.instruction for r in reader.next_batch(10)]
    middle = reader.next_batch(4)
    state = reader.state_dict()
    rest = reader.next_batch(9)
    assert sorted(first) == sorted(f"draw {i}" for i in range(10))
    again = stream(path, seed=3)
    assert [r.instruction for r in again.next_batch(10)] == first
    assert again.next_batch(4) == middle
    resumed = stream(path, seed=3)
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.next_batch(9) == rest
    assert [r.instruction for r in stream(path, seed=4).next_batch(10)] != first
    second = [r.instruction for r in middle] + [r.instruction for r in rest[:6]]
    assert sorted(second) == sorted(first) and second != first


def test_a_file_that_changed_is_not_resumed(tmp_path):
    path = write(tmp_path, ['{"instruction": "a"}'])
    state = stream(path).state_dict()
    path.write_text('{"instruction": "a"}\n{"instruction": "b"}\n')
    with pytest.raises(BadDataError, match="2 records, the run that is resumed had 1"):
        stream(path).load_state_dict(state)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"instruction": "a"', "not valid JSON"),
        ("[1]", "expected a JSON object"),
        ('{"instruction": " "}', "'instruction' is missing or empty"),
        ('{"instruction": 3}', "instruction is int"),
        ('{"instruction": "a", "output_image": "none.png"}', "none.png does not exist"),
        ('{"instruction": "a", "input_images": ["none.png"]}', "none.png does not exist"),
        ('{"instruction": "a", "input_images": "a.png"}', "expected a list of paths"),
        ('{"instruction": "a", "output_image": ["a.png"]}', "expected a path"),
        ('{"instruction": "a", "task": "t2i"}', "unknown key 'task'"),
        ('{"instruction": "a", "reply": "yes"}', "a reply needs the picture"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, match):
    path = write(tmp_path, ['{"instruction": "fine"}', line])
    with pytest.raises(BadDataError, match=match) as error:
        stream(path).next_batch(2)
    assert f"{path}:2" in str(error.value)


def test_a_list_of_files(tmp_path):
    write(tmp_path, ['{"instruction": "a", "output_image": "a.png"}'])
    listed = tmp_path / "all.yaml"
    listed.write_text("datasets:\n  - {json_path: data.jsonl, image_dir: .}\n")
    assert stream(listed).next_batch(1)[0].output_image == tmp_path / "a.png"
    listed.write_text("datasets: 3\n")
    with pytest.raises(BadDataError, match=r"all\.yaml: expected"):
        stream(listed)
    with pytest.raises(BadDataError, match="No such file"):
        stream(tmp_path / "none.jsonl")


def shard(path, count, broken=False):
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            held = io.BytesIO()
            picture(index).save(held, "PNG")
            parts = {"png": held.getvalue()[: 40 if broken else None], "txt": f"caption {index}".encode()}
            for kind, data in parts.items():
                info = tarfile.TarInfo(f"{index:03}.{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def test_shards_stream_shuffled_and_resume(tmp_path):
    pytest.importorskip("webdataset", reason="shards need the train extra")
    shard(tmp_path / "a.tar", 12)
    config = DataConfig(source="webdataset", paths=(str(tmp_path / "a.tar"),), shuffle=4)
    reader = open_stream(config, "pretrain", 0)
    first = reader.next_batch(12)
    assert sorted(r.instruction for r in first) == sorted(f"caption {i}" for i in range(12))
    assert [r.instruction for r in first] != [f"caption {i}" for i in range(12)]
    named = next(r for r in first if r.instruction == "caption 5")
    assert np.array_equal(np.asarray(named.output_image), np.asarray(picture(5)))
    state = reader.state_dict()
    following = [r.instruction for r in reader.next_batch(5)]
    resumed = open_stream(config, "pretrain", 0)
    resumed.load_state_dict(state)
    assert [r.instruction for r in resumed.next_batch(5)] == following


def test_a_bad_shard_is_named(tmp_path):
    pytest.importorskip("webdataset", reason="shards need the train extra")
    with pytest.raises(BadDataError, match=r"none\.tar: no such shard"):
        open_stream(DataConfig(source="webdataset", paths=("none.tar",)), "pretrain", 0)
    shard(tmp_path / "b.tar", 2, broken=True)
    config = DataConfig(source="webdataset", paths=(str(tmp_path / "b.tar"),), shuffle=1)
    with pytest.raises(BadDataError, match=r"b\.tar"):
        open_stream(config, "pretrain", 0).next_batch(1)


def rollout(text="", image=None, prompt="three yellow circles"):
    image = np.zeros((96, 96, 3), np.uint8) if image is None else image
    return Rollout(prompt="p", text=text, image=image, gt_prompt=prompt, token_ids=(1, 2))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think> a </think><answer> b </answer>", 1),
        ("so: <think> a\nb </think> \n <answer></answer> and more", 1),
        ("<think> a <answer> b </answer>", 0),
        ("<answer> b </answer><think> a </think>", 0),
        ("<think> a </think> then <answer> b </answer>", 0),
        ("", 0),
    ],
)
def test_format_reward(text, wanted):
    assert make("format")([rollout(text)]).tolist() == [wanted]


def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_rewards.py").write_text(
        "import numpy as np\ndef brief(rollouts): return np.array([1 / len(r.token_ids) for r in rollouts])\n"
        "def broken(rollouts): return np.zeros(1)\ndef nan(rollouts): return np.full(len(rollouts), np.nan)\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert make("mine_rewards:brief")([rollout(), rollout()]).tolist() == [0.5, 0.5]
    for name, match in (
        ("broken", "returned 1 numbers for 2 rollouts; expected one number each"),
        ("nan", "returned nan for rollout 1 of 2"),
    ):
        with pytest.raises(BadRequestError, match=match):
            make(f"mine_rewards:{name}")([rollout(), rollout()])
    for name, match in (
        ("beauty", "expected one of format, consistency"),
        ("mine_rewards:no", "no attribute"),
        ("no:no", "No module named 'no'$"),  # and no line of Python's own importer
    ):
        with pytest.raises(BadRequestError, match=match):
            make(name)


def test_consistency_is_a_cosine_cut_at_zero(tmp_path):
    with pytest.raises(BadRequestError, match=r"needs rgpo\.reward_model"):
        make("consistency")
    save_clip(WorldClip(), tmp_path)
    score = make("consistency", str(tmp_path))
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (96, 96, 3), dtype=np.uint8) for _ in range(3)]
    found = score([rollout(image=i) for i in images])
    clip = load_clip(tmp_path)
    pairs = clip.images(np.stack(images)).numpy() @ clip.captions(["three yellow circles"]).numpy()[0]
    np.testing.assert_allclose(found, np.clip(pairs, 0, None), atol=1e-5)
    floats = score([rollout(image=(i / 255).astype(np.float32)) for i in images])
    np.testing.assert_allclose(found, floats, atol=1e-4)


def test_pictures_from_arrays_and_files_alike(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    write(tmp_path, ['{"instruction": "a", "output_image": "x.png"}'])
    assert stream(tmp_path / "data.jsonl").next_batch(1)[0].output_image.name == "x.png"


def test_a_shard_that_is_cut_is_no_shorter_shard(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for i in range(4):
            data = f"caption {i}".encode()
            info = tarfile.TarInfo(f"{i}.txt")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    whole = path.read_bytes()
    config = DataConfig(source="webdataset", paths=(str(path),), shuffle=1)
    assert len(open_stream(config, "sft", 0).next_batch(4)) == 4
    for length in (0, 100, 2560, len(whole) - 9000):
        path.write_bytes(whole[:length])
        with pytest.raises(BadDataError, match="cut short"):
            open_stream(config, "sft", 0).next_batch(1)


@pytest.mark.parametrize("line", ['{"instruction": "x", "output_image": "b.png"}', "[" * 100_000])
def test_what_is_no_image_or_no_record_is_named_with_its_line(tmp_path, line):
    path = write(tmp_path, ['{"instruction": "draw", "output_image": "a.png"}', line])
    (tmp_path / "b.png").write_text("not an image")
    with pytest.raises(BadDataError, match=r"data\.jsonl:2: "):
        stream(path).next_batch(2)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"instruction": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"instruction": NaN}', "NaN is not JSON"),
        (r'{"instruction": "\ud800"}', "half a surrogate pair"),
        ('{"instruction": true}', "instruction is bool"),
        (r'{"instruction": "x", "output_image": "a\u0000b"}', "no file can have this name"),
        ('{"instruction": "x", "output_image": "' + "x" * 300 + '"}', "File name too long"),
        ('{"instruction": "x", "output_image": "."}', "is a folder"),
        ('{"instruction": "x", "output_image": "pipe"}', "is a pipe"),
        ('{"instruction": "x", "input_images": ["/dev/zero"]}', "is a pipe, device"),
        ('{"instruction": "x", "output_image": "eps.png"}', "expected one of PNG, JPEG"),
        ('{"instruction": "x", "output_image": "none.png"}', r"none\.png does not exist"),
    ],
)
def test_lines_that_attack(tmp_path, line, match):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "eps.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(BadDataError, match=rf"data\.jsonl:1: .*{match}") as error:
        stream(write(tmp_path, [line])).next_batch(1)
    assert "Errno" not in str(error.value)


@pytest.mark.parametrize(
    "shard",
    [
        "pipe:touch pwned; echo ://",
        "pipe:touch pwned",
        "http://127.0.0.1:9/';touch pwned;'.tar",
        "https://127.0.0.1:9/$(touch pwned).tar",
        "gs://x';touch pwned;'",
        "file:///dev/zero",
        "s3://bucket/a.tar",
    ],
)
def test_addresses_of_shards_reach_no_shell(tmp_path, monkeypatch, shard):
    """webdataset hands them to one."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadDataError, match="expected the path of a shard"):
        open_stream(DataConfig(source="webdataset", paths=(shard,)), "pretrain", 0).next_batch(1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pattern", ["{0..99999999999}.jsonl", "{0..1000000}.jsonl"])
def test_a_range_without_end_is_refused(pattern):
    with pytest.raises(BadDataError, match="expected at most 1000000 files"):
        expanded(pattern)


@pytest.mark.parametrize("scale", ["0", "nan", "x", "1e39"])
def test_an_autoencoder_of_an_odd_scale_is_refused(tmp_path, scale):
    from safetensors.torch import save_file

    from mindomni_rt.model.vae import AutoencoderKL
    from mindomni_rt.training.data.world.vae import CONFIG, load_vae

    save_file(AutoencoderKL(CONFIG).state_dict(), tmp_path / "world_vae.safetensors", {"scaling_factor": scale})
    with pytest.raises(BadCheckpointError, match=r"world_vae\.safetensors: not the world's autoencoder"):
        load_vae(tmp_path)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"instruction": "draw"}\n')
    assert stream(path).next_batch(1)[0].instruction == "draw"


def test_latents_do_not_depend_on_what_is_encoded_beside_them(tmp_path):
    """A resumed run finds other latents kept than a whole one: rounding must be the same, to the bit."""
    from mindomni_rt.training.data.world.scene import all_scenes, render
    from mindomni_rt.training.loop.runs import open_contexts

    model = str(Path(__file__).parents[2] / "assets" / "shapes-world")
    pictures = [render(s) for s in all_scenes()[::17]]
    whole = open_contexts(model, torch.device("cpu"), 96).latents.targets(pictures)
    apart = open_contexts(model, torch.device("cpu"), 96, str(tmp_path)).latents
    apart.targets(pictures[3:4])
    resumed = open_contexts(model, torch.device("cpu"), 96, str(tmp_path)).latents
    assert torch.equal(resumed.targets(pictures), whole)


def test_latents_and_a_full_disk(tmp_path, monkeypatch):
    """Nothing half-written is ever taken for a latent."""
    import torch

    from mindomni_rt.model.vae import AutoencoderKL
    from mindomni_rt.training.data.latents import LatentCache
    from mindomni_rt.training.data.world.vae import CONFIG
    from mindomni_rt.training.errors import StorageError

    def full(path, data):
        raise OSError(28, "No space left on device")

    torch.manual_seed(0)
    vae = AutoencoderKL(CONFIG).eval().requires_grad_(False)
    cache = LatentCache(vae, 32, torch.device("cpu"), str(tmp_path / "latents"))
    monkeypatch.setattr("mindomni_rt.training.data.latents.write_whole", full)
    with pytest.raises(StorageError, match="No space left"):
        cache.targets([picture(0)])
    monkeypatch.undo()
    assert not list((tmp_path / "latents").iterdir())
    first = cache.targets([picture(0)])
    again = LatentCache(vae, 32, torch.device("cpu"), str(tmp_path / "latents")).targets([picture(0)])
    assert torch.equal(first, again) and len(list((tmp_path / "latents").iterdir())) == 1


def member(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def encoded(form, **options):
    held = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 40)).save(held, form, **options)
    return held.getvalue()


def first_of(path):
    return open_stream(DataConfig(source="webdataset", paths=(str(path),), shuffle=1), "sft", 0).next_batch(1)[0]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("a.bmp", "BMP"),
        ("a.gif", "GIF"),
        ("a.tif", "TIFF"),
        ("a.TIFF", "TIFF"),
        ("a.webp", "WEBP"),
        ("a.v1.jpg", "JPEG"),
    ],
)
def test_every_kind_of_picture_in_a_shard_is_read(name, form, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        member(tar, name, encoded(form))
        member(tar, "a.txt", b"a cat")
    pixel = np.asarray(first_of(tmp_path / "a.tar").output_image)[8, 8].astype(int)
    assert np.abs(pixel - (200, 30, 40)).max() < 12  # JPEG and WebP are lossy


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"a.heic": b"x", "a.txt": b"a cat"}, r"a\.tar:a: \.heic is no picture that is read; expected one of png"),
        ({"a.v1.png": b"", "a.v2.png": b"", "a.txt": b"a"}, r"a\.tar:a: 2 files are its picture \(v1\.png, v2\.png\)"),
        ({"a.png": b"no image", "a.txt": b"a"}, r"a\.tar:a: .*"),
        ({"a.v1.txt": b"a", "a.v2.txt": b"b"}, r"a\.tar:a: 2 files are its \.txt"),
        ({"a.png": encoded("PNG")}, r"a\.tar:a: expected a \.txt or \.json"),
        ({"a.png": encoded("PNG"), "a.json": b"{"}, r"a\.tar:a: "),
        ({"a.png": encoded("PNG"), "a.txt": b"\xff"}, r"a\.tar:a: "),
    ],
)
def test_a_sample_that_is_not_understood_is_named(files, match, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in files.items():
            member(tar, name, data)
    with pytest.raises(BadDataError, match=match):
        first_of(tmp_path / "a.tar")


def test_a_reward_from_the_current_folder_and_its_errors_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "here_rewards.py").write_text(
        "import numpy as np\nNUMBER = 3\ndef long(rollouts):\n    return [len(r.token_ids) for r in rollouts]\n"
        "def broken(rollouts):\n    return 1 / 0\ndef words(rollouts):\n    return ['a' for _ in rollouts]\n"
    )
    (tmp_path / "torn_rewards.py").write_text("def (\n")
    (tmp_path / "needy_rewards.py").write_text("raise RuntimeError('no key\\nset one')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])  # as an installed command starts
    assert make("here_rewards:long")([rollout()]).tolist() == [2.0]
    for name, match in (
        (
            "here_rewards:broken",
            r"'here_rewards:broken' raised ZeroDivisionError: division by zero \(.*here_rewards.py:6\)",
        ),
        ("here_rewards:words", "raised ValueError"),
    ):
        with pytest.raises(BadRequestError, match=match):
            make(name)([rollout()])
    for name, match in (
        ("here_rewards:NUMBER", "holds no function 'NUMBER'"),
        ("torn_rewards:x", r"SyntaxError: .*torn_rewards.py:1"),
        ("needy_rewards:x", "RuntimeError: no key set one"),
    ):
        with pytest.raises(BadRequestError, match=match) as error:
            make(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["", "runs/shapes/reward", "./reward", "/none/at/all"])
def test_a_missing_reward_model_names_the_command_that_makes_it(model):
    with pytest.raises(BadRequestError, match=r"mindomni train world FOLDER --only reward"):
        make("consistency", model)


def test_paths_with_ranges_and_wildcards(tmp_path):
    assert expanded("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expanded("http://x/{0..1}-{3..3}.tar?y") == ["http://x/0-3.tar?y", "http://x/1-3.tar?y"]
    for name in ("b.jsonl", "a.jsonl"):
        (tmp_path / name).write_text(f'{{"instruction": "{name}"}}\n')
    assert expanded(f"{tmp_path}/*.jsonl") == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    found = {r.instruction for r in stream(tmp_path / "*.jsonl").next_batch(2)}
    assert found == {"a.jsonl", "b.jsonl"}
    with pytest.raises(BadDataError, match=r"no file matches .*\*\.tar"):
        expanded(f"{tmp_path}/*.tar")
