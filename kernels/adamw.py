"""AdamW, the moving average of the weights and low-precision copies of both, for any number of tensors in one launch.

    m <- m + (1 - beta1) (s g - m)          v <- v + (1 - beta2) ((s g)^2 - v)          s: scale of the gradients
    p <- p (1 - lr decay) - lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    a <- a + (1 - momentum) (p - a)         copies of p and a in a half-precision dtype

p, m, v, a fp32, contiguous; g fp32 or half; t fp32 on the device. A program works on one chunk of one tensor. It finds
its tensor in `chunks` [C, 2] int32 (row of the table, number of the chunk within the tensor), and the addresses in
`table` [n, 9] int64: p, g, m, v, t, a, copy of p, copy of a (0: there is none), number of elements. Without g the
weights stay and only the average moves.
Bytes an element: 28 for AdamW with fp32 gradients, 8 more with an average, 2 a copy; one pass instead of six.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import lookup

COLUMNS = 9
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _pointer(row, column: tl.constexpr, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(row + column).to(tl.pointer_type(dtype))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _chunk(
    row, start, n, lr, shrink, scale, mix1, mix2, correction1, correction2, eps, mix,
    GRAD: tl.constexpr, COPY: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    p_ptr = _pointer(row, 0, tl.float32, ALIGNED)
    g_ptr = _pointer(row, 1, GRAD, ALIGNED)
    m_ptr = _pointer(row, 2, tl.float32, ALIGNED)
    v_ptr = _pointer(row, 3, tl.float32, ALIGNED)
    a_ptr = _pointer(row, 5, tl.float32, ALIGNED)
    p_copy = _pointer(row, 6, COPY, ALIGNED)
    a_copy = _pointer(row, 7, COPY, ALIGNED)
    trained = tl.load(row + 1) != 0
    averaged = tl.load(row + 5) != 0
    copied = tl.load(row + 6) != 0
    average_copied = tl.load(row + 7) != 0
    for first in range(0, CHUNK, BLOCK):
        k = start + first + tl.arange(0, BLOCK)
        if MASKED:
            inside = k < n
        else:
            inside = None  # a mask of unknown alignment would forbid vector loads
        p = tl.load(p_ptr + k, mask=inside)
        if trained:
            g = tl.load(g_ptr + k, mask=inside).to(tl.float32) * scale
            m = tl.load(m_ptr + k, mask=inside)
            v = tl.load(v_ptr + k, mask=inside)
            m += mix1 * (g - m)
            v += mix2 * (g * g - v)
            p = p * shrink - lr * correction1 * m / (tl.sqrt(v) * correction2 + eps)
            tl.store(p_ptr + k, p, mask=inside)
            tl.store(m_ptr + k, m, mask=inside)
            tl.store(v_ptr + k, v, mask=inside)
        if copied:
            tl.store(p_copy + k, p, mask=inside)
        if AVERAGE:
            if averaged:
                a = tl.load(a_ptr + k, mask=inside)
                a += mix * (p - a)
                tl.store(a_ptr + k, a, mask=inside)
                if average_copied:
                    tl.store(a_copy + k, a, mask=inside)


@triton.jit
def _step(
    table_ptr, decay_ptr, chunks_ptr, scale_ptr, lr, mix1, mix2, log2_beta1, log2_beta2, eps, mix,
    GRAD: tl.constexpr, COPY: tl.constexpr, AVERAGE: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    tensor = tl.load(chunks_ptr + 2 * program)
    start = tl.load(chunks_ptr + 2 * program + 1).to(tl.int64) * CHUNK
    row = table_ptr + tensor * 9
    n = tl.load(row + 8)
    shrink = 1.0 - lr * tl.load(decay_ptr + tensor)
    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    correction1, correction2 = 1.0, 1.0
    if tl.load(row + 1) != 0:  # in fp64, because 1 - 0.999^t of the first steps has lost four digits in fp32
        t = tl.load(_pointer(row, 4, tl.float32, ALIGNED)).to(tl.float64)
        correction1 = (1.0 / (1.0 - tl.exp2(t * log2_beta1))).to(tl.float32)
        correction2 = (1.0 / tl.sqrt(1.0 - tl.exp2(t * log2_beta2))).to(tl.float32)
    if start + CHUNK <= n:
        _chunk(
            row, start, n, lr, shrink, scale, mix1, mix2, correction1, correction2, eps, mix,
            GRAD, COPY, AVERAGE, ALIGNED, False, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        _chunk(
            row, start, n, lr, shrink, scale, mix1, mix2, correction1, correction2, eps, mix,
            GRAD, COPY, AVERAGE, ALIGNED, True, CHUNK, BLOCK,
        )  # fmt: skip


def step(
    table: Tensor,
    decay: Tensor,
    chunks: Tensor,
    grad_scale: Tensor | None,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    momentum: float | None,
    grad_dtype: torch.dtype,
    copy_dtype: torch.dtype,
    aligned: bool,
    config: Mapping[str, Any],
) -> None:
    """One step, in place, on the tensors whose addresses are in `table`.

    decay [n] fp32; grad_scale: fp32 scalar on the device; momentum None: averages stay; aligned: every address is a
    multiple of 16 bytes; config: `chunk` (what `chunks` was cut by), `block`, `num_warps`.
    """
    if config["chunk"] % config["block"]:
        raise ValueError(f"adamw: block must divide chunk, got {dict(config)}; correct tables/adamw.json")
    if not len(chunks):
        return
    _step[(len(chunks),)](
        table, decay, chunks, grad_scale, lr, 1 - betas[0], 1 - betas[1],
        *(math.log2(beta) if beta > 0 else -math.inf for beta in betas),
        eps, 0.0 if momentum is None else 1 - momentum,
        GRAD=DTYPES[grad_dtype], COPY=DTYPES[copy_dtype], AVERAGE=momentum is not None, ALIGNED=aligned,
        CHUNK=config["chunk"], BLOCK=config["block"], num_warps=config["num_warps"],
    )  # fmt: skip


def aot_cases(arch: int) -> list[AotCase]:
    """fp32 and bf16 gradients, with the average; clipping by a device scalar or none; aligned addresses or not."""
    config = lookup("adamw", arch)
    scalars = ("lr", "mix1", "mix2", "log2_beta1", "log2_beta2", "eps", "mix")
    arguments = dict.fromkeys(scalars, "fp32") | {
        "table_ptr": "*i64",
        "decay_ptr": "*fp32",
        "chunks_ptr": "*i32",
        "scale_ptr": "*fp32",
    }
    sizes = {"CHUNK": config["chunk"], "BLOCK": config["block"], "COPY": tl.bfloat16}
    found = []
    for gradients, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        for form in ("", ", unscaled", ", no average", ", unaligned"):
            constants = {
                "GRAD": dtype,
                "AVERAGE": "no average" not in form,
                "ALIGNED": "unaligned" not in form,
            }
            if "unscaled" in form:
                constants["scale_ptr"] = None
            name = f"{gradients} gradients{form}"
            found.append(AotCase(name, _step, arguments, constants | sizes, config["num_warps"], 3))
    return found
