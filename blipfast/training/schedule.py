"""Learning rates as pure functions of the position in training, so that a resumed run needs no schedule state."""

from __future__ import annotations

import math

from ..config import TrainConfig
from ..config_checks import SCHEDULES


def learning_rate(train: TrainConfig, step: int, epoch: int, total_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0), which lies in `epoch` (from 0), of `total_steps`.

    step           official pre-training: linear warm-up during the first epoch only, cut short by its end; then
                   lr * lr_decay_rate ** epoch, at least min_lr
    cosine         official fine-tuning: half a cosine from lr to min_lr, constant within an epoch, no warm-up
    warmup_cosine  linear warm-up over warmup_steps, then half a cosine to min_lr, at every step

    Raises ValueError for another name.
    """
    if train.schedule == "cosine":
        return _cosine(train, epoch / train.epochs)
    if train.schedule == "step":
        if epoch == 0:
            return _warmup(train, step)
        return max(train.min_lr, train.lr * train.lr_decay_rate**epoch)
    if train.schedule == "warmup_cosine":
        if step < train.warmup_steps:
            return _warmup(train, step)
        return _cosine(train, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    raise ValueError(f"train.schedule: {train.schedule!r} is not known. Choose one of {', '.join(SCHEDULES)}")


def _warmup(train: TrainConfig, step: int) -> float:
    if train.warmup_steps == 0:
        return train.lr
    return min(train.lr, train.warmup_lr + (train.lr - train.warmup_lr) * step / train.warmup_steps)


def _cosine(train: TrainConfig, progress: float) -> float:
    return train.min_lr + (train.lr - train.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
