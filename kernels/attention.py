"""Attention, forward:  O = dropout(P) V,  P = softmax(scale Q K^T),  L = log of P's denominator.

Rows of Q attend in segments: segment s has its own queries and its own keys, and one program does BM queries of one
segment and head. The same kernel is
    dense      q [S, N, H, D] and k, v [S, N', H, D] with any strides (last 1): a picture's patches
    packed     q [T, H, D], segment s is offsets[s] : offsets[s + 1]: texts of different lengths without padding
    shared     q [T, H, D] read through `rows`, which lists the rows of one segment's queries one behind the other: the
               texts that read the same image are one segment, so its keys and values are loaded once per BM rows, never
               copied, and their gradients are summed in one program's fixed order
Queries and keys may each be dense or packed. With causal, query i sees keys up to `first` + i, or, first < 0, so that a
segment's last query sees its last key. A query that sees no key gets 0.

Softmax is online, base 2, in fp32. Whole tiles of BN keys need no mask; what is left goes in tiles of 16: 197 keys cost
208 columns and 577 cost 592. Dropout keeps an element where a Philox word of (seed; row, head, key) reaches a
threshold, so backward finds the same mask whatever its tiles; one Philox call serves four keys.
FLOPs: 4 Nq Nk D a head and segment, forward. Bytes: Q, K, V read, O written once, and 4 a row for L.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import lookup
from .tiles import LN2, LOG2E, aot_case, cdiv

TAIL = tl.constexpr(16)  # width of the tiles at a segment's end: the least that tl.dot takes


@triton.jit
def find_tile(offsets_ptr, N, segments, BLOCK: tl.constexpr, LEVELS: tl.constexpr):
    """The segment of tile program_id(0), and the tile's first row in it (beyond its end for a tile too many).

    Packed, segment s owns the tiles from offsets[s] // BLOCK + s on: as many as it needs or one more, so that nobody
    has to count them. The last s that begins at or before the tile is found among 128 candidates at a time.
    """
    tile = tl.program_id(0)
    if offsets_ptr is None:
        tiles = tl.cdiv(N, BLOCK)
        segment = tile // tiles
        start = (tile % tiles) * BLOCK
    else:
        segment = 0
        for level in tl.static_range(LEVELS):
            step = 1 << (7 * (LEVELS - 1 - level))
            candidate = segment + tl.arange(0, 128) * step
            inside = candidate < segments
            begin = tl.load(offsets_ptr + candidate, mask=inside, other=0)
            passed = inside & (begin // BLOCK + candidate <= tile)
            segment += (tl.sum(passed.to(tl.int32), 0) - 1) * step
        start = (tile - tl.load(offsets_ptr + segment) // BLOCK - segment) * BLOCK
    return segment, start


@triton.jit
def span(offsets_ptr, segment, N):
    """First row of a segment in the whole batch (int64), and its length."""
    if offsets_ptr is None:
        begin = segment.to(tl.int64) * N
        length = N
    else:
        begin = tl.load(offsets_ptr + segment).to(tl.int64)
        length = (tl.load(offsets_ptr + segment + 1) - begin).to(tl.int32)
    return begin, length


@triton.jit
def query_rows(offsets_ptr, rows_ptr, segment, begin, i, length, stride_b, stride_n):
    """Of queries i of a segment: their rows in O and L, and where they are in Q; both int64, elements can pass 2^31."""
    if rows_ptr is None:
        row = begin + i
    else:
        row = tl.load(rows_ptr + begin + i, mask=i < length, other=0).to(tl.int64)
    if offsets_ptr is None:
        at = segment.to(tl.int64) * stride_b + i.to(tl.int64) * stride_n
    else:
        at = row * stride_n
    return row, at


@triton.jit
def key_start(offsets_ptr, segment, begin, stride_b, stride_n):
    """Where a segment's keys begin in K, and its values in V."""
    if offsets_ptr is None:
        at = segment.to(tl.int64) * stride_b
    else:
        at = begin * stride_n
    return at


@triton.jit
def load_keys(k_ptr, v_ptr, stride_kn, n, Nk, MASKED: tl.constexpr, D: tl.constexpr, BN: tl.constexpr):
    """A tile of a segment's keys from n on: their numbers [BN], K and V [BN, D], with MASKED zeros from Nk on."""
    j = n + tl.arange(0, BN)
    at = j[:, None] * stride_kn + tl.arange(0, D)[None, :]
    if MASKED:
        k = tl.load(k_ptr + at, mask=(j < Nk)[:, None], other=0.0)
        v = tl.load(v_ptr + at, mask=(j < Nk)[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + at)
        v = tl.load(v_ptr + at)
    return j, k, v


@triton.jit
def kept(seed, row, n, threshold, BM: tl.constexpr, BN: tl.constexpr):
    """Which elements dropout keeps, [BM, BN], of rows `row` and their segment's keys from n, a multiple of 4."""
    quad = n // 4 + tl.arange(0, BN // 4)
    zero = tl.zeros((BM, BN // 4), tl.uint32)
    a, b, c, d = tl.philox(
        seed,
        zero + quad.to(tl.uint32)[None, :],
        zero + row.to(tl.uint32)[:, None],
        zero + tl.program_id(1).to(tl.uint32),
        zero,
        7,
    )
    words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), (BM, BN))
    return (words >> 1).to(tl.int32) >= threshold


@triton.jit
def _keys(
    acc, total, top, q, k_ptr, v_ptr, stride_kn, n, Nk, seed, row, last, scale, threshold,
    DROPOUT: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the sums of values and of weights and the largest score so far. last [BM]: last key seen."""
    j, k, v = load_keys(k_ptr, v_ptr, stride_kn, n, Nk, MASKED, D, BN)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        seen = (j < Nk)[None, :]
        if CAUSAL:
            seen = seen & (j[None, :] <= last[:, None])
        s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(s * scale - new_top[:, None])
    total = total * shrink + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(kept(seed, row, n, threshold, BM, BN), p, 0.0)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit(do_not_specialize=["segments", "T", "threshold", "first"])
def _attention(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, q_offsets_ptr, k_offsets_ptr, rows_ptr, seed_ptr, segments, T, Nq, Nk,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, scale, threshold, gain, first,
    CAUSAL: tl.constexpr, PRECISION: tl.constexpr, LEVELS: tl.constexpr,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of queries, H). O is [T, H, D], L is [H, T]."""
    segment, start = find_tile(q_offsets_ptr, Nq, segments, BM, LEVELS)
    begin, length = span(q_offsets_ptr, segment, Nq)
    if start >= length:
        return
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    i, d = start + tl.arange(0, BM), tl.arange(0, D)
    row, at = query_rows(q_offsets_ptr, rows_ptr, segment, begin, i, length, stride_qb, stride_qn)
    inside = i < length
    q = tl.load(q_ptr + head * stride_qh + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
    k_begin, keys = span(k_offsets_ptr, segment, Nk)
    k_at = key_start(k_offsets_ptr, segment, k_begin, stride_kb, stride_kn) + head * stride_kh
    k_ptr += k_at
    v_ptr += k_at

    DROPOUT: tl.constexpr = seed_ptr is not None
    seed = tl.load(seed_ptr) if DROPOUT else 0
    last = i
    common, end = keys, keys  # keys that every row of the tile sees; keys that any does
    if CAUSAL:
        last = i + (first if first >= 0 else keys - length)
        common = tl.minimum(keys, tl.maximum(tl.min(last, 0) + 1, 0))
        end = tl.minimum(keys, tl.max(last, 0) + 1)
    whole = common // BN * BN
    base2 = scale * LOG2E
    acc = tl.zeros((BM, D), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top = tl.full((BM,), -1e30, tl.float32)  # not -inf: a row may see nothing
    for n in tl.range(0, whole, BN):
        acc, total, top = _keys(
            acc, total, top, q, k_ptr, v_ptr, stride_kn, n, keys, seed, row, last, base2, threshold,
            DROPOUT, CAUSAL, False, PRECISION, D, BM, BN,
        )  # fmt: skip
    for n in tl.range(whole, end, TAIL):
        acc, total, top = _keys(
            acc, total, top, q, k_ptr, v_ptr, stride_kn, n, keys, seed, row, last, base2, threshold,
            DROPOUT, CAUSAL, True, PRECISION, D, BM, TAIL,
        )  # fmt: skip

    some = total > 0
    total = tl.where(some, total, 1.0)
    o = acc * (gain / total)[:, None]
    lse = tl.where(some, (top + tl.log2(total)) * LN2, float("-inf"))
    tl.store(lse_ptr + head * T + row, lse, mask=inside)
    o_at = o_ptr + (row * H + head)[:, None] * D + d[None, :]
    tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=inside[:, None])


def thresholds(dropout: float) -> tuple[int, float]:
    """Below which of 2^31 words an element is dropped, and what the others are multiplied by."""
    return round(dropout * 2**31), 1.0 / (1.0 - dropout)


class Segments:
    """Queries, keys and offsets of a launch, and the arguments that all kernels take of them.

    q [S, N, H, D] or [T, H, D] (packed, with q_offsets [S + 1]); k [S, N', H, D] or [T', H, D] with k_offsets; int32.
    rows: int32 [T]; q_offsets then counts in `rows`. The last stride is 1 and v has k's strides.
    """

    def __init__(
        self, q: Tensor, k: Tensor, q_offsets: Tensor | None, k_offsets: Tensor | None, rows: Tensor | None
    ):
        self.H, self.D = q.shape[-2:]
        self.offsets = (q_offsets, k_offsets, rows)
        self.count = q.shape[0] if q_offsets is None else len(q_offsets) - 1
        self.queries = q.shape[:-2].numel()  # of all segments
        self.keys = k.shape[:-2].numel()
        self.Nq = q.shape[1] if q_offsets is None else 0
        self.Nk = k.shape[1] if k_offsets is None else 0
        self.strides = (*self._strides(q), *self._strides(k))
        self.levels = 1 + (self.count > 128) + (self.count > 128**2) + (self.count > 128**3)

    @staticmethod
    def _strides(x: Tensor) -> tuple[int, int, int]:
        return x.stride()[:3] if x.ndim == 4 else (0, *x.stride()[:2])

    def query_grid(self, BM: int) -> tuple[int, int]:
        if self.Nq or self.offsets[0] is None:
            return self.count * cdiv(self.Nq, BM), self.H
        return self.queries // BM + self.count, self.H

    def key_grid(self, BN: int) -> tuple[int, int]:
        if self.Nk or self.offsets[1] is None:
            return self.count * cdiv(self.Nk, BN), self.H
        return self.keys // BN + self.count, self.H


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    seed: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    first: int,
    precision: str,
    config: Mapping[str, int],
) -> tuple[Tensor, Tensor]:
    """O, contiguous in the shape of q, and L [H, T] fp32. seed: int64, one number or more, where there is dropout.

    config: BM, BN, num_warps, num_stages. precision: of fp32 dots, "ieee" or "tf32".
    """
    o = q.new_empty(q.shape)
    lse = q.new_empty((segments.H, segments.queries), dtype=torch.float32)
    grid = segments.query_grid(config["BM"])
    if grid[0] * grid[1]:
        _attention[grid](
            q, k, v, o, lse, *segments.offsets, seed, segments.count, segments.queries, segments.Nq, segments.Nk,
            *segments.strides, scale, *thresholds(dropout), first, causal, precision,
            segments.levels, segments.D, **config,
        )  # fmt: skip
    return o, lse


KINDS = ("dense", "shared", "shared dropout", "few", "text", "fp32")  # of work; see blipfast.ops.attention


def cases_of(kernel: str, fn, arch: int) -> list[AotCase]:
    """Every configuration of one kernel, with whatever of its arguments costs registers."""
    found = []
    for D in (32, 64, 128):
        for kind in KINDS:
            for dtype in (
                ("bf16", "fp16") if (D, kind) == (64, "dense") else ("fp32" if kind == "fp32" else "bf16",)
            ):
                config = lookup("attention", arch, f"{kernel} D={D} {kind}")
                found.append(_case(f"{kernel} {dtype} D={D} {kind}", fn, kernel, kind, dtype, D, config))
    return found


def _case(name, fn, kernel, kind, dtype, D, config) -> AotCase:
    absent = {
        "dense": ("q_offsets_ptr", "k_offsets_ptr", "rows_ptr", "seed_ptr"),
        "shared": ("k_offsets_ptr", "seed_ptr"),
        "text": ("rows_ptr",),
    }
    constexprs = dict.fromkeys(absent.get(kind, ("k_offsets_ptr",)), None)
    constexprs |= {"CAUSAL": kind == "text", "PRECISION": "ieee", "LEVELS": 2, "D": D}
    known = {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "seed_ptr": "*i64", "scale": "fp32", "gain": "fp32"}
    known |= dict.fromkeys(("q_offsets_ptr", "k_offsets_ptr", "rows_ptr"), "*i32")
    signature = {}
    for argument in fn.arg_names:
        if argument not in constexprs:
            other = (
                f"*{dtype}"
                if argument.endswith("_ptr")
                else "i32:16"
                if argument.startswith("stride")
                else "i32"
            )
            signature[argument] = known.get(argument, other)
    rows = config["BN" if kernel == "dkv" else "BM"]  # of the products
    tensor_cores = dtype != "fp32" and (rows >= 64 and config["num_warps"] >= 4 or "mma")
    return aot_case(name, fn, signature, constexprs, config, tensor_cores)


def aot_cases(arch: int) -> list[AotCase]:
    """bf16 for every head size and kind of work, fp16 for the most common, and fp32."""
    return cases_of("forward", _attention, arch)
