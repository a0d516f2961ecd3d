"""`blipfast evaluate`: the figures and result files of a checkpoint, by a task's published protocol."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from .common import add_verb, choose_device

EXAMPLES = """examples:
  blipfast evaluate --config configs/caption_coco.yaml --checkpoint model_base_caption_capfilt_large.pth
  blipfast evaluate --checkpoint runs/caption_coco --split val
  torchrun --nproc_per_node 8 -m blipfast evaluate --config configs/nocaps.yaml --checkpoint runs/caption_coco

Every sample is evaluated exactly once, whatever the number of processes, and the figures are the same.
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "evaluate", evaluate, "evaluate a checkpoint by its task's protocol", EXAMPLES)
    parser.add_argument("--config", help="the task's YAML file (default: the run folder's)")
    parser.add_argument(
        "--checkpoint", required=True, help="a run folder or a checkpoint (.pth, .safetensors, ...)"
    )
    parser.add_argument(
        "--split", choices=("val", "test"), default="test", help="data.val or data.test (default: test)"
    )
    parser.add_argument("--output", help="where results go (default: OUTPUT/evaluate/CHECKPOINT_SPLIT)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="data.test=my.jsonl ..."
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")


def evaluate(args: argparse.Namespace) -> int:
    """Evaluate on one process or, started by torchrun, on many; rank 0 writes and speaks."""
    import torch

    from blipfast.config import load_config
    from blipfast.tasks import task_class
    from blipfast.tasks.finetune import evaluate_checkpoint
    from blipfast.training import distributed
    from blipfast.training.errors import TrainingError

    run = Path(args.checkpoint)
    if not args.config and not (run / "config.yaml").is_file():
        raise ValueError(
            "--config is missing: the YAML file that says task, model and data (a run folder holds one)."
        )
    config = load_config(args.config or run / "config.yaml", args.set)
    if not args.config and (run / "tokenizer.json").is_file():
        config.model.tokenizer = str(run / "tokenizer.json")
    task = task_class(config.task)
    if not hasattr(task, "evaluate_checkpoint"):
        raise ValueError(
            f"task {config.task} has no evaluation of its own; give the config of a task that has, such as "
            "configs/caption_coco.yaml or configs/retrieval_coco.yaml, to evaluate these weights by."
        )
    joined = distributed.connected()
    try:
        world = distributed.connect()
    except TrainingError as error:
        raise ValueError(str(error)) from None
    try:
        device = world.device if world.size > 1 else torch.device(choose_device(args.device))
        output = Path(args.output or Path(config.output) / "evaluate" / f"{run.stem}_{args.split}")
        metrics = evaluate_checkpoint(task, config, args.checkpoint, args.split, output, device)
    finally:
        if not joined:
            distributed.disconnect()
    if world.rank == 0:
        width = max(map(len, metrics))
        print(*(f"{name:<{width}}  {value:.6g}" for name, value in metrics.items()), sep="\n")
        print(f"results: {output}/", file=sys.stderr)
    return 0
