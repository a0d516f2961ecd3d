"""Patch embedding beside the convolution that the models had: convolve, flatten, transpose, concatenate, add."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.cases import Case, compiled, modes, ours, size
from benchmarks.targets import Target
from blipfast.data.transforms import MEAN, STD
from blipfast.ops.patch_embed import fold_normalisation, patch_embed, patch_embed_uint8

# batch, side of the picture, width, rank: pre-training, a large batch, fine-tuning sizes, ViT-L, one picture
ON_GPU = [
    (75, 224, 768, 0),
    (256, 224, 768, 0),
    (64, 384, 768, 1),
    (32, 480, 768, 1),
    (64, 384, 1024, 1),
    (1, 384, 768, 2),
]
TARGETS = (Target("speed", 2.0, ("eager",)),)


def convolution(images, weight, bias, cls, pos):
    x = F.conv2d(images.to(weight.dtype), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
    return torch.cat([cls.expand(len(x), -1, -1), x], 1) + pos


def cases(device: str) -> list[Case]:
    """Pixels in fp32, as the loader gives them, and in uint8, as they are stored."""
    shapes, dtype = (ON_GPU, torch.bfloat16) if device == "cuda" else ([(4, 96, 192, 0)], torch.float32)
    found = []
    for B, side, D, rank in shapes:
        N, K, states = (side // 16) ** 2, 3 * 16 * 16, size(dtype)
        flops, y = 2 * B * N * K * D, B * (N + 1) * D * states
        name = f"B{B} {side}px D{D}"
        image = 4 * B * N * K
        found += modes(
            "patch_embed", name, dtype, partial(_floats, device, B, side, D, dtype),
            forward=(flops, image + y), full=(2 * flops, 2 * (image + y)), rank=rank,
            targets=TARGETS if B >= 64 else (),
        )  # fmt: skip
        found += modes(
            "patch_embed", f"{name} uint8", dtype, partial(_pixels, device, B, side, D, dtype),
            forward=(flops, image / 4 + y), rank=max(1, rank), targets=TARGETS if B >= 64 else (),
        )  # fmt: skip
    return found


def _floats(device, B, side, D, dtype):
    contenders = (
        ours("patch_embed", device, patch_embed) | {"eager": convolution} | compiled(device, convolution)
    )
    return contenders, (torch.randn(B, 3, side, side, device=device), *_parameters(device, side, D, dtype))


def _pixels(device, B, side, D, dtype):
    weight, *rest = _parameters(device, side, D, dtype)
    weight, bias = weight.detach(), rest.pop(0).detach()
    folded = fold_normalisation(weight, bias, MEAN, STD)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))

    def from_folded(pixels, *rest):
        return patch_embed_uint8(pixels, *folded, *rest)

    def eager(pixels, *rest):
        return convolution((pixels.float() / 255 - mean) / std, weight, bias, *rest)

    contenders = ours("patch_embed", device, from_folded) | {"eager": eager} | compiled(device, eager)
    return contenders, (torch.randint(0, 256, (B, 3, side, side), dtype=torch.uint8, device=device), *rest)


def _parameters(device, side, D, dtype):
    T = (side // 16) ** 2 + 1
    shapes = [(D, 3, 16, 16), (D,), (1, 1, D), (1, T, D)]
    return tuple((0.02 * torch.randn(s, device=device)).to(dtype).requires_grad_() for s in shapes)
