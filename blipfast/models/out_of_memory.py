"""Where memory runs out: how it is known, and a function that goes on with half of its batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ERRORS = (RuntimeError, MemoryError)  # what to catch, and then to ask `is_out_of_memory`


def is_out_of_memory(error: BaseException) -> bool:
    """Of a GPU, or of a CPU, whose allocator raises a plain RuntimeError."""
    ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return ours or (
        type(error) is RuntimeError and "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def in_halves(function: Callable[..., Tensor], batch: Tensor | list) -> Tensor:
    """function(batch), in halves and halves of these where memory runs out. Raises what it did for a batch of one."""
    try:
        return function(batch)
    except ERRORS as error:
        if len(batch) <= 1 or not is_out_of_memory(error):
            raise
    half = len(batch) // 2  # only now is free what the error's traceback held
    return torch.cat([in_halves(function, part) for part in (batch[:half], batch[half:])])
