"""Attention, backward; names, segments and tiles as in attention.py.

    delta = sum over D of dO O                                       one number a row
    dP = dropout(dO V^T)         dS = scale P (dP - delta)           P = exp(scale Q K^T - L), computed again
    dQ = dS K                    dK = dS^T Q                         dV = dropout(P)^T dO

Two launches, no atomics, every sum in a fixed order. dQ: one program does BM queries and passes over their keys; it
also writes delta. Then dK, dV: one program does BN keys and passes over all queries of their segment, which for keys
that many texts read are the rows of all these texts.
FLOPs: 14 Nq Nk D a head and segment (10 are needed; Q K^T and dO V^T are done twice, the price of no atomics).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .attention import (
    TAIL,
    Segments,
    cases_of,
    find_tile,
    kept,
    key_start,
    load_keys,
    query_rows,
    span,
    thresholds,
)
from .tiles import LOG2E


@triton.jit
def _dq_keys(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, n, Nk, seed, row, last, scale, threshold, gain,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ / scale, with one more tile of keys. lse is in base 2."""
    j, k, v = load_keys(k_ptr, v_ptr, stride_kn, n, Nk, MASKED, D, BN)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if MASKED:
        seen = (j < Nk)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= last[:, None])
        p = tl.where(seen, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    if DROPOUT:
        dp = tl.where(kept(seed, row, n, threshold, BM, BN), dp * gain, 0.0)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["segments", "T", "threshold", "first"])
def _attention_dq(
    q_ptr, k_ptr, v_ptr, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, q_offsets_ptr, k_offsets_ptr, rows_ptr, seed_ptr,
    segments, T, Nq, Nk, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_dq,
    scale, threshold, gain, first, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, LEVELS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, H). O and dO are [T, H, D], L and delta [H, T]; a row of dQ is stride_dq long."""
    segment, start = find_tile(q_offsets_ptr, Nq, segments, BM, LEVELS)
    begin, length = span(q_offsets_ptr, segment, Nq)
    if start >= length:
        return
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i, d = start + tl.arange(0, BM), tl.arange(0, D)
    row, at = query_rows(q_offsets_ptr, rows_ptr, segment, begin, i, length, stride_qb, stride_qn)
    inside = i < length
    q = tl.load(q_ptr + head * stride_qh + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    o_at = (row * H + head)[:, None] * D + d[None, :]
    do = tl.load(do_ptr + o_at, mask=inside[:, None], other=0.0)
    o = tl.load(o_ptr + o_at, mask=inside[:, None], other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + head * T + row, delta, mask=inside)
    lse = tl.load(lse_ptr + head * T + row, mask=inside, other=0.0) * LOG2E
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row that sees nothing
    k_begin, keys = span(k_offsets_ptr, segment, Nk)
    k_at = key_start(k_offsets_ptr, segment, k_begin, stride_kb, stride_kn) + head * stride_kh
    k_ptr += k_at
    v_ptr += k_at

    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0
    last = i
    common, end = keys, keys
    if CAUSAL:
        last = i + (first if first >= 0 else keys - length)
        common = tl.minimum(keys, tl.maximum(tl.min(last, 0) + 1, 0))
        end = tl.minimum(keys, tl.max(last, 0) + 1)
    whole = common // BN * BN
    base2 = scale * LOG2E
    dq = tl.zeros((BM, D), tl.float32)
    for n in tl.range(0, whole, BN):
        dq = _dq_keys(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, n, keys, seed, row, last, base2, threshold, gain,
            DROPOUT, CAUSAL, False, PRECISION, D, BM, BN,
        )  # fmt: skip
    for n in tl.range(whole, end, TAIL):
        dq = _dq_keys(
            dq, q, do, lse, delta, k_ptr, v_ptr, stride_kn, n, keys, seed, row, last, base2, threshold, gain,
            DROPOUT, CAUSAL, True, PRECISION, D, BM, TAIL,
        )  # fmt: skip
    dq_at = dq_ptr + (row * stride_dq + head * D)[:, None] + d[None, :]
    tl.store(dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _dkv_rows(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_offsets_ptr, rows_ptr, stride_qb, stride_qn,
    segment, begin, length, m, n, seed, shift, scale, threshold, gain,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV, with one more tile of queries. Scores are transposed, [BN, BM]."""
    i, d = m + tl.arange(0, BM), tl.arange(0, D)
    inside = i < length
    row, at = query_rows(q_offsets_ptr, rows_ptr, segment, begin, i, length, stride_qb, stride_qn)
    H = tl.num_programs(1)
    do_at = do_ptr + (row * H)[:, None] * D + d[None, :]
    if MASKED:  # rows beyond the end are zeros in Q and dO, and so add nothing
        q = tl.load(q_ptr + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
        do = tl.load(do_at, mask=inside[:, None], other=0.0)
        lse = tl.load(lse_ptr + row, mask=inside, other=0.0) * LOG2E
        delta = tl.load(delta_ptr + row, mask=inside, other=0.0)
    else:
        q = tl.load(q_ptr + at[:, None] + d[None, :])
        do = tl.load(do_at)
        lse = tl.load(lse_ptr + row) * LOG2E
        delta = tl.load(delta_ptr + row)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[None, :])
    if MASKED and CAUSAL:
        j = n + tl.arange(0, BN)
        p = tl.where(j[:, None] <= (i + shift)[None, :], p, 0.0)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    if DROPOUT:
        keep = tl.trans(kept(seed, row, n, threshold, BM, BN))
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * gain, 0.0)
    else:
        dropped = p
    dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = p * (dp - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["segments", "T", "threshold", "first"])
def _attention_dkv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, q_offsets_ptr, k_offsets_ptr, rows_ptr, seed_ptr,
    segments, T, Nq, Nk, stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_dk,
    scale, threshold, gain, first, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, LEVELS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of keys, H). A row of dK and of dV is stride_dk long."""
    segment, n = find_tile(k_offsets_ptr, Nk, segments, BN, LEVELS)
    k_begin, keys = span(k_offsets_ptr, segment, Nk)
    if n >= keys:
        return
    head = tl.program_id(1).to(tl.int64)
    j, d = n + tl.arange(0, BN), tl.arange(0, D)
    inside = (j < keys)[:, None]
    k_at = key_start(k_offsets_ptr, segment, k_begin, stride_kb, stride_kn) + head * stride_kh
    k_at += j[:, None] * stride_kn + d[None, :]
    k = tl.load(k_ptr + k_at, mask=inside, other=0.0)
    v = tl.load(v_ptr + k_at, mask=inside, other=0.0)
    begin, length = span(q_offsets_ptr, segment, Nq)
    q_ptr += head * stride_qh
    do_ptr += head * D
    lse_ptr += head * T
    delta_ptr += head * T

    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0
    shift, start, free = 0, 0, 0  # queries before `start` see none of these keys, from `free` on all of them
    if CAUSAL:
        shift = first if first >= 0 else keys - length
        start = tl.maximum(n - shift, 0) // TAIL * TAIL
        free = tl.minimum(start + tl.cdiv(tl.maximum(n + BN - 1 - shift, 0) - start, TAIL) * TAIL, length)
    whole = free + tl.maximum(length - free, 0) // BM * BM
    base2 = scale * LOG2E
    dk = tl.zeros((BN, D), tl.float32)
    dv = tl.zeros((BN, D), tl.float32)
    if CAUSAL:
        for m in tl.range(start, free, TAIL):
            dk, dv = _dkv_rows(
                dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_offsets_ptr, rows_ptr, stride_qb, stride_qn,
                segment, begin, length, m, n, seed, shift, base2, threshold, gain,
                DROPOUT, CAUSAL, True, PRECISION, D, TAIL, BN,
            )  # fmt: skip
    for m in tl.range(free, whole, BM):
        dk, dv = _dkv_rows(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_offsets_ptr, rows_ptr, stride_qb, stride_qn,
            segment, begin, length, m, n, seed, shift, base2, threshold, gain,
            DROPOUT, CAUSAL, False, PRECISION, D, BM, BN,
        )  # fmt: skip
    for m in tl.range(whole, length, TAIL):
        dk, dv = _dkv_rows(
            dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, q_offsets_ptr, rows_ptr, stride_qb, stride_qn,
            segment, begin, length, m, n, seed, shift, base2, threshold, gain,
            DROPOUT, CAUSAL, True, PRECISION, D, TAIL, BN,
        )  # fmt: skip
    at = (k_begin + j)[:, None] * stride_dk + head * D + d[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, (dv * gain).to(dv_ptr.dtype.element_ty), mask=inside)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    segments: Segments,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    first: int,
    precision: str,
    dq_config: Mapping[str, int],
    dkv_config: Mapping[str, int],
) -> None:
    """Write dq, dk and dv: q's and k's shapes, [rows, H, D] within rows of any length, which dk and dv share.

    do and o are contiguous. Keys that no query reads get 0.
    """
    delta = torch.empty_like(lse)
    tail = (scale, *thresholds(dropout), first, causal, precision, segments.levels, segments.D)
    shape = (
        *segments.offsets,
        seed,
        segments.count,
        segments.queries,
        segments.Nq,
        segments.Nk,
        *segments.strides,
    )
    grid = segments.query_grid(dq_config["BM"])
    if grid[0] * grid[1]:
        _attention_dq[grid](q, k, v, o, do, lse, delta, dq, *shape, dq.stride(-3), *tail, **dq_config)
    grid = segments.key_grid(dkv_config["BN"])
    if grid[0] * grid[1]:
        _attention_dkv[grid](q, k, v, do, lse, delta, dk, dv, *shape, dk.stride(-3), *tail, **dkv_config)


def aot_cases(arch: int) -> list[AotCase]:
    """As those of attention.py."""
    return [*cases_of("dq", _attention_dq, arch), *cases_of("dkv", _attention_dkv, arch)]
