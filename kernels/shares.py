"""The sum of what programs have summed, as of a weight's gradient over rows: in a fixed order, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .tiles import cdiv

SHARES = 256
COLUMNS = 16  # of a tile: few, so that there are many programs


@triton.jit(do_not_specialize=["shares"])
def _add_shares(part_ptr, first_ptr, second_ptr, shares, D, SHARES: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of one of the sums: program_id(1) says which."""
    d = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part_ptr += tl.program_id(1) * shares * D
    total = tl.zeros([SHARES, COLUMNS], tl.float32)
    for start in range(0, shares, SHARES):
        share = start + tl.arange(0, SHARES)
        inside = (share < shares)[:, None] & (d < D)[None, :]
        total += tl.load(part_ptr + share[:, None] * D + d[None, :], mask=inside, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + d, tl.sum(total, 0), mask=d < D)
    else:
        tl.store(second_ptr + d, tl.sum(total, 0), mask=d < D)


def add_shares(parts: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first [D] and, if given, second [D] = parts [1 or 2, shares, D] fp32 summed over the shares."""
    count, shares, D = parts.shape
    _add_shares[(cdiv(D, COLUMNS), count)](
        parts, first, first if second is None else second, shares, D,
        SHARES=SHARES, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip


def aot_cases(arch: int) -> list[AotCase]:
    types = {"part_ptr": "*fp32", "shares": "i32", "D": "i32:16"}
    tile = {"SHARES": SHARES, "COLUMNS": COLUMNS}
    return [
        AotCase(
            dtype, _add_shares, types | dict.fromkeys(("first_ptr", "second_ptr"), f"*{dtype}"), tile, 8, 3
        )
        for dtype in ("bf16", "fp16", "fp32")
    ]
