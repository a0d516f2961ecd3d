"""Dropout, residual and LayerNorm in one pass over memory, forward and backward.

    z = keep * x / (1 - p) + residual         y = (z - mean) * rstd * weight + bias          statistics over D

    xh = (z - mean) * rstd                    g = weight * dy
    dresidual = (g - mean(g) - xh * mean(g * xh)) * rstd + dz          dx = keep * dresidual / (1 - p)
    dweight = sum_t dy * xh                   dbias = sum_t dy

Shapes: x, residual, y, z and their gradients [T, D], contiguous; weight, bias [D]; mean, rstd [T] fp32. D <= 4096.
The dtypes of x, residual, y, z, weight may differ; z is rounded to its own before its statistics are taken, which are
fp32 (so is everything between loads and stores: eps 1e-12 is nothing in half precision).
keep is Bernoulli(1 - p) from Philox, 7 rounds, at counter (row, column / 8): recomputed in backward, not stored. One
call gives 16-bit numbers for eight columns; one call an element would cost more time than the memory traffic. So p is
rounded to a multiple of 2^-16, in the scale 1 / (1 - p) as well.
Bytes an element, all 2-byte: forward 8 (6 without z), backward 6 (+2 for dz, +2 for a dx of its own).
Backward: a fixed number of programs strides over the rows; each writes its share of dweight and dbias [programs, D],
and a second launch adds them up in a fixed order. No atomics: the same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .shares import add_shares
from .table import lookup
from .tiles import cdiv, next_power_of_2

MAX_D = 4096


@triton.jit
def _keep(seed_ptr, t, threshold, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] bool, true with probability 1 - threshold / 2^16; the same for a row in whatever tile it lies."""
    counter = t[:, None] * (BLOCK_D // 8) + tl.arange(0, BLOCK_D // 8)[None, :]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    a, b, c, d = tl.philox(tl.load(seed_ptr), low, high, low * 0, low * 0, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    bits = tl.join(words & 0xFFFF, words >> 16).reshape(ROWS, BLOCK_D)
    return bits.to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["T", "threshold"])
def _forward(
    x_ptr, r_ptr, w_ptr, b_ptr, y_ptr, z_ptr, mean_ptr, rstd_ptr, seed_ptr,
    T, D, eps, threshold, scale,
    STORE_Z: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)  # T * D may pass 2^31
    d = tl.arange(0, BLOCK_D)
    at = t[:, None] * D + d[None, :]
    inside = (t < T)[:, None] & (d < D)[None, :]
    z = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        z = tl.where(_keep(seed_ptr, t, threshold, ROWS, BLOCK_D), z * scale, 0.0)
    z += tl.load(r_ptr + at, mask=inside, other=0.0).to(tl.float32)
    z = z.to(z_ptr.dtype.element_ty).to(tl.float32)
    mean = tl.sum(z, 1) / D
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, centred * rstd[:, None] * w[None, :] + b[None, :], mask=inside)
    if STORE_Z:
        tl.store(z_ptr + at, z, mask=inside)
        tl.store(mean_ptr + t, mean, mask=t < T)
        tl.store(rstd_ptr + t, rstd, mask=t < T)


@triton.jit(do_not_specialize=["T", "threshold"])
def _backward(
    dy_ptr, dz_ptr, z_ptr, mean_ptr, rstd_ptr, w_ptr, dr_ptr, dx_ptr, dwb_ptr, seed_ptr,
    T, D, threshold, scale,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK_D], tl.float32)
    db = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for tile in range(program, tl.cdiv(T, ROWS), tl.num_programs(0)):
        t = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        at = t[:, None] * D + d[None, :]
        inside = (t < T)[:, None] & (d < D)[None, :]
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + t, mask=t < T, other=0.0)
        rstd = tl.load(rstd_ptr + t, mask=t < T, other=0.0)
        xh = tl.where(inside, (z - mean[:, None]) * rstd[:, None], 0.0)
        dw += dy * xh
        db += dy
        g = dy * w[None, :]
        along = tl.sum(g * xh, 1) / D
        dr = (g - (tl.sum(g, 1) / D)[:, None] - xh * along[:, None]) * rstd[:, None]
        if dz_ptr is not None:
            dr += tl.load(dz_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dr_ptr + at, dr, mask=inside)
        if dx_ptr is not None:
            if seed_ptr is not None:
                dr = tl.where(_keep(seed_ptr, t, threshold, ROWS, BLOCK_D), dr * scale, 0.0)
            tl.store(dx_ptr + at, dr, mask=inside)
    share = dwb_ptr + program * D + d
    tl.store(share, tl.sum(dw, 0), mask=d < D)
    tl.store(share + tl.num_programs(0) * D, tl.sum(db, 0), mask=d < D)


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout: float,
    eps: float,
    y_dtype: torch.dtype,
    z_dtype: torch.dtype,
    store_z: bool,
    config: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, z, mean, rstd; without `store_z` the last three are empty. seed: int64 on the device, of which one is read.

    config: `elements` a tile and `num_warps`.
    """
    T, D = x.shape
    y = torch.empty_like(x, dtype=y_dtype)
    z = x.new_empty((T, D) if store_z else (0, D), dtype=z_dtype)
    mean = x.new_empty(T if store_z else 0, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if T:
        rows, block, warps = _tile(config, D)
        _forward[(cdiv(T, rows),)](
            x, residual, weight, bias, y, z, mean, rstd, seed,
            T, D, eps, *_chance(dropout),
            STORE_Z=store_z, ROWS=rows, BLOCK_D=block, num_warps=warps,
        )  # fmt: skip
    return y, z, mean, rstd


def backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    dropout: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    config: Mapping[str, Any],
    programs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, dweight, dbias. dx is empty where it equals dresidual: one dtype and no dropout.

    config: as in `forward`; programs: at most so many share the rows.
    """
    T, D = z.shape
    own_dx = dropout > 0 or x_dtype != residual_dtype
    dr = torch.empty_like(z, dtype=residual_dtype)
    dx = z.new_empty((T if own_dx else 0, D), dtype=x_dtype)
    if not T:
        return dx, dr, torch.zeros_like(weight), torch.zeros_like(weight)
    rows, block, warps = _tile(config, D)
    programs = min(cdiv(T, rows), programs)
    shares = z.new_empty((2, programs, D), dtype=torch.float32)
    _backward[(programs,)](
        dy, dz, z, mean, rstd, weight, dr, dx if own_dx else None, shares, seed,
        T, D, *_chance(dropout),
        ROWS=rows, BLOCK_D=block, num_warps=warps,
    )  # fmt: skip
    dw, db = torch.empty_like(weight), torch.empty_like(weight)
    add_shares(shares, dw, db)
    return dx, dr, dw, db


def _chance(dropout: float) -> tuple[int, float]:
    """Of 2^16, how many random numbers drop; and the factor of what stays."""
    threshold = min(round(dropout * 2**16), 2**16 - 1)
    return threshold, 2**16 / (2**16 - threshold)


def _tile(config: Mapping[str, Any], D: int) -> tuple[int, int, int]:
    """Rows and columns of a tile of about `elements` elements, and its warps: more where one row has more than that."""
    if D > MAX_D:
        raise ValueError(
            f"layer_norm: the kernel takes at most {MAX_D} columns, got {D}; use backend 'torch'"
        )
    block = max(16, next_power_of_2(D))
    rows = min(16, max(1, config["elements"] // block))
    return rows, block, config["num_warps"] * max(1, block // config["elements"])


def aot_cases(arch: int) -> list[AotCase]:
    """The widths of BLIP (768 and 1024) and the widest, in bf16, fp16 and fp32, with and without dropout."""
    found = []
    for dtype, D in [("bf16", 1024), ("fp16", 1024), ("fp32", 1024), ("bf16", MAX_D), ("fp32", MAX_D)]:
        data, fp32 = f"*{dtype}", "*fp32"
        sizes = {"T": "i32", "D": "i32:16", "threshold": "i32", "scale": "fp32"}
        for dropout in (True, False):
            seed = ({"seed_ptr": "*i64"}, {}) if dropout else ({}, {"seed_ptr": None})
            name = f"{dtype} D={D}{' dropout' if dropout else ''}"
            config = lookup("layer_norm", arch, "forward")
            pointers = dict.fromkeys(("x_ptr", "r_ptr", "y_ptr", "z_ptr"), data)
            pointers |= dict.fromkeys(("w_ptr", "b_ptr", "mean_ptr", "rstd_ptr"), fp32)
            rows, _, warps = _tile(config, D)
            shape = {"ROWS": rows, "BLOCK_D": D}
            found.append(
                AotCase(
                    f"forward {name}",
                    _forward,
                    pointers | sizes | {"eps": "fp32"} | seed[0],
                    {"STORE_Z": True} | shape | seed[1],
                    warps,
                    3,
                )
            )
            config = lookup("layer_norm", arch, "backward")
            pointers = dict.fromkeys(("dy_ptr", "dz_ptr", "z_ptr", "dr_ptr", "dx_ptr"), data)
            pointers |= dict.fromkeys(("mean_ptr", "rstd_ptr", "w_ptr", "dwb_ptr"), fp32)
            rows, _, warps = _tile(config, D)
            shape = {"ROWS": rows, "BLOCK_D": D}
            found.append(
                AotCase(f"backward {name}", _backward, pointers | sizes | seed[0], shape | seed[1], warps, 3)
            )
    return found
