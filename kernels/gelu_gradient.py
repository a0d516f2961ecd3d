"""GELU, backward, with all else that a feed-forward's backward makes of its hidden state, in one pass over memory.

    cdf = (1 + erf(h / sqrt 2)) / 2
    dh  = da (cdf + h exp(-h^2 / 2) / sqrt(2 pi))           a = h cdf           db = sum over rows of dh

Shapes: da, h, dh, a [T, F] contiguous, of one dtype; db [F] of that dtype, summed in fp32 in a fixed order.
Bytes: 4 T F elements; one by one, GELU's backward, GELU again and the sum move 6. FLOPs: some 40 an element.
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
from .tiles import cdiv, gelu_slope, normal_cdf


@triton.jit(do_not_specialize=["T"])
def _gelu_gradient(da_ptr, h_ptr, dh_ptr, a_ptr, share_ptr, T, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    f = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(T, ROWS), tl.num_programs(1)):
        t = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # T * F may pass 2^31
        at = t[:, None] * F + f[None, :]
        inside = (t < T)[:, None] & (f < F)[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(da_ptr + at, mask=inside, other=0.0).to(tl.float32)
        cdf = normal_cdf(h)
        tl.store(a_ptr + at, (h * cdf).to(a_ptr.dtype.element_ty), mask=inside)
        dh = da * gelu_slope(h, cdf)
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        total += dh
    tl.store(share_ptr + tl.program_id(1) * F + f, tl.sum(total, 0), mask=f < F)


def gelu_gradient(
    da: Tensor, h: Tensor, programs: int, config: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, a, db. programs: how many fill the GPU. config: ROWS and COLUMNS of a tile, num_warps."""
    T, F = h.shape
    dh, a, db = torch.empty_like(h), torch.empty_like(h), h.new_empty(F)
    columns = cdiv(F, config["COLUMNS"])
    grid = columns, max(1, min(cdiv(T, config["ROWS"]), programs // columns))
    parts = torch.empty(1, grid[1], F, dtype=torch.float32, device=h.device)
    _gelu_gradient[grid](
        da, h, dh, a, parts, T, F,
        ROWS=config["ROWS"], COLUMNS=config["COLUMNS"], num_warps=config["num_warps"],
    )  # fmt: skip
    add_shares(parts, db)
    return dh, a, db


def aot_cases(arch: int) -> list[AotCase]:
    config = lookup("gelu_gradient", arch)
    tile = {"ROWS": config["ROWS"], "COLUMNS": config["COLUMNS"]}
    pointers = ("da_ptr", "h_ptr", "dh_ptr", "a_ptr")
    return [
        AotCase(
            dtype, _gelu_gradient,
            dict.fromkeys(pointers, f"*{dtype}") | {"share_ptr": "*fp32", "T": "i32", "F": "i32:16"},
            tile, config["num_warps"], 3,
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]  # fmt: skip
