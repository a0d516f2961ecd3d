"""Attention of a decoding step over its cache, beside indexing and scaled_dot_product_attention."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from blipfast.ops.cached_attention import cached_attention

OP = "cached_attention"
ON_GPU = [(32, 3, 64, 12, 0), (128, 3, 64, 12, 0), (32, 1, 40, 12, 1)]  # images, beams, slots, heads, rank


def eager(qkv, cache, slots, mask):
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    cache[rows, slots] = qkv[:, :, 1:]
    key, value = cache.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(qkv[:, :, 0].transpose(1, 2), key, value, mask[:, None]).transpose(
        1, 2
    )


def cases(device: str) -> list[Case]:
    on_gpu = device == "cuda"
    shapes, dtype = (ON_GPU, torch.bfloat16) if on_gpu else ([(4, 3, 40, 4, 0)], torch.float32)
    found = []
    for n, k, S, H, rank in shapes:
        make = partial(_make, device, n, k, S, H, dtype)
        work = (4 * n * H * k * S * 64, 2 * n * H * (S + 3 * k) * 64 * size(dtype))
        found += modes(OP, f"n{n} k{k} S{S} H{H}", dtype, make, forward=work, rank=rank)
    return found


def _make(device, n, k, S, H, dtype):
    qkv, cache = (torch.randn(n, rows, x, H, 64, device=device).to(dtype) for rows, x in ((k, 3), (S, 2)))
    slots = torch.arange(S - k, S, device=device).expand(n, k)
    mask = torch.rand(n, k, S, device=device) > 0.5
    mask[..., -k:] = torch.eye(k, dtype=torch.bool, device=device)
    contenders = ours(OP, device, cached_attention) | {"eager": eager} | compiled(device, eager)
    return contenders, (qkv, cache, slots, mask)
