"""Where a run starts, and what becomes of an earlier one in its output folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..config import Config, save_config
from . import checkpoint
from .log import read_records, rewind


def choose_start(output: Path, resume: str, overwrite: bool) -> Path | None:
    """Which checkpoint to start from; runs on rank 0. Nothing is changed yet: there may be errors still."""
    folder = output / "checkpoints"
    earlier = checkpoint.checkpoints(folder)
    if resume not in ("auto", "none"):
        start = Path(resume)
        checkpoint.read_state(start)
        inside = start.resolve().parent == folder.resolve()
        if inside and overwrite:
            raise ValueError(f"--overwrite would delete {start}, which --resume names: leave one of them out")
        if earlier and not inside and not overwrite:
            raise ValueError(
                f"{folder} holds checkpoints of another run than {start}. Choose another `output:`, or delete them "
                "with --overwrite"
            )
        return start
    if overwrite:
        return None
    if resume == "none" and earlier:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run. Resume it (--resume auto), choose another `output:`, "
            "or delete it with --overwrite"
        )
    start, complaints = checkpoint.newest(folder)
    for complaint in complaints:
        print(f"warning: {complaint}", flush=True)
    if start is None and any(r.get("event") == "complete" for r in read_records(output / "log.jsonl")):
        raise ValueError(
            f"{output} holds a finished run without its checkpoints, which would be lost. Choose another `output:`, or "
            "train again over it with --overwrite"
        )
    return start


def open_run(config: Config, output: Path, step: int, overwrite: bool) -> list[str]:
    """Make the output folder, keep the config in it, and set aside what is beyond `step`; runs on rank 0.

    overwrite: delete the checkpoints and the log of the earlier run. Returns lines for the person at the console.
    """
    folder = output / "checkpoints"
    if overwrite:
        for old in checkpoint.checkpoints(folder):
            shutil.rmtree(old)
        (output / "log.jsonl").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, output / "config.yaml")
    rewind(output / "log.jsonl", step)
    return [
        f"{path} is of the run as it went on before; it is not resumed"
        for path in checkpoint.abandon(folder, step)
    ]
