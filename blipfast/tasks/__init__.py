"""One file a task: its model, its batches, its loss, its evaluation. `build` makes the one that a config names."""

from __future__ import annotations

from importlib import import_module

from blipfast.config import Config

TASKS = {"pretrain": "blipfast.tasks.pretrain:PretrainTask"}  # name in a config: module and class


def build(config: Config, rank: int = 0, world_size: int = 1):
    """The task of `config.task`, with its model on the CPU and this rank's share of the data."""
    if config.task not in TASKS:
        raise ValueError(f"task: {config.task!r} is not one of {', '.join(sorted(TASKS))}.")
    module, name = TASKS[config.task].split(":")
    return getattr(import_module(module), name)(config, rank, world_size)
