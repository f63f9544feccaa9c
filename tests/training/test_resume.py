"""A run resumes with what it started from, or says by name what changed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_loop import folder, trainer  # noqa: F401 folder is a fixture
from toy import picture, toy_contexts

from mindomni_rt.errors import BadCheckpointError
from mindomni_rt.training.cli import main
from mindomni_rt.training.config import DataConfig
from mindomni_rt.training.data.latents import LatentCache
from mindomni_rt.training.data.records import open_stream
from mindomni_rt.training.errors import BadDataError
from mindomni_rt.training.loop.fingerprint import differences
from mindomni_rt.training.stages.base import base_digest, digest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"optim": {"steps": 2, "lr": 5e-3}}, r"optim\.lr was 0\.001, is 0\.005"),
        ({"optim": {"steps": 2, "batch": 2}}, r"optim\.batch was 4, is 2"),
        ({"optim": {"steps": 2, "accumulate": 3}}, r"optim\.accumulate was 1, is 3"),
        ({"optim": {"steps": 2}, "data": {"drop": 0.5}}, r"data\.drop was 0\.0, is 0\.5"),
        ({"optim": {"steps": 2}, "data": {"split": "sft"}}, r"data\.split was '', is 'sft'"),
        ({"optim": {"steps": 2}, "precision": "bf16"}, "precision was 'fp32', is 'bf16'"),
        ({"optim": {"steps": 2}, "distill": {"weight": 1.0}}, r"distill\.weight was 0\.0, is 1\.0"),
    ],
)
def test_what_changed_is_named(change, match, folder, tmp_path):  # noqa: F811
    trainer(folder, tmp_path, optim={"steps": 1}).run()
    with pytest.raises(BadCheckpointError, match=f"of another run.*{match}"):
        trainer(folder, tmp_path, **change).run()


def test_a_finished_run_with_another_setting_is_no_finished_run(folder, tmp_path):  # noqa: F811
    trainer(folder, tmp_path, optim={"steps": 2}).run()
    trainer(folder, tmp_path, optim={"steps": 2}).run()  # the same again: nothing to do
    with pytest.raises(BadCheckpointError, match=r"optim\.lr"):
        trainer(folder, tmp_path, optim={"steps": 2, "lr": 1.0}).run()
    with pytest.raises(BadCheckpointError, match=r"holds step 2, more than optim\.steps = 1"):
        trainer(folder, tmp_path, optim={"steps": 1}).run()


def test_steps_count_where_the_schedule_depends_on_them(folder, tmp_path):  # noqa: F811
    trainer(folder, tmp_path, optim={"steps": 2, "schedule": "cosine"}).run()
    with pytest.raises(BadCheckpointError, match=r"optim\.steps was 2, is 3"):
        trainer(folder, tmp_path, optim={"steps": 3, "schedule": "cosine"}).run()


def test_another_base_model_is_named_by_its_part(folder, tmp_path):  # noqa: F811
    trainer(folder, tmp_path, optim={"steps": 1}).run()
    other = trainer(folder, tmp_path, optim={"steps": 2})
    with torch.no_grad():
        other.stage.model.decoder.llm.layers[0].mlp.down_proj.weight[0, 0] += 1e-3
    other._fingerprint |= {f"base weights of {k}": v for k, v in base_digest(other.stage.model).items()}
    with pytest.raises(BadCheckpointError, match="base weights of decoder differ"):
        other.run()


def test_a_checksum_sees_every_bit_and_place():
    layer = torch.nn.Linear(3, 2, bias=False)
    before = digest(layer)["weight"]
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    assert digest(layer)["weight"] != before  # the same numbers elsewhere
    with torch.no_grad():
        layer.weight.copy_(layer.weight.flip(0))
    assert digest(layer)["weight"] == before
    words = layer.weight.data.view(torch.int32)
    for bit in (0, 13, 31):
        words[1, 2] ^= 1 << bit if bit < 31 else -(2**31)
        assert digest(layer)["weight"] != before
        words[1, 2] ^= 1 << bit if bit < 31 else -(2**31)


def test_many_differences_are_counted():
    found = differences({str(i): 0 for i in range(9)}, {str(i): 1 for i in range(9)})
    assert len(found) == 5 and found[-1] == "5 more"


def test_data_of_the_same_length_but_other_text_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a"}\n')
    config = DataConfig(source="jsonl", paths=(str(path),))
    state = open_stream(config, "sft", 0).state_dict()
    path.write_text('{"instruction": "b"}\n')
    with pytest.raises(BadDataError, match=r"a\.jsonl has changed"):
        open_stream(config, "sft", 0).load_state_dict(state)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "shape", "nan"])
def test_kept_latents_that_do_not_read_are_made_again(damage, folder, tmp_path, caplog):  # noqa: F811
    vae = toy_contexts(folder).model.vae
    first = LatentCache(vae, 32, torch.device("cpu"), str(tmp_path)).targets([picture(0)])
    (file,) = tmp_path.iterdir()
    if damage in ("cut", "empty", "text"):
        file.write_bytes({"cut": file.read_bytes()[:100], "empty": b"", "text": b"no latents"}[damage])
    else:
        np.save(file, np.full((4, 4, 4) if damage == "nan" else (4, 2, 2), np.nan, np.float32))
    again = LatentCache(vae, 32, torch.device("cpu"), str(tmp_path)).targets([picture(0)])
    assert torch.equal(first, again) and file.name in caplog.text
    assert torch.equal(torch.from_numpy(np.load(file)), first[0])  # and kept


def test_a_step_is_read_whole_and_stored_at_its_end(folder, tmp_path):  # noqa: F811
    run = trainer(folder, tmp_path, optim={"steps": 1, "batch": 2, "accumulate": 3})
    sizes = [len(run.stream.next_batch(2)) for _ in range(3)]
    assert sizes == [2, 2, 2] and run.stage.step_counts.images == 6 and run.stage.step_counts.pieces == 3
    before = run.stream.state_dict()
    run.stream.next_batch(2)
    run.stream.load_state_dict(before)
    assert run.stream._held == []


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_out_of_range_is_one_line(seed, tmp_path, capsys):
    file = tmp_path / "a.toml"
    file.write_text("stage = 'sft'\nmodel = 'm'\nout = 'o'\n")
    assert main(["sft", "--config", str(file), f"seed={seed}"]) == 2
    assert capsys.readouterr().err.strip() == (
        f"error: 'seed={seed}' on the command line: seed = {seed}: expected 0 to 4294967295"
    )
