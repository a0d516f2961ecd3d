"""`blipfast tune`: search hyperparameters."""

from __future__ import annotations

import argparse
from typing import Any

from .common import add_verb, positive

EXAMPLES = """examples:
  blipfast tune --config configs/retrieval_flickr.yaml --space space.yaml --trials 20 --output runs/tuned
  CUDA_VISIBLE_DEVICES=1 blipfast tune ... the same ...      # a second worker on the same search
  blipfast tune ... --launcher "deepspeed --num_gpus 8"      # each trial on eight GPUs

space.yaml names settings of the config, each with a range or choices:
  train.lr: {low: 1e-5, high: 1e-3, log: true}
  train.epochs: {low: 2, high: 8}
  data.randaugment: [official, strong, none]

The same command goes on where an interrupted search stopped. Needs: pip install 'blipfast[tune]'
"""


def add(verbs: Any) -> None:
    parser = add_verb(verbs, "tune", tune, "search hyperparameters of a config", EXAMPLES)
    parser.add_argument("--config", required=True, help="the YAML file of the training")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="of all trials"
    )
    parser.add_argument("--space", required=True, help="a YAML file: settings, and their ranges or choices")
    parser.add_argument(
        "--trials", type=positive, default=20, help="in all, earlier ones included (default: 20)"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="where the study and all runs are kept"
    )
    parser.add_argument(
        "--metric", default="", help="validation figure to maximise (default: the task's own)"
    )
    parser.add_argument(
        "--pruner",
        choices=["median", "halving", "none"],
        default="median",
        help="ends poor trials (%(default)s)",
    )
    parser.add_argument("--launcher", default="", help="what starts a run (default: one process)")
    parser.add_argument("--keep-weights", action="store_true", help="of every trial, not only of the best")


def tune(args: argparse.Namespace) -> int:
    """Search, and say what is best."""
    from blipfast.tune import tune

    study = tune(
        args.config,
        args.space,
        args.trials,
        args.output,
        overrides=args.set,
        metric=args.metric,
        pruner=args.pruner,
        launcher=args.launcher,
        keep_weights=args.keep_weights,
    )
    complete = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not complete:
        raise ValueError(f"{args.output}: no trial came to its end; see trials/*/train.log in it.")
    best = study.best_trial
    print(f"best: trial {best.number}, {best.value:.4g}, {args.output}/trials/{best.user_attrs['folder']}")
    print(f"config: {args.output}/best.yaml; look at {args.output}/study.html")
    return 0
