"""Configuration: TOML, overrides, and the named error for each way to get it wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindomni_rt.training.cli import main
from mindomni_rt.training.config import load_config, named_configs
from mindomni_rt.training.errors import BadConfigError
from mindomni_rt.training.loop.fingerprint import _flat
from mindomni_rt.training.reference import reference

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


def test_the_packages_configurations_go_by_name(tmp_path, monkeypatch):
    files = sorted((Path(__file__).parents[2] / "training" / "configs").glob("*.toml"))
    assert files and named_configs() == [path.stem for path in files]
    monkeypatch.chdir(tmp_path)
    for path in files:
        found = load_config(Path(path.stem))
        assert found == load_config(path) and found.stage in path.stem
    (tmp_path / "shapes-sft").write_text("stage = 'rgpo'\nmodel = 'm'\nout = 'o'\n")
    assert load_config(Path("shapes-sft")).stage == "rgpo"  # a file of that name comes first
    with pytest.raises(BadConfigError, match=r"^elsewhere/shapes-rgpo: No such file"):
        load_config(Path("elsewhere/shapes-rgpo"))
    with pytest.raises(BadConfigError, match=r"^small: No such file.*one of pretrain-full, .*shapes-sft$"):
        load_config(Path("small"))


def test_a_mistake_is_blamed_on_where_it_is(tmp_path):
    path = write(tmp_path, GOOD + "[optim2]\n")
    with pytest.raises(BadConfigError, match=rf"^{path}: unknown key optim2"):
        load_config(path)
    path = write(tmp_path, GOOD)
    for item, match in (
        ("optim.lr=fast", r"optim\.lr = 'fast': expected float"),
        ("optim.steps=0", r"optim\.steps = 0: expected at least 1"),
        ("optim.stepz=1", r"unknown key optim\.stepz"),
        ("optim.lr=nan", "expected a finite number"),
        ("stage=training", "expected one of"),
        ("rgpo.weights=[1.0]", "2 rewards and 1 weights"),
        ("model.x=1", "model is a value, not a table"),
    ):
        with pytest.raises(BadConfigError, match=match) as error:
            load_config(path, [item])
        assert str(error.value).startswith(f"{item!r} on the command line: "), item
    with pytest.raises(BadConfigError, match=rf"^{path}: optim\.steps = 0"):
        load_config(write(tmp_path, GOOD.replace("steps = 7", "steps = 0")), ["optim.lr=1e-4"])


def test_rewards_without_weights_weigh_one_each():
    config = load_config(None, ["stage=rgpo", "model=m", "out=o", "rgpo.rewards=['a:b', 'format', 'c:d']"])
    assert config.rgpo.weighted() == [("a:b", 1.0), ("format", 1.0), ("c:d", 1.0)]


def test_the_reference_page_is_current_and_complete(capsys, tmp_path):
    page = Path(__file__).parents[2] / "docs" / "training-configuration.md"
    assert page.read_text(encoding="utf-8") == reference(), "run `mindomni train config-reference --out " + str(page)
    keys = [f"`{name}`" for name in _flat(load_config(None, ["stage=sft", "model=m", "out=o"]).to_dict())]
    assert all(f"| {key} |" in reference() for key in keys) and len(keys) > 60
    assert main(["config-reference"]) == 0 and capsys.readouterr().out == reference()
    assert main(["config-reference", "--out", str(tmp_path / "a" / "page.md")]) == 0
    assert (tmp_path / "a" / "page.md").read_text(encoding="utf-8") == reference()
