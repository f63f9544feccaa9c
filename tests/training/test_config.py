"""Configuration: TOML, overrides, and the named error for each way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindomni_rt.training.config import load_config
from mindomni_rt.training.errors import BadConfigError

GOOD = 'stage = "pretrain"\nmodel = "m"\nout = "o"\n[optim]\nlr = 1\nsteps = 7\n[distill]\nweight = 256\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_file_then_overrides(tmp_path):
    config = load_config(write(tmp_path, GOOD), ["optim.lr=3e-3", "data.drop_prompts=['<cfg>', 'x']", "model=a/b"])
    assert (config.optim.lr, config.optim.steps, config.model) == (3e-3, 7, "a/b")
    assert config.data.drop_prompts == ("<cfg>", "x")
    assert config.distill.weight == 256.0 and isinstance(config.distill.weight, float)


@pytest.mark.parametrize(
    ("text", "overrides", "match"),
    [
        (GOOD + "[sft]\nlearning = 1\n", (), "unknown key sft.learning"),
        (GOOD, ("optim.stepz=1",), "unknown key optim.stepz"),
        (GOOD, ("optim.steps=many",), "optim.steps = 'many': expected int"),
        (GOOD, ("optim.steps=true",), "expected int"),
        (GOOD, ("optim=3",), "optim is a table"),
        (GOOD, ("stage=training",), "expected one of prior, pretrain, sft, rgpo"),
        (GOOD, ("optim",), "key=value"),
        (GOOD, ("rgpo.weights=[1.0]",), "2 rewards and 1 weights"),
        (GOOD, ("data.image_size=100",), "multiple of 16"),
        (GOOD, ("data.source=jsonl",), "needs data.paths"),
        ('stage = "sft"\nmodel = "m"\n', (), "out is missing"),
        ("stage = ", (), "not valid TOML"),
    ],
)
def test_mistakes_are_named(tmp_path, text, overrides, match):
    with pytest.raises(BadConfigError, match=match):
        load_config(write(tmp_path, text), overrides)


def test_missing_file(tmp_path):
    with pytest.raises(BadConfigError, match="No such file"):
        load_config(tmp_path / "none.toml")


def test_every_committed_configuration_reads():
    files = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))
    assert files
    for path in files:
        assert load_config(path).stage in path.stem
