"""The MLP beside two linear layers with GELU between them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from benchmarks.targets import Target
from blipfast.ops.mlp import mlp

# batch, tokens, width, rank: ViT-B at 224, 384 and 480 pixels, ViT-L at 384, MED on the tokens of 75 captions
ON_GPU = [(75, 197, 768, 0), (64, 577, 768, 0), (24, 901, 768, 1), (32, 577, 1024, 1), (75, 13, 768, 1)]
TARGETS = (Target("speed", 1.0, ("compiled",)),)


def two_linear_layers(x, weight1, bias1, weight2, bias2):
    return F.linear(F.gelu(F.linear(x, weight1, bias1)), weight2, bias2)


def cases(device: str) -> list[Case]:
    """Hidden width 4 D, as in ViT and BERT."""
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else ([(4, 37, 192, 0)], torch.float32)
    found = []
    for B, N, D, rank in shapes:
        flops, moved = 4 * B * N * D * 4 * D, (2 * B * N * D + 8 * D * D) * size(dtype)
        found += modes(
            "mlp", f"B{B} N{N} D{D}", dtype, partial(_make, device, B, N, D, dtype),
            forward=(flops, moved), full=(3 * flops, 3 * moved), rank=rank,
            targets=() if rank else TARGETS,
        )  # fmt: skip
    return found


def _make(device, B, N, D, dtype):
    shapes = [(4 * D, D), (4 * D,), (D, 4 * D), (D,)]
    weights = ((0.02 * torch.randn(s, device=device)).to(dtype).requires_grad_() for s in shapes)
    x = torch.randn(B, N, D, device=device).to(dtype).requires_grad_()
    contenders = ours("mlp", device, mlp) | {"eager": two_linear_layers} | compiled(device, two_linear_layers)
    return contenders, (x, *weights)
