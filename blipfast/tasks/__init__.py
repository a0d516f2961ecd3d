"""One file a task: its model, its batches, its loss, its evaluation. `build` makes the one that a config names.

What the training loop asks of a task stands at the top of `blipfast/training/loop.py`. A task that fine-tunes and is
evaluated by a published protocol is a subclass of `finetune.FineTuneTask` and brings

    build_model(config) -> model     classmethod; a `finetune.Trainable` whose state_dict has the official keys; its
                                     `starts_random`, if any, names weights that starting checkpoints lack
    build_loader() -> loader         pairs of picture and caption unless overridden
    evaluate_checkpoint(config, checkpoint, split, output, device) -> {metric: figure}
                                     classmethod; called by every rank, each takes its share of the samples
                                     (`sharing.my_share`, `sharing.collect`); rank 0 writes the result files in the
                                     official format into `output` (`finetune.write_json`); every rank returns the
                                     same figures. `split` is "val" or "test", the sources data.val and data.test
    best_metric                      the official rule for the best weights, higher is better; "A+B" is a sum
    figures                          names of its figures, so that train.select is checked before training

The same class then serves `blipfast/train.py` and `blipfast evaluate`. A task of your own needs no line here: write
`task: my_package.my_module:MyTask` in the config, with its folder on PYTHONPATH.
"""

from __future__ import annotations

from importlib import import_module

from blipfast.config import Config

TASKS = {  # name in a config: module and class
    "pretrain": "blipfast.tasks.pretrain:PretrainTask",
    "caption": "blipfast.tasks.caption:CaptionTask",
    "retrieval": "blipfast.tasks.retrieval:RetrievalTask",
    "vqa": "blipfast.tasks.vqa:VQATask",
    "nlvr": "blipfast.tasks.nlvr:NLVRTask",
}


def task_class(name: str) -> type:
    """The class of a task, by its name in `TASKS` or as "module:Class". Raises ValueError if there is none."""
    if ":" not in name and name not in TASKS:
        raise ValueError(
            f"task: {name!r} is not one of {', '.join(sorted(TASKS))}; a task of your own is module:Class."
        )
    module, _, attribute = TASKS.get(name, name).partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(
            f"task: {name!r} cannot be loaded ({error}). Is its folder on PYTHONPATH?"
        ) from error


def build(config: Config, rank: int = 0, world_size: int = 1):
    """The task of `config.task`, with its model on the CPU and this rank's share of the data."""
    return task_class(config.task)(config, rank, world_size)
