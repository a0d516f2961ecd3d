"""A task on a few small pictures: the config of a model of milliseconds, weights to judge by, figures of its splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from blipfast.config import Config, config_from_dict
from blipfast.models.checkpoint import save_weights
from blipfast.tasks import task_class
from tests.conftest import BERT, VIT

COLOURS = ["red", "green", "blue", "white", "black"]


def settings(task: str, folder: Path, output: Any, data: dict, **changes: Any) -> Config:
    """A config of a tiny model, with the tokenizer in `folder`; changes like data_test="..."."""
    values = {
        "task": task,
        "output": str(output),
        "model": {
            "vit": {**VIT, "depth": 1},
            "image_size": 32,
            "med_config": {**BERT, "num_hidden_layers": 1},
            "tokenizer": str(folder / "tokenizer.json"),
        },
        "data": {"workers": 0, **data},
        "train": {"epochs": 1, "batch_size": 3, "warmup_steps": 0, "lr": 1e-3, "precision": "fp32"},
        "evaluate": {"batch_size": 4, "k_test": 5},
    }
    for name, value in changes.items():
        section, _, key = name.partition("_")
        values[section][key] = value
    return config_from_dict(values)


def random_weights(config: Config, path: Path, seed: int, spread: float) -> Path:
    """Write random weights; `spread` further apart than training starts, so that outputs differ from input to input."""
    torch.manual_seed(seed)
    model = task_class(config.task).build_model(config)
    for parameter in model.parameters():
        parameter.data += spread * torch.randn_like(parameter)
    return save_weights(model.state_dict(), path)


def evaluate(config: Config, weights: Any, output: Any, split: str = "test") -> dict[str, float]:
    """The task's figures on a split; its result file is then in `output`."""
    task = task_class(config.task)
    return task.evaluate_checkpoint(config, Path(weights), split, Path(output), torch.device("cpu"))


def evaluate_splits(values: dict, weights: str, output: str) -> list[dict[str, float]]:
    """Figures of test and val, of a config as plain values; results in folders of these names. For `on_ranks`."""
    config = config_from_dict(values)
    return [evaluate(config, weights, Path(output) / split, split) for split in ("test", "val")]


def changed(source: Path, i: int, keys: dict[str, Any]) -> str:
    """A copy of a file of entries, one a line from line 2 on, with keys of entry i changed (None: removed)."""
    entries = json.loads(source.read_text())
    entries[i] = {key: value for key, value in (entries[i] | keys).items() if value is not None}
    path = source.with_name("malformed.json")
    path.write_text("[\n" + ",\n".join(map(json.dumps, entries)) + "\n]")
    return str(path)
