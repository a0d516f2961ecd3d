"""Start training in processes of its own: under the deepspeed launcher, or plainly; and read what it logged."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
TOY = TESTS / "toy_run.py"
TOY_CONFIG = TESTS / "data" / "toy.yaml"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    script: Path, *arguments: str, ranks: int = 0, port: int = 0, **environment: str
) -> subprocess.Popen:
    """Start `script`: as `python script` (ranks=0), or with that many ranks under the real deepspeed launcher."""
    command = [sys.executable, str(script), *arguments]
    if ranks:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        options = ["--quiet", "--num_gpus", str(ranks), "--master_port", str(port or free_port())]
        command = [sys.executable, deepspeed, *options, *command[1:]]
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS.parent),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        **environment,
    }
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 240) -> str:
    """Wait for the end; returns what it printed. Fails if it takes longer than `timeout` seconds."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        kill(process)
        raise AssertionError(f"did not end in {timeout} s:\n{process.communicate()[0]}") from None


def run(script: Path, *arguments: str, ranks: int = 0, status: int = 0, **environment: str) -> str:
    """Start, wait, and check the exit status; returns what it printed."""
    process = start(script, *arguments, ranks=ranks, **environment)
    printed = finish(process)
    assert process.returncode == status, f"status {process.returncode}:\n{printed}"
    return printed


def kill(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Send a signal to the launcher and all its ranks at once, as a power cut would."""
    os.killpg(process.pid, number)


def wait_for_step(process: subprocess.Popen, output: Path, step: int, timeout: float = 120) -> None:
    """Wait until the run in `output` has logged `step`."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        if step in losses(output):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    kill(process)
    raise AssertionError(f"step {step} was not reached:\n{process.communicate()[0]}")


def records(output: Path) -> list[dict]:
    path = Path(output) / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(output: Path, key: str = "loss") -> dict[int, float]:
    """What was logged at each step."""
    return {
        record["step"]: record[key] for record in records(output) if key in record and "event" not in record
    }
