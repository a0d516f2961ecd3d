"""What a run says: one JSON object a line in log.jsonl, and lines (or a progress bar) on the console. Rank 0 only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import whole
from ..tasks.sharing import is_main


class RunLog:
    """Writes records to `path` and to the console. A disk that refuses is reported once and not waited for."""

    def __init__(self, path: Path, total_steps: int, step: int = 0):
        self.path = path
        self.total_steps = total_steps
        self.refused = False
        self.bar = None
        if is_main() and sys.stderr.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True)

    def say(self, text: str) -> None:
        """A line for the person at the console."""
        if is_main():
            tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def step(self, record: dict[str, Any]) -> None:
        """A training record: `step` and numbers."""
        self.record(record)
        shown = [f"{key} {_short(record[key])}" for key in record if key not in ("step", "epoch", "seconds")]
        self.say(f"step {record['step']}/{self.total_steps} epoch {record['epoch']}  " + "  ".join(shown))

    def advance(self) -> None:
        """One optimizer step is done."""
        if self.bar is not None:
            self.bar.update()

    def record(self, record: dict[str, Any]) -> None:
        """Append one JSON line."""
        if not is_main():
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            if not self.refused:
                self.say(f"warning: {self.path} cannot be written ({error}); training goes on without it")
            self.refused = True

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line cut short by a kill is left out. Empty if there is no file."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


def rewind(path: Path, step: int) -> None:
    """Drop the records after `step`, which a killed run wrote and the resumed one writes again."""
    records, ended = read_records(path), True
    if path.exists():
        text = path.read_bytes()
        ended = not text or text.endswith(b"\n")  # else the next record would join the last line
    kept = [
        record for record in records if record.get("step", 0) <= step and record.get("event") != "complete"
    ]
    if len(kept) != len(records) or not ended:
        with whole(path) as unfinished:
            unfinished.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
