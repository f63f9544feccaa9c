"""Ablations as data: every arm is a configuration that reads, the table's figures, the plot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_loop import folder  # noqa: F401 a fixture

from mindomni_rt.errors import BadRequestError
from mindomni_rt.model.mindomni import load_model
from mindomni_rt.training.config import CONFIGS, load_config
from mindomni_rt.training.evaluation.ablate import STUDIES, _is_base, fresh_connector, main, run_arm, table
from mindomni_rt.training.evaluation.plots import plot_study, read_metrics, smooth


def test_every_arm_is_a_configuration_that_reads():
    assert set(STUDIES) == {"stages", "connector", "distillation", "image KL", "text KL", "group size", "rewards"}
    for arms in STUDIES.values():
        assert len({a.name for a in arms}) == len(arms)
        for arm in arms:
            for leg in arm.legs:
                config = load_config(CONFIGS / f"shapes-{leg.stage}.toml", leg.overrides)
                assert config.stage == leg.stage
                assert config.optim.batch * config.rgpo.group == 64 or leg.stage != "rgpo"  # equal rollouts a step


def test_arms_share_a_folder_exactly_where_they_are_the_same():
    arms = [a for arms in STUDIES.values() for a in arms]
    for a in arms:
        for b in arms:
            same = (a.start, a.legs, a.layers) == (b.start, b.legs, b.layers)
            assert (a.slug == b.slug) == same, (a, b)


@pytest.mark.parametrize("layers", [0, 1, 4])
def test_another_connector_in_the_published_layout(folder, tmp_path, layers):  # noqa: F811
    model, _ = load_model(fresh_connector(folder, tmp_path / "deep", layers, 0))
    assert model.config.connector.stack.num_layers == layers
    assert len(model.connector) == layers + 1


def test_table_by_hand():
    row = {"direct": 0.0, "caption": 1.0, "format": 1.0, "text": 0.5}
    rows = [{"arm": "a", "seed": s, "image": x, **row} for s, x in enumerate((0.25, 0.75))]
    shown = table({"study": rows})
    assert (
        "| a | 2 | 50.0 (50 to 50) | 50.0 (25 to 75) | 0.0 (0 to 0) | 100.0 (100 to 100) | 100.0 (100 to 100) |"
        in shown
    )


def test_plot_shows_curves_and_results(tmp_path):
    metrics = tmp_path / "distillation" / "on" / "0" / "pretrain" / "metrics.jsonl"
    metrics.parent.mkdir(parents=True)
    metrics.write_text("".join(json.dumps({"step": s, "loss/flow": 1 / s}) + "\n" for s in range(1, 30)))
    held = metrics.with_name("evaluation.jsonl")
    held.write_text("".join(json.dumps({"step": s, "captions/image": s / 30}) + "\n" for s in range(0, 30, 10)))
    shares = {"text": 0.1, "image": 0.2, "direct": 0.3, "caption": 0.4}
    rows = [{"arm": "on", "seed": 0, "stage": "pretrain", "run": str(metrics.parent), **shares}]
    plot_study("distillation", rows, tmp_path)
    assert (tmp_path / "distillation.png").stat().st_size > 5000
    assert read_metrics(metrics)["loss/flow"][1] == 0.5
    assert smooth([1, 2, 3, 4], 2) == [1.0, 1.5, 2.5, 3.5]


def test_mistakes_are_named(tmp_path):
    with pytest.raises(BadRequestError, match="--only 'depth'"):
        main(["--only", "depth"])
    with pytest.raises(BadRequestError, match="--arm 'G = 3'"):
        main(["--only", "group size", "--arm", "G = 3"])
    with pytest.raises(BadRequestError, match=r"run_small\.sh"):
        run_arm(STUDIES["stages"][0], tmp_path, tmp_path / "out", 0, 1.0, 4)


def test_a_run_whose_losses_are_all_zero_is_drawn_without_a_warning(tmp_path, capsys, recwarn):
    """The first step of stage 3: a logarithmic scale has nothing to show."""
    from mindomni_rt.training.cli import main as command

    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/kl_text": 0.0, "reward/total": 0.5}) + "\n")
    assert command(["plot", str(tmp_path), "--out", str(tmp_path / "run.png")]) == 0
    assert capsys.readouterr().out == f"written to {tmp_path / 'run.png'}\n" and not recwarn.list


def test_plot_of_runs_shows_only_what_they_logged(tmp_path, capsys):
    from mindomni_rt.training.cli import main as command

    for name, columns in (("pretrain", ("loss/flow",)), ("rgpo", ("reward/total", "policy/entropy", "loss/kl_text"))):
        (tmp_path / name).mkdir()
        rows = [{"step": s, "grad_norm": 1.0, **{c: float(s) for c in columns}} for s in range(1, 5)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    runs = [str(tmp_path / name) for name in ("pretrain", "rgpo")]
    assert command(["plot", *runs, "--out", str(tmp_path / "runs.png")]) == 0
    assert (tmp_path / "runs.png").stat().st_size > 10_000
    assert command(["plot", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    assert command(["plot", *runs, "--out", str(tmp_path / "x.svg")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_only_a_base_run_of_the_same_configuration_is_taken_for_an_arm(tmp_path):
    config = load_config(CONFIGS / "shapes-rgpo.toml", ["out=elsewhere", "data.cache_latents=kept"])
    (tmp_path / "rgpo" / "model").mkdir(parents=True)
    (tmp_path / "rgpo" / "model" / "connector.safetensors").touch()
    path = tmp_path / "rgpo" / "config.json"
    arm = next(a for a in STUDIES["image KL"] if a.name == "base")
    path.write_text(json.dumps(config.to_dict()))
    assert _is_base(arm, arm.legs[0], tmp_path, 0, 1.0)
    assert not _is_base(arm, arm.legs[0], tmp_path, 1, 1.0)
    assert not _is_base(arm, arm.legs[0], tmp_path, 0, 0.5)
    for other in ("optim.steps=7", "rgpo.beta_image=1.0", "data.image_size=112"):
        path.write_text(json.dumps(load_config(CONFIGS / "shapes-rgpo.toml", [other]).to_dict()))
        assert not _is_base(arm, arm.legs[0], tmp_path, 0, 1.0)


def test_figures_of_records_and_of_validation_losses(tmp_path, capsys):
    from mindomni_rt.training.cli import main as command
    from mindomni_rt.training.evaluation.plots import _panels, arm_label

    root = Path(__file__).parents[2]
    assert command(["plot", "--study", str(root / "docs/ablations/stage-1.json"), "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"connector.png", "distillation.png"}
    record = root / "assets" / "shapes-world" / "evaluation.json"
    assert command(["plot", "--stages", str(record), "--out", str(tmp_path / "stages.png")]) == 0
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss/flow": 1.0}\n{"step": 2, "loss/flow": 0.5}\n')
    (tmp_path / "run" / "evaluation.jsonl").write_text('{"step": 0, "flow": 1.0}\n{"step": 2, "flow": 0.7}\n')
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    panels = _panels(tmp_path / "run", log)
    assert [p[0] for p in panels] == ["Loss terms", "Validation loss"]
    assert panels[1][2] == {"flow": [1.0, 0.7]}
    assert command(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "run.png")]) == 0
    for wrong in ([], ["--study", str(record)], [str(tmp_path / "run"), "--stages", str(record)]):
        assert command(["plot", *wrong, "--out", str(tmp_path / "x.png")]) == 2
    assert capsys.readouterr().err.count("error: ") == 3
    assert arm_label({"arm": "0 layers, 1/6 budget", "steps": 100}) == "linear only, 100 steps"
    assert arm_label({"arm": "1 layers, 1/2 budget", "steps": 300}) == "1 layer, 300 steps"
    assert arm_label({"arm": "1+2+3"}) == "stages 1 + 2 + 3" and arm_label({"arm": "base / 10"}) == "a tenth"
