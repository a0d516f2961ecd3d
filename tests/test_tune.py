"""Hyperparameter search: spaces, trials in folders of their own, pruning, resuming, and what is reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from blipfast.cli import main
from blipfast.config import ConfigError, load_config
from blipfast.tune_space import read_space
from tests import caption_sets
from tests.launch import TESTS

optuna = pytest.importorskip("optuna")
from blipfast.tune import tune  # noqa: E402

SCRIPT = TESTS / "tune_run.py"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr("blipfast.tune.POLL", 0.05)
    path = tmp_path / "config.yaml"
    path.write_text("task: retrieval\ndata: {train: [a.json], val: v.json, test: t.json}\noutput: runs/x\n")
    return path


def space(tmp_path, text="train.lr: {low: 1e-5, high: 1e-1, log: true}\n"):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return path


def search(config, tmp_path, trials, text="train.lr: {low: 1e-5, high: 1e-1, log: true}\n", **more):
    return tune(config, space(tmp_path, text), trials, tmp_path / "out", script=SCRIPT, **more)


def states(study):
    return [trial.state.name for trial in study.trials]


def test_settings_of_every_kind_are_read_and_suggested_as_the_config_wants_them(config, tmp_path):
    text = """
train.lr: {low: 1e-5, high: 1e-3, log: true}
loss.alpha: {low: 0, high: 0.6, step: 0.2}
loss.temperature_max: {low: 1, high: 2}
train.epochs: {low: 2, high: 8}
model.vit: [base, {width: 32, depth: 2, heads: 4}]
deepspeed.zero_optimization.stage: {low: 0, high: 3}
"""
    settings = {setting.name: setting for setting in read_space(space(tmp_path, text), config)}
    study = optuna.create_study()
    kinds = {"train.lr": float, "loss.alpha": float, "loss.temperature_max": float, "train.epochs": int}
    for _ in range(8):
        trial = study.ask()
        values = {name: setting.suggest(trial) for name, setting in settings.items()}
        assert all(type(values[name]) is kind for name, kind in kinds.items())
        assert min(abs(values["loss.alpha"] - step) for step in (0, 0.2, 0.4, 0.6)) < 1e-9
        assert values["model.vit"] in ("base", {"width": 32, "depth": 2, "heads": 4})
        assert type(values["deepspeed.zero_optimization.stage"]) is int
        assert {name: json.loads(text) for name, text in trial.user_attrs["settings"].items()} == values


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "train.lrr: {low: 1, high: 2}",
            r"space.yaml:1: train.lrr is not a setting. Did you mean train.lr\?",
        ),
        ("seed: [1, 2]\ntrain.batch_size: {low: 0, high: 4}", "space.yaml:2: train.batch_size is 0"),
        ("train.schedule: [step, linear]", "space.yaml:1: train.schedule is 'linear'; expected one of step"),
        ("train.lr: {low: 1, high: 1}", "space.yaml:1: train.lr: low must be below high"),
        ("train.lr: {low: 0, high: 1, log: true}", "low must be below high, and above 0"),
        ("train.lr: {low: 1, high: 2, logg: true}", "expected a list of choices or"),
        ("train.lr: {low: a, high: 2}", "low, high and step are numbers"),
        ("train.lr: {low: 0.1, high: 2, log: true, step: 1}", "log and step exclude each other"),
        ("train.lr: [1]", "a choice of 1"),
        ("train.lr: 3", "expected a list of choices or"),
    ],
)
def test_a_mistake_in_a_space_names_file_line_and_setting(config, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_space(space(tmp_path, text), config)


def test_each_trial_is_a_run_of_its_own_and_the_best_validation_counts(config, tmp_path, capsys):
    study = search(config, tmp_path, 4, pruner="none", overrides=["seed=7", "train.batch_size=8"])
    assert states(study) == ["COMPLETE"] * 4
    for trial in study.trials:
        run = tmp_path / "out" / "trials" / f"{trial.number:04d}"
        (line,) = (run / "train.log").read_text().splitlines()
        settings = json.loads(line.removeprefix("settings "))
        assert settings.pop("train.lr") == json.dumps(trial.params["train.lr"])
        assert settings == {
            "seed": "7", "train.batch_size": "8", "data.test": "", "train.select": "r_mean", "output": str(run)
        }  # fmt: skip
        figures = [json.loads(record)["r_mean"] for record in (run / "log.jsonl").read_text().splitlines()]
        assert trial.value == max(figures) == figures[1]
        assert not (run / "checkpoints").exists()
        assert (run / "model.safetensors").exists() == (trial.number == study.best_trial.number)
    best = load_config(tmp_path / "out" / "best.yaml")
    assert best.train.lr == study.best_params["train.lr"] and best.data.test == "t.json" and best.seed == 7
    assert (tmp_path / "out" / "study.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "study.html").read_text()
    assert page.count("<tr") == 5 and "data:image/png" in page
    assert f"best {study.best_value:.4g} of trial {study.best_trial.number}" in capsys.readouterr().out


def test_poor_trials_are_pruned_on_the_validation_metric_and_failed_ones_are_told(config, tmp_path, capsys):
    values = ["1e-3"] * 5 + ["1e-5", "1e-3"]
    text = "train.lr: [1.0e-3, 1.0e-5]\ntrain.batch_size: [8, 13]\n"
    study = search(config, tmp_path, 0, text)
    for place, lr in enumerate(values):
        params = {"train.lr": json.dumps(float(lr)), "train.batch_size": "13" if place == 6 else "8"}
        study.enqueue_trial(params)
    began = time.monotonic()
    study = search(config, tmp_path, 7, text)
    assert time.monotonic() - began < 20
    assert states(study) == ["COMPLETE"] * 5 + ["PRUNED", "FAIL"]
    assert len(study.trials[5].intermediate_values) == 1
    printed = capsys.readouterr().out
    assert "trial 5 pruned after 1 validations" in printed
    assert "trial 6 failed: error: thirteen is not a batch size" in printed
    settings = (tmp_path / "out" / "trials" / "0000" / "train.log").read_text()
    assert '"train.evaluate_every": "1"' in settings


def test_a_search_goes_on_after_a_kill_and_the_interrupted_run_resumes_in_its_folder(config, tmp_path):
    search(config, tmp_path, 2, pruner="none")
    (tmp_path / "out" / "pause").touch()
    code = (
        "import sys; from blipfast.tune import tune; tune(*sys.argv[1:3], 3, sys.argv[3], pruner='none', "
        "script=sys.argv[4])"
    )
    arguments = [str(config), str(tmp_path / "space.yaml"), str(tmp_path / "out"), str(SCRIPT)]
    killed = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=TESTS.parent)
    log = tmp_path / "out" / "trials" / "0002" / "log.jsonl"
    end = time.monotonic() + 60
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    (tmp_path / "out" / "pause").unlink()
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    study = search(config, tmp_path, 4, pruner="none")
    assert states(study) == ["COMPLETE", "COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    resumed = study.trials[3]
    assert resumed.user_attrs["folder"] == "0002" and resumed.params == study.trials[2].params
    assert len(log.read_text().splitlines()) == 3 and len(resumed.intermediate_values) == 3
    assert len({trial.params["train.lr"] for trial in study.trials}) == 4, "no restart draws the same again"
    assert states(search(config, tmp_path, 4, pruner="none")) == states(study), "nothing is left to do"
    with pytest.raises(ValueError, match="holds a search with another metric"):
        search(config, tmp_path, 5, metric="other")


def test_a_trial_is_a_real_training(tmp_path):
    """With the real train.py: it leaves its figures and weights, and best.yaml is its config."""
    sets = caption_sets.coco(tmp_path / "sets", tests=3)
    folder = sets / "annotations"
    overrides = [f"data.train=[{folder}]", f"data.val={folder}", f"data.image_root={sets / 'images'}"]
    overrides += [f"model.tokenizer={sets / 'tokenizer.json'}", "train.max_steps=2"]
    config = TESTS / "data" / "retrieval.yaml"
    study = tune(config, space(tmp_path), 1, tmp_path / "out", overrides=overrides, pruner="none")
    assert states(study) == ["COMPLETE"]
    run = tmp_path / "out" / "trials" / "0000"
    assert json.loads((run / "metrics.json").read_text())["val"]["r_mean"] == study.best_value
    assert load_config(run / "config.yaml").train.lr == study.best_params["train.lr"]
    assert load_config(tmp_path / "out" / "best.yaml").train.lr == study.best_params["train.lr"]
    assert (run / "model.safetensors").exists() and not (run / "checkpoints").exists()


def test_what_cannot_be_searched_is_said_before_anything_runs(config, tmp_path):
    with pytest.raises(ValueError, match="data.val is empty"):
        search(config, tmp_path, 1, overrides=["data.val="])
    with pytest.raises(ValueError, match="does not say what to maximise"):
        search(config, tmp_path, 1, overrides=["task=pretrain"])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="the first 3 trials failed.*thirteen is not a batch size"):
        search(config, tmp_path, 9, overrides=["train.batch_size=13"])


def test_the_verb_searches_and_says_where_the_best_is(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("blipfast.tune.TRAIN", SCRIPT)
    arguments = ["--config", str(config), "--space", str(space(tmp_path)), "--output", str(tmp_path / "out")]
    assert main(["tune", *arguments, "--trials", "2", "--metric", "other", "--pruner", "none"]) == 0
    assert "best: trial 0, 2, " in capsys.readouterr().out
