"""What every fine-tuning task inherits: the best weights, early stopping, resuming, starting weights, one's own tasks.

The task here takes its validation figures from a list, so that each test says which epoch must win.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from blipfast.config import config_from_dict
from blipfast.tasks import build, task_class
from blipfast.tasks.finetune import FineTuneTask, Trainable, load_starting_weights, selected
from blipfast.training import run
from tests.launch import records
from tests.toy_run import ToyLoader


class Model(Trainable, nn.Module):
    """One weight that every step moves, so that each epoch's weights differ."""

    class tokenizer:
        save = staticmethod(lambda path: path.write_text("{}"))

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 1)
        self.steps = nn.Parameter(torch.zeros([]))

    def forward(self, batch, *, alpha):
        return {"loss": (self.steps - 1000.0).abs() + 0.0 * self.head.weight.sum()}


class ScriptedTask(FineTuneTask):
    """Epoch e's weights score FIGURES[e - 1] on val; -1 on test is the weight that was tested."""

    best_metric = "score"
    FIGURES: list[float] = []
    seen: list[tuple[str, float]] = []

    @classmethod
    def build_model(cls, config):
        return Model()

    def build_loader(self):
        return ToyLoader(8, 4, 0, self.rank, self.world_size, 1)

    @classmethod
    def evaluate_checkpoint(cls, config, checkpoint, split, output, device):
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        file = checkpoint if checkpoint.is_file() else checkpoint / "model.safetensors"
        weight = float(load_file(file)["steps"])
        cls.seen.append((split, weight))
        epoch = round(weight / 2)  # two steps of 1 an epoch
        return {"score": cls.FIGURES[epoch - 1], "other": -cls.FIGURES[epoch - 1], "epoch_seen": epoch}


@pytest.fixture
def task(monkeypatch):
    """A fresh subclass, so that tests share no figures; the curves are not drawn."""
    monkeypatch.setattr("blipfast.tasks.finetune.plot_curves", lambda log, picture: None)
    return type("Task", (ScriptedTask,), {"seen": []})


def settings(tmp_path, **train):
    values = {
        "epochs": 5,
        "batch_size": 4,
        "optimizer": "adamw",
        "lr": 1.0,
        "min_lr": 1.0,
        "weight_decay": 0.0,
    }
    values |= {"schedule": "cosine", "eps": 1e-12, "evaluate_every": 1, "log_every": 1, **train}
    data = {"val": "val.json", "test": "test.json"}
    return config_from_dict({"task": "caption", "output": str(tmp_path), "data": data, "train": values})


def read(path):
    return json.loads(path.read_text())


def steps_in(path):
    return round(float(load_file(path)["steps"]))


def test_the_run_folder_ends_with_the_best_weights_which_are_tested(task, tmp_path):
    task.FIGURES = [1.0, 3.0, 2.0, 3.0, 0.5]
    assert run(settings(tmp_path), task) == 0
    assert steps_in(tmp_path / "model.safetensors") == 4, "epoch 2: an equal score later is not better"
    assert steps_in(tmp_path / "last.safetensors") == 10
    assert [split for split, _ in task.seen] == ["val"] * 5 + ["test"]
    assert task.seen[-1][1] == pytest.approx(4, abs=1e-3)
    best = read(tmp_path / "best.json")
    assert best["best_epoch"] == 2 and best["metric"] == "score" and best["metrics"]["score"] == 3.0
    assert list(best["history"].values()) == task.FIGURES
    figures = read(tmp_path / "metrics.json")
    assert figures["val"]["epoch_seen"] == figures["test"]["epoch_seen"] == figures["best_epoch"] == 2
    assert read(tmp_path / "result" / "val_epoch_05" / "metrics.json")["score"] == 0.5


def test_train_select_names_another_rule(task, tmp_path):
    task.FIGURES = [1.0, 3.0, 0.5, 3.0, 2.0]
    assert run(settings(tmp_path, select="other"), task) == 0
    assert steps_in(tmp_path / "model.safetensors") == 6


def test_a_figure_that_is_no_number_is_never_the_best(task, tmp_path):
    task.FIGURES = [math.nan, 1.0, math.nan, 0.5, math.nan]
    assert run(settings(tmp_path), task) == 0
    assert steps_in(tmp_path / "model.safetensors") == 4


def test_patience_ends_training_and_the_finished_run_is_left_alone(task, tmp_path, capsys):
    task.FIGURES = [1.0, 3.0, 2.0, 2.5, 9.0]
    assert run(settings(tmp_path, patience=2), task) == 0
    assert "stopped after epoch 4" in capsys.readouterr().out
    assert steps_in(tmp_path / "model.safetensors") == 4 and steps_in(tmp_path / "last.safetensors") == 8
    assert read(tmp_path / "metrics.json")["test"]["epoch_seen"] == 2
    task.seen.clear()
    assert run(settings(tmp_path, patience=2), task) == 0
    assert "is complete" in capsys.readouterr().out and not task.seen
    assert run(settings(tmp_path, patience=3), task) == 0, "more patience: it goes on"
    assert steps_in(tmp_path / "model.safetensors") == 10


def test_a_run_killed_between_checkpoint_and_validation_validates_first_when_it_resumes(task, tmp_path):
    task.FIGURES = [1.0, 3.0, 2.0, 2.5, 0.0]
    unhurt = task.evaluate_checkpoint.__func__

    def killed(cls, config, checkpoint, split, output, device):
        metrics = unhurt(cls, config, checkpoint, split, output, device)
        if metrics["epoch_seen"] == 2:
            raise KeyboardInterrupt
        return metrics

    task.evaluate_checkpoint = classmethod(killed)
    with pytest.raises(KeyboardInterrupt):
        run(settings(tmp_path), task)
    assert read(tmp_path / "best.json")["best_epoch"] == 1
    task.evaluate_checkpoint = classmethod(unhurt)
    task.seen.clear()
    assert run(settings(tmp_path), task) == 0
    assert [round(weight / 2) for split, weight in task.seen if split == "val"] == [2, 3, 4, 5]
    assert list(read(tmp_path / "best.json")["history"]) == ["1", "2", "3", "4", "5"]
    assert steps_in(tmp_path / "model.safetensors") == 4
    epochs = [record["epoch"] for record in records(tmp_path) if record.get("event") == "evaluate"]
    assert epochs == [1, 2, 3, 4, 5]


def test_resuming_before_the_best_epoch_forgets_it_because_its_weights_are_of_another_future(task, tmp_path):
    task.FIGURES = [1.0, 2.0, 9.0, 4.0, 3.0]
    assert run(settings(tmp_path, keep_checkpoints=9), task) == 0
    task.FIGURES = [1.0, 2.0, 1.5, 4.0, 3.0]
    early = tmp_path / "checkpoints" / "step_0000004"
    assert run(settings(tmp_path), task, resume=str(early)) == 0
    assert steps_in(tmp_path / "model.safetensors") == 8


def test_starting_afresh_forgets_the_best_of_an_earlier_run(task, tmp_path):
    task.FIGURES = [9.0, 1.0, 1.0, 1.0, 1.0]
    assert run(settings(tmp_path), task) == 0
    task.FIGURES = [1.0, 2.0, 1.0, 1.0, 1.0]
    assert run(settings(tmp_path), task, overwrite=True) == 0
    assert steps_in(tmp_path / "model.safetensors") == 4


def test_without_a_validation_set_the_newest_weights_are_kept_and_tested(task, tmp_path):
    config = settings(tmp_path)
    config.data.val = ""
    task.FIGURES = [0.0] * 5
    assert run(config, task) == 0
    assert steps_in(tmp_path / "model.safetensors") == 10 and not (tmp_path / "last.safetensors").exists()
    assert [split for split, _ in task.seen] == ["test"]
    assert read(tmp_path / "metrics.json")["test"]["epoch_seen"] == 5


def test_a_run_cut_short_in_an_epoch_is_validated_as_that_epoch(task, tmp_path):
    task.FIGURES = [1.0, 5.0, 2.0]
    assert run(settings(tmp_path, max_steps=5), task) == 0
    assert read(tmp_path / "best.json")["history"] == {"1": 1.0, "2": 5.0, "3": 5.0}, (
        "5 steps round to epoch 2"
    )
    assert steps_in(tmp_path / "model.safetensors") == 4


def test_a_rule_may_add_figures_up_and_an_unknown_one_is_named():
    assert selected({"CIDEr": 1.25, "Bleu_4": 0.5}, "CIDEr + Bleu_4") == 1.75
    with pytest.raises(ValueError, match="'BLEU' is not a figure .* gives CIDEr, Bleu_4"):
        selected({"CIDEr": 1.25, "Bleu_4": 0.5}, "CIDEr+BLEU")


def test_ones_own_task_is_named_by_module_and_class(tmp_path):
    data = {"val": "val.json", "train": ["train.json"]}
    config = config_from_dict({"task": f"{__name__}:ScriptedTask", "output": str(tmp_path), "data": data})
    assert isinstance(build(config), FineTuneTask)
    for name, message in (
        ("dance", "'dance' is not one of caption"),
        ("no.such.module:Task", "No module named"),
        (f"{__name__}:Missing", "Missing"),
    ):
        with pytest.raises(ValueError, match=message):
            task_class(name)


def test_starting_weights_may_lack_only_what_is_named(tmp_path):
    config = settings(tmp_path)
    config.model.init_from = str(tmp_path / "start.safetensors")
    save_file({"steps": torch.tensor(7.0)}, config.model.init_from)
    with pytest.raises(ValueError, match="head"):
        load_starting_weights(Model(), config)
    model = Model()
    model.starts_random = ("head",)
    load_starting_weights(model, config)
    assert model.steps == 7
    config.model.allow_random = ["head"]
    load_starting_weights(Model(), config)


def test_figures_of_another_rule_are_not_compared_with(task, tmp_path):
    """By "score" the second epoch is the best; by "other", on which training goes on, the fourth."""
    task.FIGURES = [2.0, 3.0, 1.0, 0.5]
    run(settings(tmp_path, epochs=2), task)
    assert read(tmp_path / "best.json")["best_epoch"] == 2
    run(settings(tmp_path, epochs=4, select="other"), task)
    best = read(tmp_path / "best.json")
    assert (best["metric"], best["best_epoch"], steps_in(tmp_path / "model.safetensors")) == ("other", 4, 8)


def test_a_precision_without_hardware_is_refused_before_training(task, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = settings(tmp_path)
    config.evaluate.precision = "fp8"
    with pytest.raises(ValueError, match="precision fp8 is for NVIDIA's GPUs"):
        task(config)
