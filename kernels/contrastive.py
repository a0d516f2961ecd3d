"""Contrastive loss of a batch against its keys and a queue, with soft targets: nothing of size batch x queue is held.

    s_ij = q_i k_j / tau            u_ij = p_i k_j / tau               k = batch keys, then queue
    P = softmax_j(s)                w = softmax_j(u)                   y_ij = 1[k_j is a positive of q_i] / n_i
    L_i  = lse_j(s) - alpha E_w[s] - (1 - alpha) E_y[s]                (targets alpha w + (1 - alpha) y sum to one)
    ds   = P - alpha w - (1 - alpha) y          dq = ds k / tau        (w is a constant: the teacher learns nothing)
    dtau = -(1 / tau) sum_i (E_P[s] - alpha E_w[s] - (1 - alpha) E_y[s])

Three steps. Statistics: each program streams a share of the keys past a tile of rows and leaves eight sums a row, those
of two online softmaxes (student and teacher) and of the positives. Merge: a row's shares become its loss, its part of
dtau and what the gradient needs. Gradient: the keys once more; dq is a sum over shares. Every sum has a fixed order.

Shapes: q, p [B, E] fp16; k [E, N], fp32 or half, read where it lies, in its own dtype; E <= 256. Memory beside the
results: 8 S B + S B E floats for S shares. FLOPs: 2 B N E a product; two for the statistics, three for the gradient
(one and two without a teacher). Bytes: the keys once a step and row tile, from L2 but for the first tile.
Precision: products of fp16 numbers, fp32 sums. Features are unit vectors, so fp16 has the range, and it has the
mantissa of TF32; what was bf16 before is exact. ds is scaled to use fp16's range. Logits are in base 2.
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
from .tiles import LN2, LOG2E, NEVER, aot_case, cdiv, next_power_of_2

MAX_E = 256
DS_SCALE = 2.0**14  # |ds| <= 1, most of it near 1 / N
SUMS = 8  # a row and share
MERGED = 5  # a row


@triton.jit
def _features(ptr, i, B, E: tl.constexpr, BE: tl.constexpr):
    """[BM, BE]: rows i of features [B, E], zeros outside."""
    e = tl.arange(0, BE)
    inside = (i < B)[:, None] & (e < E)[None, :]
    return tl.load(ptr + i.to(tl.int64)[:, None] * E + e[None, :], mask=inside, other=0.0)


@triton.jit
def _keys(ptr, j, stride, E: tl.constexpr, BE: tl.constexpr):
    """[BE, BN] fp16: columns j of keys [E, stride], zeros outside."""
    e = tl.arange(0, BE)
    inside = (j < stride)[None, :] & (e < E)[:, None]  # a stride of a multiple of 16 keeps loads vectors
    return tl.load(ptr + e.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0.0).to(tl.float16)


@triton.jit
def _logits(q, k, j, count, scale):
    """q k times scale; columns from `count` on count for nothing."""
    return tl.dot(q, k) * scale + tl.where(j < count, 0.0, NEVER)[None, :]


@triton.jit
def _positives(own_ptr, ids_ptr, key_ids_ptr, i, j, B, count):
    """[BM, BN]: is key j a positive of row i, being its own or bearing its id?"""
    positive = tl.zeros((i.shape[0], j.shape[0]), tl.int1)
    if own_ptr is not None:
        positive |= tl.load(own_ptr + i, mask=i < B, other=-1)[:, None] == j[None, :]
    if key_ids_ptr is not None:
        ids = tl.load(ids_ptr + i, mask=i < B, other=0)
        positive |= ids[:, None] == tl.load(key_ids_ptr + j, mask=j < count, other=0)[None, :]
    return positive & (j < count)[None, :]


@triton.jit
def _absorb(m, total, es, x, s):
    """Take logits x [BM, BN] into a running maximum m, the sum of 2^(x - m), and the sum es of 2^(x - m) s."""
    new = tl.maximum(m, tl.max(x, 1))
    old = tl.exp2(m - new)
    weight = tl.exp2(x - new[:, None])
    return new, total * old + tl.sum(weight, 1), es * old + tl.sum(weight * s, 1)


@triton.jit(do_not_specialize=["B", "N", "share", "shares", "tiles"])
def _statistics(
    q_ptr, p_ptr, key_ptr, temp_ptr, own_ptr, ids_ptr, key_ids_ptr, count_ptr, sum_ptr, sim_ptr,
    B, N, stride, share, shares, tiles,
    TEACHER: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Row tile program_id(0) against `tiles` tiles of the keys: share number share + program_id(1) of `shares`.

    key_ptr: N columns of [E, stride], of which the first *count_ptr count. sum_ptr: [8, shares, B]. sim_ptr: None, or
    [B, N] for s.
    """
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    scale = LOG2E / tl.load(temp_ptr)
    count = N
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), N).to(tl.int32)
    q = _features(q_ptr, i, B, E, BE)
    if TEACHER:
        p = _features(p_ptr, i, B, E, BE)

    m = tl.full((BM,), NEVER, tl.float32)
    zero = tl.zeros((BM,), tl.float32)
    total, es, ys, n, mu, total_u, eu = zero, zero, zero, zero, m, zero, zero
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(count, BN))):
        j = tile * BN + tl.arange(0, BN)
        k = _keys(key_ptr, j, stride, E, BE)
        s = _logits(q, k, j, count, scale)
        m, total, es = _absorb(m, total, es, s, s)
        if TEACHER:
            mu, total_u, eu = _absorb(mu, total_u, eu, _logits(p, k, j, count, scale), s)
        if (own_ptr is not None) or (key_ids_ptr is not None):
            positive = _positives(own_ptr, ids_ptr, key_ids_ptr, i, j, B, count)
            ys += tl.sum(tl.where(positive, s, 0.0), 1)
            n += tl.sum(positive.to(tl.float32), 1)
        if sim_ptr is not None:
            inside = (i < B)[:, None] & (j < N)[None, :]
            tl.store(sim_ptr + i.to(tl.int64)[:, None] * N + j[None, :], s * LN2, mask=inside)

    plane = shares.to(tl.int64) * B
    row = sum_ptr + (share + tl.program_id(1)).to(tl.int64) * B + i
    tl.store(row, m, mask=i < B)
    tl.store(row + plane, total, mask=i < B)
    tl.store(row + 2 * plane, es, mask=i < B)
    tl.store(row + 3 * plane, ys, mask=i < B)
    tl.store(row + 4 * plane, n, mask=i < B)
    if TEACHER:
        tl.store(row + 5 * plane, mu, mask=i < B)
        tl.store(row + 6 * plane, total_u, mask=i < B)
        tl.store(row + 7 * plane, eu, mask=i < B)


@triton.jit
def _softmax(sum_ptr, at, inside, plane):
    """lse and E[s], base 2, from the shares [BS, BM] of a softmax; its three sums lie `plane` apart."""
    m = tl.load(sum_ptr + at, mask=inside, other=NEVER)
    top = tl.max(m, 0)
    weight = tl.exp2(m - top[None, :])
    total = tl.sum(weight * tl.load(sum_ptr + plane + at, mask=inside, other=1.0), 0)
    es = tl.sum(weight * tl.load(sum_ptr + 2 * plane + at, mask=inside, other=0.0), 0)
    return top + tl.log2(total), es / total


@triton.jit(do_not_specialize=["B", "shares", "alpha"])
def _merge(
    sum_ptr, temp_ptr, row_ptr, B, shares, alpha,
    TEACHER: tl.constexpr, BS: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """row_ptr: [5, B]: loss, dtau, lse of the student, lse of the teacher less log2(alpha), (1 - alpha) / n."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    share = tl.arange(0, BS)
    inside = (share < shares)[:, None] & (i < B)[None, :]
    at = share.to(tl.int64)[:, None] * B + i[None, :]
    plane = shares.to(tl.int64) * B
    lse, expected = _softmax(sum_ptr, at, inside, plane)
    n = tl.sum(tl.load(sum_ptr + 4 * plane + at, mask=inside, other=0.0), 0)
    y = (1.0 - alpha) / tl.where(i < B, n, 1.0)
    target = y * tl.sum(tl.load(sum_ptr + 3 * plane + at, mask=inside, other=0.0), 0)
    if TEACHER:
        lse_u, expected_u = _softmax(sum_ptr + 5 * plane, at, inside, plane)
        target += alpha * expected_u
        tl.store(row_ptr + 3 * B + i, lse_u - tl.log2(alpha), mask=i < B)
    tl.store(row_ptr + i, (lse - target) * LN2, mask=i < B)
    tl.store(row_ptr + B + i, (target - expected) * LN2 / tl.load(temp_ptr), mask=i < B)
    tl.store(row_ptr + 2 * B + i, lse, mask=i < B)
    tl.store(row_ptr + 4 * B + i, y, mask=i < B)


@triton.jit(do_not_specialize=["B", "N", "share", "tiles"])
def _gradient(
    q_ptr, p_ptr, key_ptr, temp_ptr, own_ptr, ids_ptr, key_ids_ptr, count_ptr, row_ptr, dq_ptr,
    B, N, stride, share, tiles, ds_scale,
    TEACHER: tl.constexpr, E: tl.constexpr, BE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq_ptr: [shares, B, E] fp32, each share's ds k times ds_scale. row_ptr: what `_merge` wrote."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    e = tl.arange(0, BE)
    scale = LOG2E / tl.load(temp_ptr)
    count = N
    if count_ptr is not None:
        count = tl.minimum(tl.load(count_ptr), N).to(tl.int32)
    q = _features(q_ptr, i, B, E, BE)
    lse = tl.load(row_ptr + 2 * B + i, mask=i < B, other=0.0)
    y = tl.load(row_ptr + 4 * B + i, mask=i < B, other=0.0)
    if TEACHER:
        p = _features(p_ptr, i, B, E, BE)
        lse_u = tl.load(row_ptr + 3 * B + i, mask=i < B, other=0.0)

    dq = tl.zeros((BM, BE), tl.float32)
    first = tl.program_id(1) * tiles
    for tile in range(first, tl.minimum(first + tiles, tl.cdiv(count, BN))):
        j = tile * BN + tl.arange(0, BN)
        k = _keys(key_ptr, j, stride, E, BE)
        ds = tl.exp2(_logits(q, k, j, count, scale) - lse[:, None])
        if TEACHER:
            ds -= tl.exp2(_logits(p, k, j, count, scale) - lse_u[:, None])
        if (own_ptr is not None) or (key_ids_ptr is not None):
            positive = _positives(own_ptr, ids_ptr, key_ids_ptr, i, j, B, count)
            ds -= tl.where(positive, y[:, None], 0.0)
        dq = tl.dot((ds * ds_scale).to(tl.float16), tl.trans(k), dq)

    row = (share + tl.program_id(1)).to(tl.int64) * B + i
    inside = (i < B)[:, None] & (e < E)[None, :]
    tl.store(dq_ptr + row[:, None] * E + e[None, :], dq, mask=inside)


@triton.jit(do_not_specialize=["elements", "shares"])
def _add_scaled_shares(part_ptr, temp_ptr, out_ptr, elements, shares, factor, BLOCK: tl.constexpr):
    """out [elements] = factor / tau times the sum over shares of part [shares, elements]."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(shares):
        total += tl.load(part_ptr + at, mask=at < elements, other=0.0)
        part_ptr += elements
    tl.store(out_ptr + at, total * (factor / tl.load(temp_ptr)), mask=at < elements)


def contrastive(
    query: Tensor,
    teacher: Tensor | None,
    keys: Tensor,
    queue: Tensor,
    temp: Tensor,
    alpha: float,
    own: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    queue_ids: Tensor | None,
    queue_length: Tensor | None,
    gradient: bool,
    programs: int,
    configs: Mapping[str, Mapping[str, Any]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean loss [], s of the batch keys [B, N], and if `gradient` d loss / d query [B, E] and d loss / d temp [], fp32.

    query, teacher [B, E], B > 0; keys [N, E]; queue [E, Q], contiguous; teacher None: alpha is 0. programs: how many
    fill the GPU. configs: "statistics", "gradient" and "small" (statistics of the batch, or with ids).
    """
    (B, E), N, Q, device = query.shape, len(keys), queue.shape[1], query.device
    # The batch's keys, few, are laid out as the queue's; rows of a multiple of 16 keep loads vectors.
    columns = keys.new_zeros(E, cdiv(N, 16) * 16)
    columns[:, :N] = keys.t()
    q = query.to(torch.float16).contiguous()
    p = teacher.to(torch.float16).contiguous() if teacher is not None else q
    shared = {"TEACHER": teacher is not None, "E": E, "BE": max(16, next_power_of_2(E))}
    sim = torch.empty(B, N, device=device)
    past_ids = (None, None) if queue_ids is None else (query_ids, queue_ids)
    batch = columns, temp, own, query_ids, key_ids, None
    past = queue, temp, None, *past_ids, queue_length

    small, large = configs["small"], configs["statistics" if queue_ids is None else "small"]
    grid, tiles, first = _plan(B, N, small, programs)
    queue_grid, queue_tiles, rest = _plan(B, Q, large, programs)
    shares = first + rest
    sums = torch.empty(SUMS, shares, B, device=device)
    stride = columns.shape[1]
    _statistics[grid](q, p, *batch, sums, sim, B, N, stride, 0, shares, tiles, **shared, **small)
    _statistics[queue_grid](q, p, *past, sums, None, B, Q, Q, first, shares, queue_tiles, **shared, **large)

    rows = torch.empty(MERGED, B, device=device)
    BS = next_power_of_2(shares)
    BM = max(1, 2048 // BS)
    _merge[(cdiv(B, BM),)](sums, temp, rows, B, shares, alpha, TEACHER=shared["TEACHER"], BS=BS, BM=BM)

    dquery = torch.empty(B if gradient else 0, E, device=device)
    if gradient:
        shared |= configs["gradient"]
        grid, tiles, first = _plan(B, N, configs["gradient"], programs)
        queue_grid, queue_tiles, rest = _plan(B, Q, configs["gradient"], programs)
        parts = torch.empty(first + rest, B, E, device=device)
        _gradient[grid](q, p, *batch, rows, parts, B, N, stride, 0, tiles, DS_SCALE, **shared)
        _gradient[queue_grid](q, p, *past, rows, parts, B, Q, Q, first, queue_tiles, DS_SCALE, **shared)
        factor = 1.0 / (DS_SCALE * B)
        _add_scaled_shares[(cdiv(B * E, 1024),)](parts, temp, dquery, B * E, first + rest, factor, BLOCK=1024)
    return rows[0].mean(), sim, dquery, rows[1].mean()


def _plan(B: int, N: int, config: Mapping[str, Any], programs: int) -> tuple[tuple[int, int], int, int]:
    """(grid, tiles a share, shares) of N keys: about `programs` programs in all, shares of not too few tiles."""
    tiles, rows = cdiv(N, config["BN"]), cdiv(B, config["BM"])
    shares = max(1, min(programs // rows, tiles // 4))
    return (rows, shares), cdiv(tiles, shares), shares


def aot_cases(arch: int) -> list[AotCase]:
    """E = 256: all that reads the batch's keys and the queue, with ids and without, fp32 and half precision."""
    types = dict.fromkeys(("B", "N", "share", "shares", "tiles", "elements"), "i32") | {"stride": "i32:16"}
    types |= dict.fromkeys(("ds_scale", "alpha", "factor"), "fp32")
    types |= dict.fromkeys(
        ("temp_ptr", "sum_ptr", "sim_ptr", "row_ptr", "dq_ptr", "part_ptr", "out_ptr"), "*fp32"
    )
    types |= dict.fromkeys(("own_ptr", "ids_ptr", "key_ids_ptr", "count_ptr"), "*i64")
    types |= {"q_ptr": "*fp16", "p_ptr": "*fp16"}
    width = {"E": MAX_E, "BE": MAX_E}
    found = []

    def add(name, fn, bucket, keys, teacher, absent):
        absent = {f"{pointer}_ptr" for pointer in absent} & set(fn.arg_names)
        constexprs = width | {"TEACHER": teacher} | dict.fromkeys(absent)
        arguments = types | {"key_ptr": f"*{keys}"}
        signature = {argument: arguments[argument] for argument in fn.arg_names if argument in arguments}
        name = f"{name}, {keys} keys{'' if teacher else ', no teacher'}"
        found.append(aot_case(name, fn, signature, constexprs, dict(lookup("contrastive", arch, bucket))))

    kernels = {
        "statistics": (_statistics, "statistics", "small"),
        "gradient": (_gradient, "gradient", "gradient"),
    }
    for kernel, (fn, plain, small) in kernels.items():
        for keys, teacher in [("fp32", True), ("bf16", True), ("fp16", True), ("fp32", False)]:
            add(f"{kernel} queue", fn, plain, keys, teacher, ("own", "ids", "key_ids", "sim"))
            add(f"{kernel} queue, ids", fn, small, keys, teacher, ("own", "sim"))
        add(f"{kernel} batch", fn, small, "fp32", True, ("count",))
    signature = {argument: types[argument] for argument in _merge.arg_names if argument in types}
    found.append(AotCase("merge", _merge, signature, {"TEACHER": True, "BS": 256, "BM": 8}, 4, 3))
    signature = {argument: types[argument] for argument in _add_scaled_shares.arg_names if argument in types}
    return [*found, AotCase("add shares", _add_scaled_shares, signature, {"BLOCK": 1024}, 4, 3)]
