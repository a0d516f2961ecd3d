"""Seeds of dropout, drawn on the device: nobody waits, a CUDA graph may hold it, checkpointing draws the same again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

TOGETHER = 8

_drawn: ContextVar[list[Tensor] | None] = ContextVar("blipfast_seeds", default=None)


@contextlib.contextmanager
def drawn_together() -> Iterator[None]:
    """Within, seeds are drawn eight at a time, when the first is asked for: a launch for each took longer.

    A function that is recomputed in backward must enter this itself.
    """
    token = _drawn.set([])
    try:
        yield
    finally:
        _drawn.reset(token)


def draw_seed(like: Tensor) -> Tensor:
    """An int64 tensor where `like` is, whose first number is the seed of one dropout."""
    drawn = None if torch.compiler.is_compiling() else _drawn.get()
    if drawn is None:
        return torch.randint(2**62, (1,), device=like.device)
    if not drawn or drawn[-1].device != like.device:
        # pairs, because a kernel is compiled once for addresses that are multiples of 16 and once for others
        drawn[:] = torch.randint(2**62, (TOGETHER, 2), device=like.device).unbind()
    return drawn.pop()
