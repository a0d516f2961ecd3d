"""Tensors of all ranks in one: no-ops on one process. Every rank must hold the same shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from blipfast.transfer import ToHost


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def concat_all_gather(tensor: Tensor) -> Tensor:
    """[B, ...] of every rank, one below the other in rank order: [W * B, ...]. Carries no gradient."""
    if world_size() == 1:
        return tensor
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor.contiguous())
    return torch.cat(gathered)


class GatherLayer(torch.autograd.Function):
    """All-gather whose backward gives every rank the summed gradient of its own part."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> tuple[Tensor, ...]:
        gathered = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(gathered, tensor.contiguous())
        return tuple(gathered)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        return total[rank()]


def all_gather_with_grad(tensor: Tensor) -> Tensor:
    """As `concat_all_gather`, but differentiable."""
    return tensor if world_size() == 1 else torch.cat(GatherLayer.apply(tensor))


def gather_texts(texts: list[list[int]], longest: int, device) -> Callable[[], list[list[int]]]:
    """A function that waits for, and returns, token ids of every rank's texts, in rank order.

    No text is longer than `longest`.
    """
    table = np.full((len(texts), longest), -1)
    for row, text in zip(table, texts):
        row[: len(text)] = text
    coming = ToHost(concat_all_gather(torch.from_numpy(table).to(device, non_blocking=True)))
    return lambda: [[token for token in row if token >= 0] for row in coming.read().tolist()]
