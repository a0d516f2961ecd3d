"""The language model's head and its loss, beside F.linear and F.cross_entropy."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from benchmarks.targets import Target
from blipfast.ops.linear_cross_entropy import linear_cross_entropy

SMOOTHING = 0.1
# tokens, rank: those of 75 captions padded to 30, of 75 as they are, of 512 as they are
ON_GPU = [(2175, 0), (940, 1), (6400, 1)]
TARGETS = (Target("speed", 1.0, ("eager",)), Target("memory", 0.2, ("eager",)))


def all_logits(hidden, weight, bias, labels):
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), labels, label_smoothing=SMOOTHING)


def torch_chunked(hidden, weight, bias, labels):
    return F.linear_cross_entropy(hidden, weight, labels, linear_bias=bias, label_smoothing=SMOOTHING)


def cases(device: str) -> list[Case]:
    """BERT's vocabulary and width; smaller ones on a CPU."""
    on_gpu = device == "cuda"
    shapes, dtype = (ON_GPU, torch.bfloat16) if on_gpu else ([(1000, 0)], torch.float32)
    D, V = (768, 30524) if on_gpu else (128, 1200)
    found = []
    for T, rank in shapes:
        flops, moved = 2 * T * D * V, (T * D + V * D) * size(dtype)
        found += modes(
            "linear_cross_entropy", f"T{T} D{D} V{V}", dtype, partial(_make, device, T, D, V, dtype),
            forward=(flops, moved), full=(3 * flops, 3 * moved), rank=rank,
            targets=() if rank else TARGETS,
        )  # fmt: skip
    return found


def _make(device, T, D, V, dtype):
    hidden, weight = torch.randn(T, D, device=device), 0.02 * torch.randn(V, D, device=device)
    tensors = [x.to(dtype).requires_grad_() for x in (hidden, weight, torch.zeros(V, device=device))]
    labels = torch.randint(V, (T,), device=device)
    contenders = ours(
        "linear_cross_entropy", device, partial(linear_cross_entropy, label_smoothing=SMOOTHING)
    )
    contenders |= {"eager": all_logits} | compiled(device, all_logits)
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        contenders["F.linear_cross_entropy"] = torch_chunked
    return contenders, (*tensors, labels)
