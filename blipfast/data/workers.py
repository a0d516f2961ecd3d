"""Data workers outlive the signals that tell a run to end.

A terminal, Slurm and the launchers send those to every process of a group. The run then finishes its step and saves a
checkpoint, for which it needs its workers; without them torch ends it with an error.
"""

from __future__ import annotations

import mmap
import os
import signal
from multiprocessing import util
from typing import Any

GRACE = 30  # seconds from the signal to a worker's end; the deepspeed launcher waits as long
_leaving = mmap.mmap(
    -1, 1
)  # shared with forked workers: not 0 once their parent ends in good order, and ends them
util.Finalize(None, _leaving.write_byte, (1,), exitpriority=100)


def outlive_signals(worker: int) -> None:
    """What a DataLoader calls at the start of each worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _last_a_while)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _last_a_while(*_: Any) -> None:
    if _leaving[0] or not hasattr(signal, "SIGALRM"):
        os._exit(0)
    signal.alarm(GRACE)
