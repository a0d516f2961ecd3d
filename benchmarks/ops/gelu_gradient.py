"""What a feed-forward's backward makes of its hidden state, beside PyTorch's three passes."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from blipfast.ops.gelu_gradient import gelu_gradient

ON_GPU = [
    (128 * 197, 3072, 0),
    (128 * 14, 3072, 1),
]  # rows, columns, rank: ViT-B at 224 pixels, a batch's texts


def three_passes(da, h):
    dh = torch.ops.aten.gelu_backward(da, h)
    return dh, F.gelu(h), dh.sum(0)


def cases(device: str) -> list[Case]:
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else ([(100, 192, 0)], torch.float32)
    found = []
    for T, D, rank in shapes:
        make = partial(_make, device, T, D, dtype)
        work = (0, 4 * T * D * size(dtype))
        found += modes("gelu_gradient", f"T{T} F{D}", dtype, make, forward=work, rank=rank)
    return found


def _make(device, T, D, dtype):
    contenders = ours("gelu_gradient", device, gelu_gradient) | {"eager": three_passes}
    inputs = tuple(torch.randn(T, D, device=device).to(dtype) for _ in range(2))
    return contenders | compiled(device, three_passes), inputs
