"""What the fine-tuning tasks share: starting weights, validation, the best weights, early stopping, the last word.

A run folder holds

    model.safetensors    the best weights so far by the validation metric (without data.val: the newest)
    last.safetensors     with data.val: the weights that were validated last
    tokenizer.json       beside them and config.yaml, so that every verb of `blipfast` takes the folder as a model
    best.json            which epoch is the best, by which metric, and the figure of each epoch
    result/              result files and metrics.json of val_epoch_01/, val_epoch_02/, ... and test/
    metrics.json         the figures of the best weights: {"val": {...}, "test": {...}, "best_epoch": 3}

Every rank evaluates from these files: on several machines the folder must be one that all of them see.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blipfast.config import Config
from blipfast.data.loader import build_train_loader
from blipfast.data.text_augment import text_augment
from blipfast.data.transforms import Transform, train_transform
from blipfast.files import whole
from blipfast.models import gather
from blipfast.models.checkpoint import (
    WEIGHTS,
    load_bert,
    load_checkpoint,
    load_vit,
    load_weights,
    read_state_dict,
    save_weights,
)
from blipfast.precision import dtype_of
from blipfast.quantize import prepare
from blipfast.text import load_tokenizer

from .curves import plot_curves
from .sharing import from_main

LAST = "last.safetensors"
BEST = "best.json"


class Trainable:
    """The training loop's wishes for a model without momentum encoders; put it before the BLIP class.

    The model's forward(batch, *, alpha) returns {"loss": scalar, and detached scalars for the log}.
    """

    momentum = 0.0

    def momentum_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(trained, average) parameters."""
        return []

    def clamped(self) -> list[tuple[nn.Parameter, float, float]]:
        """(parameter, low, high): kept within these limits after every step."""
        return []

    def end_step(self) -> None:
        """Called after every optimizer step."""


class FineTuneTask(ABC):
    """A task of the training loop with validation. Subclasses: see `blipfast.tasks`."""

    best_metric = ""
    figures: tuple[str, ...] = ()  # names that train.select may use, if they are known beforehand

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1):
        self.config, self.rank, self.world_size = config, rank, world_size
        self._check_selection()
        dtype_of(config.evaluate.precision, "cuda" if torch.cuda.is_available() else "cpu")  # refused now
        self.check_evaluation()
        self.loader = self.build_loader()
        self.model = self.build_model(config)
        load_starting_weights(self.model, config)
        self.start = time.time()
        self.best_epoch: int | None = None
        self.history: dict[int, float] = {}  # what each epoch's weights reached in the metric that selects

    # ---- what a task brings

    @classmethod
    @abstractmethod
    def build_model(cls, config: Config) -> nn.Module:
        """The model a config describes, on the CPU, without starting weights. A `Trainable` with official keys."""

    @classmethod
    @abstractmethod
    def evaluate_checkpoint(
        cls, config: Config, checkpoint: Path, split: str, output: Path, device: torch.device
    ) -> dict[str, float]:
        """Figures of the weights in `checkpoint` (a file or a run folder) on `split`, "val" or "test".

        Every rank calls it, on its share of the samples, and gets the same figures; rank 0 writes result files.
        Call it through the function of the same name in this module.
        """

    def build_loader(self):
        """Micro-batches of this rank: pairs of picture and caption, with the config's augmentation."""
        config = self.config
        return build_train_loader(
            config.data,
            config.train,
            augmentation(config),
            config.seed,
            self.rank,
            self.world_size,
            text_augment(config.data),
        )

    def check_evaluation(self) -> None:  # noqa: B027
        """Read the annotations of data.val and data.test, so that what is wrong there is found before training."""

    # ---- what tasks use

    @classmethod
    def load_model(cls, config: Config, checkpoint: Path, device: torch.device) -> nn.Module:
        """`build_model` with all of its weights from `checkpoint`, in evaluation mode on `device`.

        Raises FileNotFoundError or ValueError if the checkpoint is missing, broken or of another model.
        """
        model = cls.build_model(config)
        load_checkpoint(model, checkpoint, allow_missing=False)
        return prepare(model, config.evaluate.precision, device)

    # ---- the training loop's interface

    def alpha(self, step: int, steps_per_epoch: int) -> float:
        """Weight of the momentum targets, where there are any."""
        return 0.0

    def begin(self, epoch: int) -> None:
        """Before training, with the epochs already done: take up, or (at 0) forget, which weights are the best."""
        state = from_main(lambda: _read_state(Path(self.config.output) / BEST, epoch, self.rule))
        self.best_epoch, self.history = state["best_epoch"], {int(e): v for e, v in state["history"].items()}

    @property
    def rule(self) -> str:
        """The figure by which weights are the best."""
        return self.config.train.select or self.best_metric

    @property
    def stop(self) -> bool:
        """Whether train.patience evaluations have passed without better weights."""
        patience = self.config.train.patience
        return bool(patience) and sum(epoch > (self.best_epoch or 0) for epoch in self.history) >= patience

    def evaluate(self, model: nn.Module, epoch: int) -> dict[str, float] | None:
        """Export the weights; with data.val evaluate them there, on all ranks, and keep them if they are the best."""
        run, validate = Path(self.config.output), bool(self.config.data.val)
        weights = run / (LAST if validate else WEIGHTS)
        from_main(lambda: export_weights(model, weights))
        if not validate:
            return None
        metrics = self._figures("val", weights, run / "result" / f"val_epoch_{epoch:02d}", _device(model))
        value = selected(metrics, self.rule)
        best = math.nan if self.best_epoch is None else self.history[self.best_epoch]
        self.history[epoch] = value
        if self.best_epoch is None or value > best or (math.isnan(best) and not math.isnan(value)):
            self.best_epoch = epoch
        from_main(lambda: self._keep(weights, run, metrics))
        return metrics | {"selected": value, "best_epoch": self.best_epoch}

    def finish(self, model: nn.Module, metrics: dict[str, float]) -> None:
        """Evaluate the best weights on data.test, if there is one; draw the curves; say where everything is."""
        run, device = Path(self.config.output), _device(model)
        test = {}
        if self.config.data.test:
            test = self._figures("test", run / WEIGHTS, run / "result" / "test", device)
        if self.rank:
            return
        figures = {"best_epoch": self.best_epoch, "seconds": time.time() - self.start, "test": test}
        if self.best_epoch is not None:
            figures["val"] = json.loads((run / BEST).read_text())["metrics"]
        write_json(run / "metrics.json", figures)
        plot_curves(run / "log.jsonl", run / "curves.png")
        best = f", best of epoch {self.best_epoch}" if self.best_epoch is not None else ""
        print(f"weights{best}, tokenizer, config, curves and results: {run}/", flush=True)
        if test:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in test.items())
            print(f"test: {shown}\nfigures: {run / 'metrics.json'}", flush=True)

    # ---- details

    def _check_selection(self) -> None:
        train, validated = self.config.train, bool(self.config.data.val)
        for name in ("select", "patience"):
            if getattr(train, name) and not validated:
                raise ValueError(
                    f"train.{name} needs data.val, which is empty: name the annotations to validate on."
                )
        if train.patience and not train.evaluate_every:
            raise ValueError(
                "train.patience needs data.val and train.evaluate_every, which is 0: set it to 1."
            )
        if train.select and self.figures:
            selected(dict.fromkeys(self.figures, 0.0), train.select)

    def _figures(self, split: str, weights: Path, output: Path, device: torch.device) -> dict[str, float]:
        return evaluate_checkpoint(type(self), self.config, weights, split, output, device)

    def _keep(self, weights: Path, run: Path, metrics: dict[str, float]) -> None:
        state: dict[str, Any] = {"metric": self.rule}
        newest = max(self.history)
        if self.best_epoch == newest:
            with whole(run / WEIGHTS) as unfinished:
                shutil.copyfile(weights, unfinished)
        else:
            metrics = json.loads((run / BEST).read_text())["metrics"]
        state |= {"best_epoch": self.best_epoch, "history": self.history, "metrics": metrics}
        write_json(run / BEST, state)


def load_starting_weights(model: nn.Module, config: Config) -> None:
    """Load what model.init_vit, model.init_bert and model.init_from name, in this order.

    Of init_from only weights named by the model's `starts_random` and by model.allow_random (a part such as
    text_decoder, a key, a pattern such as *.crossattention.*) may be missing or of another shape. Raises ValueError
    for others, with what to do.
    A model may bring `adapt(tensors) -> tensors`, for checkpoints of another layout (NLVR2's twin cross-attention).
    """
    settings = config.model
    if settings.init_vit:
        load_vit(model.visual_encoder, settings.init_vit)
    for text_model in (getattr(model, name, None) for name in ("text_encoder", "text_decoder")):
        if settings.init_bert and text_model is not None:
            load_bert(text_model, settings.init_bert)
    if settings.init_from:
        state = getattr(model, "adapt", dict)(read_state_dict(settings.init_from))
        load_weights(
            model, state, settings.init_from, allow_missing=False, allow_random=settings.allow_random
        )


def evaluate_checkpoint(
    task: type, config: Config, checkpoint: str | Path, split: str, output: Path, device: torch.device
) -> dict[str, float]:
    """The figures of a checkpoint by a task's protocol, on every rank; also `output`/metrics.json.

    In evaluate.precision, whatever a run trains in. split: "val" or "test". Raises ValueError if the config has no such
    source, or what the task and the checkpoint raise.
    """
    if not getattr(config.data, split):
        raise ValueError(f"data.{split} is empty: name the annotations to evaluate on.")
    start = time.time()
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        metrics = task.evaluate_checkpoint(config, checkpoint, split, output, device)
    facts = {
        "task": config.task,
        "split": split,
        "checkpoint": str(checkpoint),
        "seconds": time.time() - start,
    }
    write_json(output / "metrics.json", metrics | facts)
    return metrics


def model_settings(config: Config) -> dict[str, Any]:
    """The arguments that every BLIP class takes, from the `model` section."""
    model = config.model
    return dict(
        med_config=model.med_config,
        image_size=model.image_size,
        vit=model.vit,
        vit_grad_ckpt=model.vit_grad_ckpt,
        vit_ckpt_layer=model.vit_ckpt_layer,
        tokenizer=load_tokenizer(model.tokenizer),
    )


def augmentation(config: Config) -> Transform:
    """The training transform of data.*, from a decoded picture to the model's input. Raises ValueError as it does."""
    data = config.data
    return train_transform(
        config.model.image_size, data.min_scale, data.flip, data.randaugment, data.noise, data.background
    )


def export_weights(model: nn.Module, weights: Path) -> None:
    """Save a model's weights, and its tokenizer beside them."""
    save_weights(model.state_dict(), weights)
    model.tokenizer.save(weights.parent / "tokenizer.json")


def selected(metrics: dict[str, float], rule: str) -> float:
    """The figure that `rule`, a metric or several joined by "+", gives. Raises ValueError for unknown metrics."""
    names = [name.strip() for name in rule.split("+")]
    if unknown := [name for name in names if name not in metrics]:
        raise ValueError(
            f"train.select: {unknown[0]!r} is not a figure of this evaluation; it gives {', '.join(metrics)}."
        )
    return math.fsum(metrics[name] for name in names)


def write_json(path: Path, value: Any) -> None:
    """Write a result file, whole or not at all, making its folder; ranks other than 0 do nothing."""
    if gather.rank():
        return
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_state(path: Path, epoch: int, rule: str) -> dict[str, Any]:
    """What best.json says, as far as it holds after `epoch` epochs.

    Empty if the best weights are of a later one, or were chosen by another figure than `rule`.
    """
    nothing = {"best_epoch": None, "history": {}}
    if not epoch:
        path.unlink(missing_ok=True)
    if not path.is_file():
        return nothing
    state = json.loads(path.read_text())
    if state["metric"] != rule:
        return nothing
    state["history"] = {e: value for e, value in state["history"].items() if int(e) <= epoch}
    return state if str(state["best_epoch"]) in state["history"] else nothing


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
