"""Evaluation over ranks: every sample exactly once, whatever the number of ranks (official BLIP counts some twice)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from blipfast.models import gather


def my_share(count: int) -> range:
    """The samples of 0 ... count - 1 that this rank evaluates."""
    return range(gather.rank(), count, gather.world_size())


def collect(results: dict[int, Any], count: int) -> list[Any]:
    """Every rank's results in the order of the samples, on every rank. `results` has one for each of `my_share`."""
    parts = [results]
    if gather.world_size() > 1:
        parts = [{} for _ in range(gather.world_size())]
        dist.all_gather_object(parts, results)
    merged = {index: result for part in parts for index, result in part.items()}
    return [merged[index] for index in range(count)]


def is_main() -> bool:
    """True on rank 0."""
    return gather.rank() == 0


def from_main(function: Callable[[], Any]) -> Any:
    """What `function()` returns on rank 0, on every rank; what it raises there is raised on every rank."""
    if gather.world_size() == 1:
        return function()
    reply: list[Any] = [None, None]
    if is_main():
        try:
            reply[0] = function()
        except Exception as error:  # no rank may wait for a collective that never comes
            reply[1] = error
    dist.broadcast_object_list(reply, 0)
    if reply[1] is not None:
        raise reply[1]
    return reply[0]
