"""RandAugment as official BLIP applies it: two of ten ops, each with probability 1/2, at magnitude 5 of 10.

At that magnitude brightness and sharpness have factor 1 and change nothing, so only seven of the ten ops do work:
autocontrast, equalize, shear x and y (0.15), translate x and y (5 pixels), rotate (15 degrees), signs random. Geometry
follows OpenCV's warpAffine, which official BLIP calls: origin at the centre of the first pixel, bilinear, fill 128.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

FILL = 128
SHEAR, TRANSLATE, ROTATE = 0.15, 5, 15.0  # magnitude 5 of 10: half of 0.3, 10 pixels, 30 degrees


def rand_augment(image: Tensor, rng: Generator | None = None, n: int = 2) -> Tensor:
    """Apply `n` ops, drawn with replacement, each with probability 1/2. uint8 [3, H, W] -> uint8 [3, H, W]."""
    for op, chance, sign in torch.rand(n, 3, generator=rng).tolist():
        if chance < 0.5:
            image = OPS[int(op * len(OPS))](image, 1 if sign < 0.5 else -1)
    return image


def identity(image: Tensor, sign: int) -> Tensor:
    """Stands for identity, brightness and sharpness, which are one and the same at magnitude 5."""
    return image


def autocontrast(image: Tensor, sign: int) -> Tensor:
    """Stretch each channel to 0..255."""
    return _through_tables(image, _autocontrast_table)


def equalize(image: Tensor, sign: int) -> Tensor:
    """Flatten the histogram of each channel."""
    return _through_tables(image, _equalize_table)


def shear_x(image: Tensor, sign: int) -> Tensor:
    """Move each row right in proportion to its height."""
    return warp(image, [[1.0, -sign * SHEAR, 0.0], [0.0, 1.0, 0.0]])


def shear_y(image: Tensor, sign: int) -> Tensor:
    """Move each column down in proportion to its distance from the left."""
    return warp(image, [[1.0, 0.0, 0.0], [-sign * SHEAR, 1.0, 0.0]])


def translate(image: Tensor, sign: int, dim: int) -> Tensor:
    """Move by 5 pixels along `dim` (1: y, 2: x)."""
    size = image.shape[dim]
    moved = torch.full_like(image, FILL)
    kept = max(size - TRANSLATE, 0)
    start, target = (size - kept, 0) if sign > 0 else (0, size - kept)
    moved.narrow(dim, target, kept).copy_(image.narrow(dim, start, kept))
    return moved


def rotate(image: Tensor, sign: int) -> Tensor:
    """Turn by 15 degrees about (W/2, H/2), counter-clockwise for sign +1."""
    height, width = image.shape[1:]
    cos, sin = math.cos(math.radians(sign * ROTATE)), math.sin(math.radians(sign * ROTATE))
    x, y = width / 2, height / 2
    return warp(image, [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y]])


def warp(image: Tensor, source_of: list[list[float]]) -> Tensor:
    """Sample uint8 [3, H, W] at (x, y) -> `source_of` @ (x, y, 1), in pixels; bilinear, 128 outside the picture."""
    height, width = image.shape[1:]
    matrix = torch.tensor(source_of)
    x, y = torch.arange(width, dtype=torch.float32), torch.arange(height, dtype=torch.float32)
    # grid_sample counts from -1 to 1 between the centres of the first and the last pixel (align_corners=True)
    grid = torch.empty(1, height, width, 2)
    for axis, size in ((0, width), (1, height)):
        a, b, c = (matrix[axis] * (2.0 / max(size - 1, 1))).tolist()
        torch.add(a * x, (b * y + (c - 1.0))[:, None], out=grid[0, :, :, axis])
    centred = (image.to(torch.float32, memory_format=torch.contiguous_format) - FILL)[None]
    warped = F.grid_sample(centred, grid, mode="bilinear", padding_mode="zeros", align_corners=True)[0]
    return warped.add_(FILL).round_().to(torch.uint8)


def _through_tables(image: Tensor, table_of) -> Tensor:
    """Map each channel of uint8 [3, H, W] through the table of 256 levels that `table_of` makes from its histogram."""
    channels = image.contiguous().numpy()
    out = np.empty_like(channels)
    for channel, target in zip(channels, out, strict=True):
        np.take(table_of(np.bincount(channel.ravel(), minlength=256)), channel, out=target)
    return torch.from_numpy(out)


def _autocontrast_table(histogram: np.ndarray) -> np.ndarray:
    present = np.flatnonzero(histogram)
    low, high = int(present[0]), int(present[-1])
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return (np.arange(256) * scale - low * scale).clip(0, 255).astype(np.uint8)


def _equalize_table(histogram: np.ndarray) -> np.ndarray:
    step = int(histogram[histogram > 0][:-1].sum()) // 255
    if step == 0:
        return np.arange(256, dtype=np.uint8)
    below = np.cumsum(histogram) - histogram
    return ((below + step // 2) // step).clip(0, 255).astype(np.uint8)


OPS = (
    identity,
    autocontrast,
    identity,  # brightness
    identity,  # sharpness
    equalize,
    shear_x,
    shear_y,
    partial(translate, dim=2),
    partial(translate, dim=1),
    rotate,
)
