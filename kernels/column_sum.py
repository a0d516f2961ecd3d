"""The sum of a matrix's rows, as of a bias's gradient.

    out_d = sum_t x_td                                                  in fp32, and in a fixed order

Shapes: x [T, D] contiguous, out [D] of x's dtype. A program adds up every so-manieth tile of rows of its columns and
writes one share [D] fp32; a second launch adds the shares. Bytes: T D elements read; floor: that over the bandwidth.
PyTorch's own sum is as good for a few rows and, for tens of thousands, reads at a fraction of the bandwidth.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import lookup

# of the tiles in which shares are added: few columns, so that there are many programs
SHARES: int = 256
SHARE_COLUMNS: int = 16


@triton.jit(do_not_specialize=["T"])
def _column_sum(x_ptr, share_ptr, T, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(T, ROWS), tl.num_programs(1)):
        t = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # T * D may pass 2^31
        inside = (t < T)[:, None] & (d < D)[None, :]
        total += tl.load(x_ptr + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(share_ptr + tl.program_id(1) * D + d, tl.sum(total, 0), mask=d < D)


@triton.jit(do_not_specialize=["shares"])
def _add_shares(share_ptr, first_ptr, second_ptr, shares, D, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    share_ptr += tl.program_id(1) * shares * D
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, shares, ROWS):
        share = start + tl.arange(0, ROWS)
        inside = (share < shares)[:, None] & (d < D)[None, :]
        total += tl.load(share_ptr + share[:, None] * D + d[None, :], mask=inside, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + d, tl.sum(total, 0), mask=d < D)
    else:
        tl.store(second_ptr + d, tl.sum(total, 0), mask=d < D)


def add_shares(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first [D] and, if given, second [D] = parts [1 or 2, shares, D] fp32 summed over the shares."""
    count, shares, D = parts.shape
    _add_shares[(triton.cdiv(D, SHARE_COLUMNS), count)](
        parts, first, first if second is None else second, shares, D,
        ROWS=SHARES, COLUMNS=SHARE_COLUMNS, num_warps=8,
    )  # fmt: skip


def grid_of(T: int, D: int, programs: int, config: Mapping[str, Any]) -> tuple[int, int]:
    """(column blocks, shares) of about `programs` programs in all."""
    columns = triton.cdiv(D, config["COLUMNS"])
    return columns, max(1, min(triton.cdiv(T, config["ROWS"]), programs // columns))


def column_sum(x: Tensor, programs: int, config: Mapping[str, Any]) -> Tensor:
    """programs: how many fill the GPU. config: ROWS and COLUMNS of a tile, num_warps."""
    T, D = x.shape
    grid = grid_of(T, D, programs, config)
    parts = torch.empty(1, grid[1], D, dtype=torch.float32, device=x.device)
    _column_sum[grid](
        x, parts, T, D, ROWS=config["ROWS"], COLUMNS=config["COLUMNS"], num_warps=config["num_warps"]
    )
    out = x.new_empty(D)
    add_shares(parts, out)
    return out


def aot_cases(arch: int) -> list[AotCase]:
    """All dtypes, and the sum of shares."""
    config = lookup("column_sum", arch)
    tile = {"ROWS": config["ROWS"], "COLUMNS": config["COLUMNS"]}
    sizes = {"T": "i32", "D": "i32:16"}
    found = [
        AotCase(dtype, _column_sum, {"x_ptr": f"*{dtype}", "share_ptr": "*fp32", **sizes}, tile, config["num_warps"], 3)
        for dtype in ("bf16", "fp16", "fp32")
    ]  # fmt: skip
    for dtype in ("bf16", "fp32"):
        out = {"first_ptr": f"*{dtype}", "second_ptr": f"*{dtype}", "shares": "i32", "D": "i32:16"}
        tile = {"ROWS": SHARES, "COLUMNS": SHARE_COLUMNS}
        found.append(AotCase(f"add shares {dtype}", _add_shares, {"share_ptr": "*fp32", **out}, tile, 8, 3))
    return found
