"""Sums of rows, as of the gradients of ViT's biases, beside PyTorch's."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases import Case, compiled, modes, ours, size
from blipfast.ops.column_sum import column_sum

# rows, columns, rank: ViT-B's qkv and its other layers at 224 pixels, a batch's texts
ON_GPU = [(128 * 197, 2304, 0), (128 * 197, 768, 1), (128 * 14, 768, 1)]


def cases(device: str) -> list[Case]:
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else ([(500, 64, 0)], torch.float32)
    found = []
    for T, D, rank in shapes:
        make = partial(_make, device, T, D, dtype)
        work = (0, T * D * size(dtype))
        found += modes("column_sum", f"T{T} D{D}", dtype, make, forward=work, rank=rank)
    return found


def _make(device, T, D, dtype):
    def eager(x):
        return x.sum(0)

    contenders = ours("column_sum", device, column_sum) | {"eager": eager} | compiled(device, eager)
    return contenders, (torch.randn(T, D, device=device).to(dtype),)
