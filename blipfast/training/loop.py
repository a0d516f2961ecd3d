"""The loop: epochs, steps, logging, checkpoints, resume, signals. It knows nothing of BLIP; a task brings that.

    task.model                        forward(batch, *, alpha) -> {"loss": scalar, other detached scalars for the log};
                                      momentum_pairs(), momentum, clamped(), end_step()
    task.loader                       len() optimizer steps an epoch; iterate(epoch, start_step) -> micro-batches
    task.alpha(step, steps_per_epoch) -> float
    task.evaluate(model, epoch)       -> dict of metrics or None; every rank calls it, with the whole fp32 model and
                                      the number of epochs begun
    task.finish(model, metrics)       once, at the end, on every rank: export, gallery, ...
    task.begin(epoch)                 optional: before training, with the number of epochs already done
    task.stop                         optional: true after an evaluation that training should end with

Before micro-batch m of step s on rank r of W, torch's generator is seeded by (seed, s, m * W + r): dropout and sampling
are functions of the step, and one rank with accumulation 2 computes what two ranks without it compute.

On a GPU the host learns whether a step was finite, and whether a rank was told to stop, when it has handed the GPU the
next one, so that the GPU never waits for it; but always before anything of the step is recorded, saved or evaluated.
Until then a step whose gradient is not finite has left the weights alone.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import Config, to_dict
from ..tasks.sharing import from_main, is_main
from ..transfer import ToHost
from . import checkpoint, distributed
from .checkpoint import Position
from .distributed import World
from .ema import MomentumEncoders
from .engine import Engine
from .errors import NotFinite, TrainingError
from .lock import held
from .log import RunLog, read_records
from .optimizer import state_names
from .schedule import learning_rate
from .signals import handled
from .start import choose_start, open_run

Build = Callable[[Config, int, int], Any]  # (config, rank, world_size) -> task, its model on the CPU


def run(config: Config, build: Build, resume: str = "auto", overwrite: bool = False) -> int:
    """Train `build(config, rank, world_size)` as the config says; returns the process's exit status.

    resume     "auto": go on from the newest whole checkpoint of `config.output`, if any; a checkpoint folder; or
               "none": start afresh, refused if the output folder holds checkpoints
    overwrite  delete the checkpoints and the log of an earlier run in the output folder, then start afresh

    A finished run is left alone. On SIGTERM or SIGINT the step is finished, a checkpoint saved, and 0 returned; the
    same command goes on from there. (The deepspeed launcher kills its ranks 30 s after it was told to stop.)
    Raises ValueError, OSError or TrainingError with one message before any training time is spent.
    """
    joined = distributed.connected()  # by the caller, who then leaves it too
    world = distributed.connect()
    try:
        with contextlib.ExitStack() as stack:
            from_main(lambda: stack.enter_context(held(Path(config.output))))
            return _run(config, build, resume, overwrite, world)
    finally:
        if not joined:
            distributed.disconnect()


def _run(config: Config, build: Build, resume: str, overwrite: bool, world: World) -> int:
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    output = Path(config.output)
    start: Path | None = from_main(lambda: choose_start(output, resume, overwrite))
    torch.manual_seed(config.seed)
    task = build(config, world.rank, world.size)
    steps_per_epoch = len(task.loader)
    total = config.train.epochs * steps_per_epoch
    total = min(total, config.train.max_steps) if config.train.max_steps else total
    learning_rate(config.train, 0, 0, total)  # an unknown schedule is refused now
    facts = _facts(config, world, steps_per_epoch)

    position, notes, records = Position(), [], []
    if start is not None:
        state = checkpoint.read_state(start)
        notes = checkpoint.check_facts(start, state, facts)
        checkpoint.check_model(start, task.model, state_names(config.train, task.model))
        position = checkpoint.position(state)
        records = [] if overwrite else read_records(output / "log.jsonl")
    if hasattr(task, "begin"):
        task.begin(0 if overwrite else position.epoch)  # the earlier run's best weights are not this one's
    if start is not None:
        over = position.step >= total or getattr(task, "stop", False)
        if over and records and records[-1].get("event") == "complete":
            if world.rank == 0:
                print(
                    f"{output} is complete ({position.step} steps). To train again: --overwrite or another `output:`"
                )
            return 0
    left: list[str] = from_main(lambda: open_run(config, output, position.step, overwrite))

    engine = _engine(config, task.model, world)
    for buffer in engine.model.buffers():
        distributed.broadcast_(buffer)  # DeepSpeed does so for the parameters only
    momentum = MomentumEncoders(engine)
    if start is not None:
        checkpoint.load(start, engine, momentum)
    trainer = _Trainer(config, task, engine, momentum, world, facts, total)
    trainer.take_up(records, position)
    trainer.log = RunLog(output / "log.jsonl", total, position.step)
    trainer.log.say(_summary(config, task, engine, world, steps_per_epoch, total))
    for note in [*notes, *left]:
        trainer.log.say(f"note: {note}")
    if start is not None:
        trainer.log.say(f"resuming from {start}")
    try:
        return trainer.train(position)
    finally:
        trainer.log.close()


def _engine(config: Config, model: torch.nn.Module, world: World) -> Engine:
    from . import deepspeed_engine

    if world.launched and deepspeed_engine.available():
        return deepspeed_engine.DeepSpeedEngine(config, model, world)
    if world.size > 1:
        raise TrainingError(
            f"{world.size} processes need DeepSpeed: pip install deepspeed. One process works without it"
        )
    return Engine(config, model, world)


def _facts(config: Config, world: World, steps_per_epoch: int) -> dict[str, Any]:
    return {
        "task": config.task,
        "global_batch": config.train.batch_size * config.train.accumulation * world.size,
        "steps_per_epoch": steps_per_epoch,
        "ranks": world.size,
        "config": json.loads(json.dumps(to_dict(config))),
    }


def _summary(
    config: Config, task: Any, engine: Engine, world: World, steps_per_epoch: int, total: int
) -> str:
    def millions(parameters: Any) -> str:
        return f"{sum(getattr(p, 'ds_numel', p.numel()) for p in parameters) / 1e6:.1f} M"

    train = config.train
    ranks = f"{world.size} rank{'s'[: world.size > 1]}"
    return (
        f"{config.task}: {millions(task.model.parameters())} parameters, {millions(engine.trained)} trained; "
        f"batch {train.batch_size} x accumulation {train.accumulation} x {ranks}; "
        f"{total} steps, {steps_per_epoch} an epoch; "
        f"{world.device.type}, {'bf16' if engine.module.bf16 else 'fp32'}, {engine.name}"
    )


def seed_of(seed: int, step: int, slot: int) -> int:
    """The generator's seed for micro-batch number `slot` of an optimizer step, over all ranks; 63 bits, well mixed."""
    return int(np.random.SeedSequence([seed, step, slot]).generate_state(1, np.uint64)[0] >> np.uint64(1))


@dataclass
class _Unread:
    """What a step has to say that the host has not read yet."""

    step: int
    indices: list[Any]
    losses: torch.Tensor
    flags: ToHost  # whether a loss was not finite and whether to stop, on any rank; the gradient's norm


class _Trainer:
    log: RunLog

    def __init__(
        self,
        config: Config,
        task: Any,
        engine: Engine,
        momentum: MomentumEncoders,
        world: World,
        facts: dict[str, Any],
        total: int,
    ):
        self.config, self.task, self.engine, self.momentum, self.world = config, task, engine, momentum, world
        self.facts, self.total = facts, total
        self.saved = -1  # the step of the newest checkpoint
        self.folder = Path(config.output) / "checkpoints"
        self.stop_signal = ""  # the signal that this rank received
        self.stopping = False  # whether any rank received one: agreed on in every step
        self.lag = int(world.device.type == "cuda")  # how many steps the host is behind in reading flags
        self.unread: list[_Unread] = []
        self.problem = ""  # why the last save failed
        self.evaluated: tuple[int, dict[str, Any]] = (
            -1,
            {},
        )  # the step of the last evaluation, and its figures
        self.window: list[dict[str, torch.Tensor]] = []  # outputs since the last record
        self.window_start = time.perf_counter()

    # ---- the run

    def take_up(self, records: list[dict[str, Any]], position: Position) -> None:
        """Remember the evaluation of the weights at `position`, if the log of the resumed run holds it."""
        for record in records:
            if record.get("event") == "evaluate" and record["step"] == position.step:
                figures = {k: v for k, v in record.items() if k not in ("event", "step", "epoch")}
                self.evaluated = (position.step, figures)

    def train(self, position: Position) -> int:
        """Epochs from `position` to the end, then evaluation and the task's finish."""
        self.saved = position.step
        with handled((signal.SIGTERM, signal.SIGINT), self._ask_to_stop):
            position = self._epochs(position)
        if self.stopping and position.step < self.total:
            why = self.stop_signal or "a signal to another rank"
            self.log.say(f"stopped by {why} after step {position.step} of {self.total}; run again to go on")
            return 1 if self.problem else 0
        early = position.step < self.total
        if early:
            self.log.say(
                f"stopped after epoch {position.epoch}: no better weights for a while (train.patience)"
            )
        metrics = self.evaluated[1] if early else self._evaluate(position)
        with self.engine.full_model() as model:
            self.task.finish(model, metrics)
        distributed.barrier()
        if self.problem:
            self.log.say(f"error: {self.problem}. The last weights are not saved as a checkpoint")
            return 1
        self.log.record({"event": "complete", "step": position.step})
        return 0

    def _epochs(self, position: Position) -> Position:
        steps, train = len(self.task.loader), self.config.train
        self.engine.model.train()
        while position.step < self.total and not self.stopping:
            if self._evaluation_is_due(position):  # by a resumed run, too, that was killed before it
                self._evaluate(position)
            if getattr(self.task, "stop", False):
                if self.saved != position.step:  # or the finished run would go on from the last checkpoint
                    self._save(position, steps)
                break
            epoch = position.epoch
            batches = iter(self.task.loader.iterate(epoch, position.step_in_epoch))
            for step_in_epoch in range(position.step_in_epoch, steps):
                self._step(batches, position.step, epoch)
                position = Position(position.step + 1, epoch, step_in_epoch + 1)
                logged = position.step % train.log_every == 0
                if logged or self._save_is_due(position, steps):
                    self._read_flags()
                due = self._save_is_due(position, steps)  # a flag may have said so
                if due or logged:  # before a checkpoint too: a resumed run's records start where it does
                    self._record(position)
                if due:
                    self._save(position, steps)
                if self.stopping or position.step >= self.total:
                    break
            if position.step_in_epoch >= steps:  # beyond it: a resumed run whose data are fewer now
                position = Position(position.step, epoch + 1, 0)
        return position

    def _evaluation_is_due(self, position: Position) -> bool:
        every = self.config.train.evaluate_every
        at_end = position.epoch > 0 and position.step_in_epoch == 0
        return bool(every) and at_end and position.epoch % every == 0 and self.evaluated[0] != position.step

    def _save_is_due(self, position: Position, steps: int) -> bool:
        if self.stopping or position.step >= self.total:
            return True
        every = self.config.train.save_every
        return position.step % every == 0 if every else position.step_in_epoch == steps

    def _step(self, batches: Any, step: int, epoch: int) -> None:
        """One optimizer step: its micro-batches, the update, clamps, momentum encoders, queue."""
        train, model = self.config.train, self.engine.model
        alpha = self.task.alpha(step, len(self.task.loader))
        lr = learning_rate(train, step, epoch, self.total)
        outputs, indices = [], []
        for micro in range(train.accumulation):
            batch = next(batches)
            indices.append(batch.get("index"))
            for name, value in batch.items():
                batch[name] = (
                    value.to(self.world.device, non_blocking=True) if torch.is_tensor(value) else value
                )
            torch.manual_seed(seed_of(self.config.seed, step, micro * self.world.size + self.world.rank))
            outputs.append(self.engine.forward_backward(batch, alpha))
        norm = self.engine.step(lr, model.momentum)
        for parameter, low, high in model.clamped():
            self.engine.clamp(parameter, low, high)
        if not self.engine.averages:
            self.momentum.update(model.momentum)
        model.end_step()
        scalars = [name for name, value in outputs[0].items() if value.ndim == 0]
        self.window.append({name: torch.stack([o[name].float() for o in outputs]).mean() for name in scalars})
        self.latest = {"lr": lr, "alpha": alpha}
        losses = torch.stack([output["loss"] for output in outputs])
        bad = (~losses.isfinite()).any().float()
        told = torch.full_like(bad, float(bool(self.stop_signal)))
        flags = torch.cat([distributed.all_max(torch.stack([bad, told])), norm[None]])
        self.unread.append(_Unread(step, indices, losses, ToHost(flags)))
        self._read_flags(self.lag)
        self.log.advance()

    def _read_flags(self, lag: int = 0) -> None:
        """Read the flags of all but the last `lag` steps.

        Stop on all ranks if a loss or the gradient was not finite anywhere; also learn whether any rank was told to.
        """
        while len(self.unread) > lag:
            of = self.unread.pop(0)
            bad_anywhere, stop_anywhere, norm = of.flags.read().tolist()
            if bad_anywhere:
                bad = not of.losses.isfinite().all()
                here = (
                    f"the loss is {of.losses.tolist()}" if bad else "the loss of another rank is not finite"
                )
                raise NotFinite(self._advice(here, of.step, of.indices))
            if not np.isfinite(norm):
                raise NotFinite(self._advice(f"the gradient's norm is {norm}", of.step, of.indices))
            self.stopping, self.latest["grad_norm"] = bool(stop_anywhere), norm

    def _advice(self, what: str, step: int, indices: list[Any]) -> str:
        samples = [int(i) for index in indices if index is not None for i in index]
        saved = checkpoint.checkpoints(self.folder)
        where = f"The last checkpoint is {saved[-1]}. " if saved else "There is no checkpoint yet. "
        return (
            f"step {step + 1} (rank {self.world.rank}): {what}; samples {samples}. Nothing was saved from it. {where}"
            "Lower train.lr, set train.grad_clip=1, or take the samples out, and run again"
        )

    # ---- records, evaluation, checkpoints

    def _record(self, position: Position) -> None:
        """Log the mean, over the steps since the last record and over ranks, of what the model returned."""
        if not self.window:
            return
        names = sorted(self.window[0], key=lambda name: (name != "loss", name))
        table = torch.stack([torch.stack([numbers[name] for name in names]) for numbers in self.window])
        means = distributed.all_mean(table.mean(0)).tolist()
        seconds = time.perf_counter() - self.window_start
        record = {"step": position.step, "epoch": position.epoch, **dict(zip(names, means)), **self.latest}
        record["samples_per_second"] = len(self.window) * self.facts["global_batch"] / seconds
        record["seconds"] = seconds
        self.log.step(record)
        self.window, self.window_start = [], time.perf_counter()

    def _evaluate(self, position: Position) -> dict[str, Any]:
        self._read_flags()
        with self.engine.full_model() as model:
            metrics = self.task.evaluate(model, position.epoch + (position.step_in_epoch > 0)) or {}
        distributed.barrier()
        self.evaluated = (position.step, metrics)
        if metrics:
            self.log.record({"event": "evaluate", "step": position.step, "epoch": position.epoch, **metrics})
            shown = "  ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float)))
            self.log.say(f"evaluation after step {position.step}: {shown}")
        self.window_start = time.perf_counter()
        return metrics

    def _save(self, position: Position, steps: int) -> None:
        at_end = position.step_in_epoch == steps
        place = Position(position.step, position.epoch + 1, 0) if at_end else position
        self.problem = checkpoint.save(self.folder, self.engine, self.momentum, place, self.facts)
        if self.problem:
            self.log.say(
                f"warning: {self.problem}. Older checkpoints are untouched and training goes on; make room"
            )
            return
        self.saved = position.step
        if is_main():
            checkpoint.prune(self.folder, self.config.train.keep_checkpoints)

    # ---- signals

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        """SIGTERM (Slurm, the launcher) and SIGINT (Ctrl-C; twice to stop at once) ask for a checkpoint and an end."""
        if number == signal.SIGINT and self.stop_signal == "SIGINT":
            raise KeyboardInterrupt
        self.stop_signal = signal.Signals(number).name
