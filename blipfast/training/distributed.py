"""Ranks, devices and collectives. Every collective is a no-op on one process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from .errors import TrainingError

TIMEOUT = timedelta(minutes=30)  # the others wait this long while rank 0 writes a checkpoint


@dataclass(frozen=True)
class World:
    """This process among all: its number, their count, its device, and whether a launcher started it."""

    rank: int
    size: int
    device: torch.device
    launched: bool


def connect() -> World:
    """Join the process group that `deepspeed` or `torchrun` announces in the environment; alone if there is none.

    gloo on CPU, NCCL on CUDA. A single launched rank opens no port. Raises TrainingError with what to do when the
    port is taken or the ranks do not find each other.
    """
    launched = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    rank, size = (
        int(os.environ[name]) if launched else default for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if launched and not dist.is_initialized():
        _join(rank, size, device)
    return World(rank, size, device, launched)


def _join(rank: int, size: int, device: torch.device) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
        return
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise TrainingError(
                f"{address} is taken, perhaps by another run. Choose a free port: "
                "deepspeed --master_port 29511 blipfast/train.py ... (torchrun takes the same option)"
            ) from error
        raise TrainingError(
            f"rank {rank} of {size} could not meet the others at {address}. Check that every node reaches that "
            f"address and that {size} ranks were started. The reason given: {str(error).splitlines()[0]}"
        ) from error


def connected() -> bool:
    """Whether this process is in a process group."""
    return dist.is_initialized()


def disconnect() -> None:
    """Leave the process group, so that NCCL and gloo end without complaint."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1


def all_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all ranks, in place."""
    if not _alone():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def all_max(tensor: torch.Tensor) -> torch.Tensor:
    """The element-wise maximum of a tensor over all ranks, in place."""
    if not _alone():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def broadcast_(tensor: torch.Tensor) -> None:
    """Give every rank the tensor of rank 0, in place."""
    if not _alone():
        dist.broadcast(tensor, 0)


def barrier() -> None:
    """Wait for all ranks."""
    if not _alone():
        dist.barrier()
