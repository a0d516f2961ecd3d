"""Checkpoints: everything a resume needs, in one layout whatever the ZeRO stage, the rank count or the engine.

    output/checkpoints/step_0001234/
        weight.safetensors       every parameter by name, fp32 masters; momentum encoders included
        exp_avg.safetensors      the optimizer's moments of the trained parameters, fp32
        exp_avg_sq.safetensors   (of matrices under Muon, the first only)
        buffers.safetensors      queues and their pointers, in their own dtypes
        state.json               step, position in the data, settings, versions, and the size of each file above

Learning rate, alpha, dropout and augmentation are functions of the step, so nothing else is needed. A run resumes bit
for bit with the same ranks and stage, and to rounding with another stage, rank count (of the same global batch), or
without DeepSpeed. A folder is written under a `.tmp` name, flushed to the disk and then renamed: a folder without
`.tmp` is complete. Saving gathers one kind of tensor at a time into the memory of rank 0.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..models.tensor_file import write_tensors
from ..tasks.sharing import is_main
from .ema import MomentumEncoders
from .engine import WEIGHT, Engine
from .errors import CheckpointError
from .optimizer import STATES

FORMAT = 1
HARMLESS = (
    "train.max_steps",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
)
FILES = (WEIGHT, *STATES, "buffers")


@dataclass(frozen=True)
class Position:
    """Where a run is: `step` optimizer steps done, the last of them being number `step_in_epoch` of `epoch`."""

    step: int = 0
    epoch: int = 0
    step_in_epoch: int = 0


# ---------------------------------------------------------------------------------------------------- saving


def save(
    folder: Path, engine: Engine, momentum: MomentumEncoders, position: Position, facts: dict[str, Any]
) -> str:
    """Write `folder/step_...`. Collective. Returns "" or, on rank 0, why it could not be written (a full disk, ...).

    facts: what `check_facts` compares at a resume (JSON). A failure removes the partial files and touches no older
    checkpoint; the caller decides whether to go on.
    """
    final = folder / f"step_{position.step:07d}"
    unfinished = final.with_name(final.name + ".tmp")
    problem = ""
    if is_main():
        problem = _attempt(unfinished, _fresh, unfinished)
    for file in FILES:
        tensors = _collect(file, engine, momentum)
        if is_main() and not problem:
            problem = _attempt(unfinished, _write, unfinished / f"{file}.safetensors", tensors)
        del tensors  # one kind at a time in memory
    if is_main() and not problem:
        state = {
            "format": FORMAT,
            **asdict(position),
            "torch": torch.__version__,
            "engine": engine.name,
            **facts,
        }
        problem = _attempt(unfinished, _finish, unfinished, final, state)
    return problem


def _collect(file: str, engine: Engine, momentum: MomentumEncoders) -> dict[str, torch.Tensor]:
    """The tensors of one file, on the CPU of rank 0 (gathered one by one, so that no device holds them all)."""
    keep = is_main()
    tensors: dict[str, torch.Tensor] = {}
    if file == "buffers":
        return {name: _to_cpu(buffer) for name, buffer in engine.model.named_buffers()} if keep else {}
    for name, p in engine.model.named_parameters():
        if file != WEIGHT and name not in engine.states[file]:
            continue
        master = momentum.master(p)
        full = engine.gather(p, master) if master is not None else engine.read(p, file)
        if keep:
            tensors[name] = _to_cpu(full)
    return tensors


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _attempt(unfinished: Path, action: Callable[..., None], *arguments: Any) -> str:
    try:
        action(*arguments)
        return ""
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        return f"{unfinished.parent}: the checkpoint could not be written ({error})"


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_tensors(path, tensors)
    _flush(path)


def _finish(unfinished: Path, final: Path, state: dict[str, Any]) -> None:
    state["bytes"] = {
        f"{file}.safetensors": (unfinished / f"{file}.safetensors").stat().st_size for file in FILES
    }
    (unfinished / "state.json").write_text(json.dumps(state, indent=1))
    _flush(unfinished / "state.json")
    _flush(unfinished)
    if final.exists():  # the same step, saved by a run that we were told to leave behind
        shutil.rmtree(final)
    os.replace(unfinished, final)
    _flush(final.parent)


def _flush(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted save left. Rank 0 calls it."""
    for old in checkpoints(folder)[: -max(1, keep)]:
        shutil.rmtree(old, ignore_errors=True)
    for unfinished in folder.glob("step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------- loading


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir() and path.suffix != ".tmp")


def abandon(folder: Path, step: int) -> list[Path]:
    """Rename the checkpoints beyond `step`, which a run that starts there must not go on from; their new paths."""
    beyond = [path for path in checkpoints(folder) if path.name > f"step_{step:07d}"]
    moved = []
    for path in beyond:
        place = path.with_name(f"abandoned_{path.name}")
        shutil.rmtree(place, ignore_errors=True)
        moved.append(path.rename(place))
    return moved


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a complaint for each newer one that is damaged.

    Raises CheckpointError when there are checkpoints but none is whole.
    """
    complaints: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            read_state(path)
            return path, complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(
            "\n".join([*complaints, "No whole checkpoint is left. Start afresh with --overwrite"])
        )
    return None, []


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a checkpoint folder, after checking that every file is there and has its size.

    Raises CheckpointError naming the file.
    """
    path = Path(path)
    try:
        state = json.loads((path / "state.json").read_text())
        sizes, written = state["bytes"], state["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: neither JSON nor even text
        raise CheckpointError(
            f"{path} is not a checkpoint of blipfast (state.json: {type(error).__name__}: {error}). Expected a folder "
            "such as runs/pretrain/checkpoints/step_0001000; for weights alone use model.init_from"
        ) from error
    if written != FORMAT:
        raise CheckpointError(f"{path}: format {written} is not the format {FORMAT} that this version reads")
    for name, size in sizes.items():
        file = path / name
        found = file.stat().st_size if file.exists() else 0
        if found != size:
            raise CheckpointError(
                f"{file} is damaged: {found} bytes, expected {size}. Delete {path} and resume from an older checkpoint"
            )
    return state


def position(state: dict[str, Any]) -> Position:
    """The position that a state.json holds."""
    return Position(state["step"], state["epoch"], state["step_in_epoch"])


def check_model(path: Path, model: nn.Module, states: dict[str, set[str]] | None = None) -> None:
    """Compare a checkpoint's names and shapes with a model not yet given to an engine.

    states: the optimizer's, as `optimizer.state_names` gives them; None: they are not needed.
    Raises CheckpointError naming the first tensors that differ. Reads headers only, so it costs no training time.
    """
    parameters = dict(model.named_parameters())
    expected = {WEIGHT: parameters, "buffers": dict(model.named_buffers())}
    expected |= {key: {name: parameters[name] for name in names} for key, names in (states or {}).items()}
    for file, tensors in expected.items():
        with _open(path / f"{file}.safetensors") as stored:
            shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}
        wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        different = [name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)]
        if different:
            name = min(different)
            raise CheckpointError(
                f"{path / file}.safetensors is of another model: {name} is {shapes.get(name, 'absent')} there, "
                f"{wanted.get(name, 'absent')} here ({len(different)} tensors differ). Give the `model:` section that "
                "the checkpoint was made with, or another `output:`"
            )


def load(path: Path, engine: Engine, momentum: MomentumEncoders) -> None:
    """Put a checkpoint into an engine: weights, masters, moments, momentum encoders, buffers, Adam's step.

    Collective; every rank reads the files (memory-mapped, a tensor at a time).
    """
    parameters = dict(engine.model.named_parameters())
    for file in (WEIGHT, *STATES):
        with _open(path / f"{file}.safetensors") as stored:
            for name in stored.keys():
                full = stored.get_tensor(name)
                if momentum.master(parameters[name]) is not None:
                    momentum.load(parameters[name], full.to(engine.device))
                else:
                    engine.write(parameters[name], file, full)
    engine.refresh(list(parameters.values()))
    momentum.publish()
    with torch.no_grad(), _open(path / "buffers.safetensors") as stored:
        for name, buffer in engine.model.named_buffers():
            buffer.copy_(stored.get_tensor(name))
    engine.set_step(read_state(path)["step"])


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}). Delete its folder and resume from an older one"
        ) from error


# ---------------------------------------------------------------------------------------------------- settings


def check_facts(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Compare the settings a checkpoint was made with to those of now; returns lines about harmless differences.

    Raises CheckpointError where going on would not be the same run: another task, model or global batch.
    """
    if saved["task"] != now["task"]:
        raise CheckpointError(
            f"{path} is of task {saved['task']!r}, the config says {now['task']!r}: use another `output:`"
        )
    if saved["global_batch"] != now["global_batch"]:
        raise CheckpointError(
            f"{path} was trained with a global batch of {saved['global_batch']} (batch_size * accumulation * "
            f"ranks), now it is {now['global_batch']}. Choose train.batch_size and train.accumulation so that the "
            "product is the same"
        )
    makers = [facts["config"]["train"]["optimizer"] for facts in (saved, now)]
    if makers[0] != makers[1] and "muon" in makers:
        raise CheckpointError(
            f"{path} holds the state of train.optimizer={makers[0]}, which {makers[1]} cannot take over. Keep the "
            f"optimizer, or start another `output:` from the run's weights: model.init_from={path.parents[1]}"
        )
    notes = []
    if saved["steps_per_epoch"] != now["steps_per_epoch"]:
        notes.append(
            f"an epoch had {saved['steps_per_epoch']} steps and has {now['steps_per_epoch']} now: other data"
        )
    harmless = set(HARMLESS)
    if now["config"]["train"]["schedule"] == "warmup_cosine":
        harmless.discard("train.max_steps")  # the cosine ends there
    for section in ("model", "loss", "train", "data", "seed"):
        before, after = (
            _flat(section, saved["config"].get(section)),
            _flat(section, now["config"].get(section)),
        )
        for name in sorted(before.keys() | after.keys()):
            if before.get(name) != after.get(name) and name not in harmless:
                notes.append(f"{name} was {before.get(name)!r} and is {after.get(name)!r} now")
    return notes


def _flat(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        key: item for part, below in value.items() for key, item in _flat(f"{name}.{part}", below).items()
    }
