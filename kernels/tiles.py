"""Pieces that kernels share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import triton
import triton.language as tl

from .aot import AotCase

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NEVER = tl.constexpr(-1e30)  # a logit that counts for nothing; infinity would give inf - inf
SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def normal_cdf(h):
    """Of the standard normal distribution; GELU is h times it."""
    return 0.5 * (1.0 + tl.erf(h * SQRT_HALF))


@triton.jit
def gelu_slope(h, cdf):
    """GELU's derivative at h, whose `normal_cdf` is cdf."""
    return cdf + h * INV_SQRT_2PI * tl.exp(-0.5 * h * h)


@triton.jit
def halves(tile, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right half of a [BM, BN] tile. An epilogue that takes them in turn needs half the registers."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes the host five microseconds, and a training step asks 800 times."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that is at least n > 0."""
    return 1 << (n - 1).bit_length()


def aot_case(
    name: str,
    fn: Any,
    signature: dict[str, str],
    constexprs: dict[str, Any],
    config: Mapping[str, Any],
    tensor_cores: bool | Literal["mma"] = True,
) -> AotCase:
    """An AotCase of a configuration of a table: its tile sizes are constexpr, the rest are launch options."""
    tiles = dict(config)
    warps, stages = tiles.pop("num_warps"), tiles.pop("num_stages")
    return AotCase(name, fn, signature, constexprs | tiles, warps, stages, tensor_cores)
