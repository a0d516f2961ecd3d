"""Softmax and cross-entropy of a slab of logits, which become their own gradient.

    z_v  = logits_v + bias_v        L = lse(z) - (1 - eps) z_y - eps / V sum_v z_v
    dz_v = c (softmax(z)_v - (1 - eps) 1[v = y] - eps / V)

Shapes: logits [T, V] within [T, stride], bias [stride]: the rest is anything, and overwritten; with a stride of a
multiple of 16, loads are vectors though V is none (30,524). Labels y [T] int64; coefficients c [T], losses L [T] fp32.
A row whose label is ignored has loss and gradient 0; one whose label is no column has loss NaN. Sums are fp32 whatever
the dtype. One program a row reads it twice, the second time from L2, and writes it once. Bytes: 4 T V in half
precision; floor: that over copy bandwidth. FLOPs: two exponentials an element. The products around it are BLAS's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import buckets, lookup
from .tiles import LN2, LOG2E, NEVER, aot_case


@triton.jit
def _load(row, bias_ptr, v, V, stride):
    """Logits of columns v, in fp32 and base 2."""
    z = tl.load(row + v, mask=v < stride, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + v, mask=v < stride, other=0.0).to(tl.float32)
    return tl.where(v < V, z * LOG2E, NEVER)


@triton.jit
def _cross_entropy(
    logits_ptr, bias_ptr, label_ptr, coefficient_ptr, loss_ptr, V, stride, ignore_index, smoothing,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row program_id(0). coefficient_ptr None: all are 1."""
    t = tl.program_id(0).to(tl.int64)  # T * stride may pass 2^31
    row = logits_ptr + t * stride
    columns = tl.arange(0, BLOCK)
    label = tl.load(label_ptr + t)
    if label == ignore_index:
        tl.store(loss_ptr + t, 0.0)
        if GRADIENT:
            for start in range(0, stride, BLOCK):
                v = start + columns
                tl.store(row + v, tl.zeros((BLOCK,), logits_ptr.dtype.element_ty), mask=v < stride)
    else:
        # each lane has a softmax of its own; reductions over the block, which wait for all warps, come once a row
        top = tl.full([BLOCK], NEVER, tl.float32)
        total, z_sum = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, V, BLOCK):
            v = start + columns
            z = _load(row, bias_ptr, v, V, stride)
            z_sum += tl.where(v < V, z, 0.0)
            smaller = tl.exp2(-tl.abs(z - top))  # of this and what there was, relative to the larger
            total = tl.where(z > top, total * smaller + 1.0, total + smaller)
            top = tl.maximum(top, z)
        highest = tl.max(top, 0)
        lse = highest + tl.log2(tl.sum(total * tl.exp2(top - highest), 0))
        known = (label >= 0) & (label < V)
        z_label = tl.load(row + label, mask=known, other=float("nan")).to(tl.float32)
        if bias_ptr is not None:
            z_label += tl.load(bias_ptr + label, mask=known, other=0.0).to(tl.float32)
        spread = smoothing / V
        everything = tl.where(spread > 0, spread * tl.sum(z_sum, 0), 0.0)  # a word may be banned by -inf
        tl.store(loss_ptr + t, (lse - everything) * LN2 - (1.0 - smoothing) * z_label)
        if GRADIENT:
            c = 1.0
            if coefficient_ptr is not None:
                c = tl.load(coefficient_ptr + t)
            for start in range(0, V, BLOCK):
                v = start + columns
                dz = tl.exp2(_load(row, bias_ptr, v, V, stride) - lse) - spread
                dz = tl.where(v == label, dz - (1.0 - smoothing), dz) * c
                tl.store(row + v, dz.to(logits_ptr.dtype.element_ty), mask=v < stride)


def cross_entropy_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    coefficients: Tensor | None,
    losses: Tensor,
    smoothing: float,
    ignore_index: int,
    gradient: bool,
    config: Mapping[str, Any],
) -> None:
    """Fill losses [T]; with `gradient` overwrite the logits by theirs. Only logits may be strided."""
    _cross_entropy[(len(logits),)](
        logits, bias, labels, coefficients, losses, logits.shape[1], logits.stride(0), ignore_index, smoothing,
        GRADIENT=gradient, **config,
    )  # fmt: skip


def aot_cases(arch: int) -> list[AotCase]:
    """bf16, fp16 and fp32 logits with bias, losses alone and with gradients, with coefficients and without."""
    types = {"label_ptr": "*i64", "loss_ptr": "*fp32", "V": "i32", "stride": "i32:16", "ignore_index": "i32"}
    types |= {"smoothing": "fp32"}
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        config = lookup("linear_cross_entropy", arch, *buckets("softmax", dtype == "fp32"))
        for bias in (dtype, "fp32") if dtype != "fp32" else (dtype,):
            signature = types | {"logits_ptr": f"*{dtype}", "bias_ptr": f"*{bias}"}
            name = f"{dtype} logits, {bias} bias"
            for what, gradient in (("losses", False), ("gradient", True)):
                fixed = {"coefficient_ptr": None, "GRADIENT": gradient}
                found.append(aot_case(f"{what}, {name}", _cross_entropy, signature, fixed, config, False))
        signature, fixed = signature | {"coefficient_ptr": "*fp32"}, {"GRADIENT": True}
        found.append(aot_case(f"gradient, {name}, weighted", _cross_entropy, signature, fixed, config, False))
    return found
