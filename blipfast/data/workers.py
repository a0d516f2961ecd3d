"""Data workers outlive the signals that tell a run to end.

A terminal, Slurm and the launchers send those to every process of a group. The run then finishes its step and saves a
checkpoint, for which it needs its workers; without them torch ends it with an error.
"""

from __future__ import annotations

import mmap
import os
import signal
from multiprocessing import get_start_method, util
from typing import Any

GRACE = 300  # seconds from the signal to a worker's end, whatever its parent does
# shared with forked workers: not 0 once their parent ends, which then ends them by the same signal
_leaving = mmap.mmap(-1, 1)
util.Finalize(None, _leaving.write_byte, (1,), exitpriority=100)


def outlive_signals(worker: int) -> None:
    """What a DataLoader calls at the start of each worker. Those that are not forked are left as they are."""
    if get_start_method() == "fork":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, _last_a_while)
        signal.signal(signal.SIGALRM, _leave)


def _last_a_while(*_: Any) -> None:
    if _leaving[0]:
        _leave()
    signal.alarm(GRACE)


def _leave(*_: Any) -> None:
    os._exit(0)  # torch takes any other status for an error of the run
