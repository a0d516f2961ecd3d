"""Hyperparameter search: many runs of one config, each a real training in a folder of its own, steered by Optuna.

    study = tune("configs/retrieval_flickr.yaml", "space.yaml", trials=20, output="runs/tuned")

A folder of a search holds

    study.db          what was tried (SQLite; `optuna-dashboard sqlite:///.../study.db` shows it too)
    trials/0003/      the run of trial 3: config.yaml, log.jsonl, its figures, and train.log, all it printed
    best.yaml         the config with the best settings
    study.png, .html  the history of the search, what each setting did to the metric, and how much it mattered

Started again, it goes on: finished trials count, and one that was interrupted resumes from its checkpoint. Several
processes may work on one folder at once, each on its own device.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import blipfast.train
from blipfast.config import Config, load_config, save_config
from blipfast.tasks import task_class
from blipfast.tasks.finetune import FineTuneTask, selected
from blipfast.training.lock import is_held
from blipfast.training.log import read_records
from blipfast.training.signals import handled
from blipfast.tune_report import write_report
from blipfast.tune_space import read_space

TRAIN = Path(blipfast.train.__file__)
PRUNERS = ("median", "halving", "none")
STARTUP = 5  # trials that are never pruned by the median
FAILURES = 3  # first trials that may fail before the config is blamed
POLL = 0.5  # seconds between looks at a run's log
PATIENCE = 120  # seconds a run may take to save its checkpoint when the search is interrupted


def tune(
    config: str | Path,
    space: str | Path,
    trials: int,
    output: str | Path,
    *,
    overrides: list[str] = [],
    metric: str = "",
    pruner: str = "median",
    launcher: str = "",
    keep_weights: bool = False,
    script: str | Path = "",
) -> Any:
    """Search until `trials` trials of the study in `output` are finished; returns the Optuna study.

    space         YAML file of settings and their ranges or choices, see `tune_space`
    overrides     "key=value" for all trials, as `load_config` takes them
    metric        validation figure to maximise, or a sum "A+B"; by default what the task chooses weights by
    pruner        which trials end early, judged after each validation: "median" (below the median of the others at
                  that point), "halving" (successive halving), "none"
    launcher      what starts a run, such as "deepspeed --num_gpus 2"; by default one process
    keep_weights  keep every trial's weights, not only the best one's; checkpoints of finished trials are deleted
    script        what is run with `--config` and `--set`; by default blipfast/train.py

    Fine-tuning tasks are judged on data.val and do not look at data.test. Unless the config says otherwise, they
    validate after every epoch. Raises ValueError for what cannot be searched, ImportError without Optuna.
    """
    base = load_config(config, overrides)
    rule = metric or base.train.select or getattr(task_class(base.task), "best_metric", "")
    settings = read_space(space, config, overrides)
    extra = _for_trials(base, rule, pruner, [setting.name for setting in settings])
    folder = Path(output)
    study = _open_study(
        folder, pruner, {"metric": rule, "space": [setting.told for setting in settings]}, base.seed
    )
    command = [
        *(shlex.split(launcher) or [sys.executable]),
        str(script or TRAIN),
        "--config",
        str(config),
        "--set",
    ]

    while (taken := _take_trial(study, folder, trials, len(settings))) is not None:
        trial, run, lock = taken
        with lock, _ended_as_by_ctrl_c():
            values = {setting.name: setting.suggest(trial) for setting in settings}
            chosen = [f"{name}={json.dumps(value)}" for name, value in values.items()]
            print(f"trial {trial.number} ({run}): {'  '.join(chosen)}", flush=True)
            ended = _Run([*command, *overrides, *extra, *chosen, f"output={run}"], run, rule).watch(trial)
            told = study.tell(trial, *ended)
        _say(study, told, run)
        with locked(folder / "lock"):
            _clean(study, folder, keep_weights)
            _write(study, folder, config, overrides, rule)
        _blame_config(study, folder)
    return study


def _for_trials(base: Config, rule: str, pruner: str, searched: list[str]) -> list[str]:
    """Settings that every trial gets beside its own."""
    if not rule:
        raise ValueError(
            f"task {base.task} does not say what to maximise: name a figure of its evaluation, --metric."
        )
    if pruner not in PRUNERS:
        raise ValueError(f"pruner: {pruner!r} is not one of {', '.join(PRUNERS)}.")
    extra = []
    if issubclass(task_class(base.task), FineTuneTask):
        if not base.data.val:
            raise ValueError("data.val is empty: a search needs validation data to judge its trials on.")
        extra += ["data.test=", f"train.select={rule}"]
    if pruner != "none" and not base.train.evaluate_every and "train.evaluate_every" not in searched:
        extra.append("train.evaluate_every=1")
    return extra


# ---- the study


def import_optuna() -> Any:
    """The module optuna, quiet. Raises ImportError saying how to install it."""
    try:
        import optuna
    except ImportError:
        raise ImportError("Searching hyperparameters needs Optuna: pip install 'blipfast[tune]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def _open_study(folder: Path, pruner: str, plan: dict[str, Any], seed: int) -> Any:
    """The study in `folder`, made if there is none. ValueError if what is there has another `plan`."""
    optuna = import_optuna()
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    pruners = {
        "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=STARTUP),
        "halving": optuna.pruners.SuccessiveHalvingPruner,
        "none": optuna.pruners.NopPruner,
    }
    with locked(folder / "lock"):
        study = optuna.create_study(
            storage=f"sqlite:///{folder / 'study.db'}",
            study_name="blipfast",
            direction="maximize",
            load_if_exists=True,
            pruner=pruners[pruner](),
        )
        before = study.user_attrs.get("plan", plan)
        if changed := [key for key in plan if plan[key] != before.get(key)]:
            raise ValueError(
                f"{folder}: holds a search with another {' and '.join(changed)}; name another folder for this one."
            )
        study.set_user_attr("plan", plan)
        made = len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(seed=seed + made)  # or a restart would draw the same again
    return study


def _take_trial(study: Any, folder: Path, wanted: int, size: int) -> tuple[Any, Path, IO[str]] | None:
    """A trial to run, its folder and the lock on it; None once `wanted` are finished or in other processes' hands."""
    with locked(folder / "lock"):
        _take_up(study, folder, size)
        trials = study.get_trials(deepcopy=False)
        waiting = {t.user_attrs.get("folder") for t in trials if t.state.name == "WAITING"}
        if len({t.user_attrs.get("folder") for t in trials} - waiting - {None}) >= wanted:
            return None
        trial = study.ask()
        run = folder / "trials" / trial.user_attrs.get("folder", f"{trial.number:04d}")
        run.mkdir(exist_ok=True)
        trial.set_user_attr("folder", run.name)
        return trial, run, _try_lock(run / "lock")


def _take_up(study: Any, folder: Path, size: int) -> None:
    """Trials whose process is gone are queued again with their folder, where training goes on from its checkpoint.

    One that had not drawn all `size` settings yet is forgotten.
    """
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name != "RUNNING":
            continue
        run = trial.user_attrs.get("folder")
        if run:
            lock = _try_lock(folder / "trials" / run / "lock")
            if lock is None:
                continue  # another process is at it
            lock.close()
            if is_held(folder / "trials" / run):
                continue  # its training outlived the search
        study.tell(trial.number, state=import_optuna().trial.TrialState.FAIL)
        if run and len(trial.params) == size:
            study.enqueue_trial(trial.params, user_attrs={"folder": run})


def _say(study: Any, trial: Any, run: Path) -> None:
    values = trial.intermediate_values.values()
    if trial.state.name == "FAIL":
        print(f"trial {trial.number} failed: {_last_line(run / 'train.log')}", flush=True)
    elif trial.state.name == "PRUNED":
        print(
            f"trial {trial.number} pruned after {len(values)} validations, at {trial.value:.4g}", flush=True
        )
    else:
        best = study.best_trial
        print(
            f"trial {trial.number}: {trial.value:.4g}; best {best.value:.4g} of trial {best.number}",
            flush=True,
        )


def _blame_config(study: Any, folder: Path) -> None:
    trials = [t for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    if len(trials) == FAILURES and all(trial.state.name == "FAIL" for trial in trials):
        log = folder / "trials" / trials[-1].user_attrs["folder"] / "train.log"
        raise ValueError(f"the first {FAILURES} trials failed, see {log}. It ends: {_last_line(log)}")


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def _clean(study: Any, folder: Path, keep_weights: bool) -> None:
    """Of finished trials, delete checkpoints, and weights unless they are the best."""
    trials = study.get_trials(deepcopy=False)
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    kept = {study.best_trial.user_attrs["folder"]} if complete else set()
    kept |= {t.user_attrs.get("folder") for t in trials if not t.state.is_finished()}
    for trial in trials:
        run = trial.user_attrs.get("folder")
        if run and trial.state.is_finished():
            shutil.rmtree(folder / "trials" / run / "checkpoints", ignore_errors=True)
            if run not in kept and not keep_weights:
                for weights in (folder / "trials" / run).glob("*.safetensors"):
                    weights.unlink()


def _write(study: Any, folder: Path, config: str | Path, overrides: list[str], rule: str) -> None:
    """best.yaml and the report, as far as the search has come."""
    if any(t.state.name == "COMPLETE" for t in study.get_trials(deepcopy=False)):
        best = [f"{name}={value}" for name, value in study.best_trial.user_attrs["settings"].items()]
        save_config(load_config(config, [*overrides, *best]), folder / "best.yaml")
    write_report(study, folder, rule)


# ---- a trial's run


class _Run:
    """One training in a process of its own, watched through its log."""

    def __init__(self, command: list[str], folder: Path, rule: str):
        self.command, self.folder, self.rule = command, folder, rule

    def watch(self, trial: Any) -> tuple[float | None, Any]:
        """Run to the end, or until the pruner has seen enough: the trial's value and its state."""
        state = import_optuna().trial.TrialState
        with open(self.folder / "train.log", "a", encoding="utf-8") as log:
            process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        reported = 0
        try:
            while True:
                status = process.poll()  # before the log is read, which is then complete
                values, keeps_best = self._values()
                for value in values[reported:]:
                    reported += 1
                    trial.report(value, reported)
                    if status is None and trial.should_prune():
                        return None, state.PRUNED
                if status is not None:
                    break
                time.sleep(POLL)
        except KeyboardInterrupt:  # the trial stays open, and goes on from this checkpoint
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
            raise
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
        if status or not values:
            return None, state.FAIL
        return (max(values) if keeps_best else values[-1]), state.COMPLETE

    def _values(self) -> tuple[list[float], bool]:
        """The metric at each validation so far, and whether the run keeps the best weights (else the last ones)."""
        records = [r for r in read_records(self.folder / "log.jsonl") if r.get("event") == "evaluate"]
        return [selected(record, self.rule) for record in records], any("best_epoch" in r for r in records)


def _ended_as_by_ctrl_c() -> contextlib.AbstractContextManager:
    """Let SIGTERM and a terminal that closes end the search as Ctrl-C does, which ends its training, too."""
    ends = (signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in ends if signal.getsignal(number) is not signal.SIG_IGN]  # not under nohup
    return handled(heard, signal.default_int_handler)


def _signal(process: subprocess.Popen, number: int) -> None:
    """Send a signal to a run and everything it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


# ---- locks: held by a process, let go by the system when it ends, however it ends


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Wait for the lock file `path` and hold it."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _try_lock(path: Path) -> IO[str] | None:
    """The locked file, to be closed; None if another process holds it."""
    file = open(path, "a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file
