"""One training at a time in an output folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold `folder`/training.lock. ValueError if another process does; its end, however it comes, releases it.

    The lock belongs to this process alone: data workers that outlive it for a moment do not keep it. Where there are no
    such locks (Windows, some network disks) nothing is held.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / "training.lock", "a+"))
        except OSError:  # a finished run may be read only
            yield
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise ValueError(
                f"{folder}: a training runs in this folder (process {file.read().strip() or 'unknown'}). Wait for it, "
                "stop it, or choose another `output:`"
            ) from None
        except OSError:
            yield
            return
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)  # the file stays: another process may be waiting for it


def is_held(folder: Path) -> bool:
    """Whether another process trains in `folder`."""
    try:
        with held(folder):
            return False
    except ValueError:
        return True
