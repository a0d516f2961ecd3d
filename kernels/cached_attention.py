"""Attention of the newest tokens of texts that are being written, which puts their keys and values into a cache.

    O = softmax(scale Q K^T + mask) V        over the slots that each token sees, its own among them

Shapes: queries, keys and values of q new tokens of n images in one tensor [n, q, 3, H, D]; cache [n, S, 2, H, D]; each
new token's slot [n, q]; mask [n, q, S' <= S], nonzero where a slot is seen; O [n, q, H, D]. A program does an image
and a head. It takes the new keys and values from where they were made, so that nobody reads what another thread may not
have written yet. Bytes: an image's cache once; FLOPs: 4 q (S + q) D a head. With 12 heads and some 60 slots it is all
latency: the point is one launch instead of four.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import buckets, lookup
from .tiles import LOG2E, NEVER, aot_case


@triton.jit
def _add(acc, total, top, query, key, value, sees, scale, PRECISION: tl.constexpr):
    """Take keys and values up: sums of values and of weights, and the largest score so far."""
    s = tl.where(sees, tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E), NEVER)
    higher = tl.maximum(top, tl.max(s, 1))
    p = tl.where(sees, tl.exp2(s - higher[:, None]), 0.0)
    shrink = tl.exp2(top - higher)
    acc = acc * shrink[:, None] + tl.dot(p.to(value.dtype), value, input_precision=PRECISION)
    return acc, total * shrink + tl.sum(p, 1), higher


@triton.jit
def _cached_attention(
    qkv_ptr, cache_ptr, slot_ptr, mask_ptr, o_ptr, q, S, cache_n, cache_s, cache_kv, mask_n, mask_q, H, scale,
    PRECISION: tl.constexpr, D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    image, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, d = tl.arange(0, BM), tl.arange(0, D)
    token = (i < q)[:, None]
    new = qkv_ptr + ((image * q + i)[:, None] * 3 * H + head) * D + d[None, :]
    query = tl.load(new, mask=token, other=0.0)
    key = tl.load(new + H * D, mask=token, other=0.0)
    value = tl.load(new + 2 * H * D, mask=token, other=0.0)
    slot = tl.load(slot_ptr + image * q + i, mask=i < q, other=-1)
    seen = mask_ptr + image * mask_n + i[:, None] * mask_q

    acc, total, top = (
        tl.zeros([BM, D], tl.float32),
        tl.zeros([BM], tl.float32),
        tl.full([BM], NEVER, tl.float32),
    )
    own = tl.load(seen + slot[None, :], mask=token & ((i < q) & (slot < S))[None, :], other=0) != 0
    acc, total, top = _add(acc, total, top, query, key, value, own, scale, PRECISION)
    cache = cache_ptr + image * cache_n + head * D + d[None, :]
    for start in range(0, S, BN):
        j = start + tl.arange(0, BN)
        old = (j < S) & (tl.max((j[:, None] == slot[None, :]).to(tl.int32), 1) == 0)
        at = cache + j[:, None] * cache_s
        k = tl.load(at, mask=old[:, None], other=0.0)
        v = tl.load(at + cache_kv, mask=old[:, None], other=0.0)
        sees = tl.load(seen + j[None, :], mask=token & old[None, :], other=0) != 0
        acc, total, top = _add(acc, total, top, query, k, v, sees, scale, PRECISION)
    at = cache + slot[:, None] * cache_s
    tl.store(at, key, mask=token)
    tl.store(at + cache_kv, value, mask=token)
    o = o_ptr + ((image * q + i)[:, None] * H + head) * D + d[None, :]
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o, acc.to(o_ptr.dtype.element_ty), mask=token)


def cached_attention(
    qkv: Tensor,
    cache: Tensor,
    slots: Tensor,
    mask: Tensor,
    scale: float,
    precision: str,
    config: Mapping[str, Any],
) -> Tensor:
    """O; `cache` is written to. qkv and slots contiguous, mask bool. config: BM >= q, BN, num_warps, num_stages."""
    n, q, _, H, D = qkv.shape
    o = qkv.new_empty(n, q, H, D)
    mask = mask.view(torch.int8)
    _cached_attention[(n, H)](
        qkv, cache, slots, mask, o, q, mask.shape[-1], *cache.stride()[:3], *mask.stride()[:2], H, scale,
        PRECISION=precision, D=D, **config,
    )  # fmt: skip
    return o


def aot_cases(arch: int) -> list[AotCase]:
    found = []
    integers = dict.fromkeys(("q", "S", "H", "mask_n", "mask_q"), "i32")
    strides = dict.fromkeys(("cache_n", "cache_s", "cache_kv"), "i32:16")
    pointers = {"slot_ptr": "*i64", "mask_ptr": "*i8"}
    for dtype, D in [("bf16", 64), ("fp16", 32), ("bf16", 128), ("fp32", 64)]:
        types = dict.fromkeys(("qkv_ptr", "cache_ptr", "o_ptr"), f"*{dtype}") | pointers | integers | strides
        constants = {"D": D, "PRECISION": "ieee"}
        config = lookup("cached_attention", arch, *buckets(f"D={D}", dtype == "fp32"))
        cores = False if dtype == "fp32" else "mma"
        types |= {"scale": "fp32"}
        found.append(aot_case(f"{dtype} D={D}", _cached_attention, types, constants, config, cores))
    return found
