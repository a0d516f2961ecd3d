"""Residual and LayerNorm, pre-norm as in ViT and post-norm with dropout as in MED, beside PyTorch and libraries."""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from benchmarks.targets import Target
from blipfast.ops.layer_norm import add_layer_norm, dropout_add_layer_norm

# form, rows, width, rank: ViT-B at 224, 384 and 480, ViT-L at 384; MED on the four texts a pair of a batch of 75 and of
# 768, on one of 75, and on many for a rerank
ON_GPU = [
    ("post-norm dropout", 4 * 75 * 30, 768, 0),
    ("post-norm dropout", 4 * 768 * 14, 768, 0),
    ("pre-norm", 64 * 577, 768, 0),
    ("pre-norm", 75 * 197, 768, 1),
    ("post-norm", 256 * 64, 768, 1),
    ("pre-norm", 32 * 577, 1024, 1),
    ("post-norm dropout", 75 * 30, 768, 1),
    ("pre-norm", 32 * 901, 768, 2),
]
ON_CPU = [("pre-norm", 4 * 50, 192, 0), ("post-norm dropout", 60, 192, 0)]
DROPOUT = 0.1
TARGETS = (Target("ceiling", 0.75), Target("speed", 1.5, ("eager", "compiled", "apex")))  # with dropout


def pre_norm(x, residual, weight, bias):
    z = x + residual
    return F.layer_norm(z, z.shape[-1:], weight, bias, 1e-6), z


def post_norm(x, residual, weight, bias, dropout=0.0):
    z = F.dropout(x, dropout) + residual
    return F.layer_norm(z, z.shape[-1:], weight, bias, 1e-12)


def cases(device: str) -> list[Case]:
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else (ON_CPU, torch.float32)
    found = []
    for form, T, D, rank in shapes:
        element = T * D * size(dtype)
        # forward: x, residual, y and, where it is an output or backward wants it, z; backward: dy, z, dresidual, and
        # dz or, after dropout, dx
        forward = (4 if form == "pre-norm" else 3) * element
        full = (8 if form != "post-norm" else 7) * element
        found += modes(
            "layer_norm", f"{form} T{T} D{D}", dtype, partial(_make, device, form, T, D, dtype),
            forward=(0, forward), full=(0, full), rank=rank,
            targets=TARGETS if "dropout" in form and not rank else (),
        )  # fmt: skip
    return found


def _make(device, form, T, D, dtype):
    shapes = [(T, D), (T, D), (D,), (D,)]
    inputs = tuple(torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes)
    dropout = DROPOUT if "dropout" in form else 0.0
    if form == "pre-norm":
        fused, eager = add_layer_norm, pre_norm
    else:
        fused, eager = partial(dropout_add_layer_norm, dropout=dropout), partial(post_norm, dropout=dropout)
    contenders = ours("layer_norm", device, fused) | {"eager": eager} | compiled(device, eager)
    return contenders | _libraries(device, form == "pre-norm", dropout), inputs


def _libraries(device, prenorm, dropout):
    """Whoever is installed: flash-attn's Triton kernel, NVIDIA apex's LayerNorm after a sum of its own."""
    found = {}
    if device == "cuda" and importlib.util.find_spec("flash_attn"):
        from flash_attn.ops.triton.layer_norm import layer_norm_fn

        def flash_attn(x, residual, weight, bias):
            return layer_norm_fn(x, weight, bias, residual, eps=1e-6, dropout_p=dropout, prenorm=prenorm)

        found["flash_attn"] = flash_attn
    if device == "cuda" and importlib.util.find_spec("fused_layer_norm_cuda"):
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        def apex(x, residual, weight, bias):
            z = F.dropout(x, dropout) + residual
            y = fused_layer_norm_affine(z, weight, bias, z.shape[-1:], 1e-6)
            return (y, z) if prenorm else y

        found["apex"] = apex
    return found
