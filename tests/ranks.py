"""Call a function on several real ranks, over gloo, and get what each returned."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def on_ranks(size: int, function: Any, *arguments: Any) -> list[Any]:
    """`function(*arguments)` on `size` ranks at once (a module's function: it is sent by name); one result a rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (size, folder, function, arguments), nprocs=size)
        return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(size)]


def _rank(rank: int, size: int, folder: str, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    try:
        torch.save(function(*arguments), Path(folder, str(rank)))
        dist.barrier()
    finally:
        dist.destroy_process_group()
