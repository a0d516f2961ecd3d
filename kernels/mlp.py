"""Linear layers with GELU (exact, by erf) in the epilogue, for the MLP  y = gelu(x W1^T + b1) W2^T + b2.

    forward    h = x W1^T + b1                 a = gelu(h) = h Phi(h)                Phi(h) = (1 + erf(h / sqrt 2)) / 2
    backward   dh = (dy W2) gelu'(h)           gelu'(h) = Phi(h) + h phi(h)          phi(h) = exp(-h^2 / 2) / sqrt(2 pi)
               a = gelu(h), again              db1 = sum of dh over the rows

Shapes: x and dy [M, D], W1 [F, D], b1 [F], W2 [D, F], h, a and dh [M, F]; one dtype, sums in fp32. h is rounded before
GELU is taken, as if it had been stored and read, so that backward finds the same a without anyone having kept it.
FLOPs: 2 M D F each. Bytes (2-byte elements): forward 2 M D + 4 M F, or 2 M F less when h is not wanted; backward
2 M D + 6 M F. What is saved against a separate GELU is one reading of h forward, and one writing and reading of dy W2
backward: at 600 TFLOP/s and 4.3 TB/s a third of the product's own time, forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .aot import AotCase
from .table import buckets, lookup
from .tiles import aot_case, cdiv, gelu_slope, halves, normal_cdf


@triton.jit
def _tile(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile. GROUP row blocks go through all columns together, so that both operands stay in L2."""
    columns = tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * columns)
    first = group * GROUP
    height = tl.minimum(tl.cdiv(M, BM) - first, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def _product(
    x_ptr, w_ptr, m, n0, M, N, K,
    W_IS_NK: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Rows m (of M that are left) and BN columns from n0 of x W^T (W_IS_NK: w is [N, K]) or of x W (w is [K, N])."""
    acc = tl.zeros((BM, BN), tl.float32)
    n = n0 + tl.arange(0, BN)
    for start in tl.range(0, K, BK):
        k = start + tl.arange(0, BK)
        inside_x, inside_w = (m < M)[:, None], (n < N)[None, :]
        if not EVEN_K:
            inside_x, inside_w = inside_x & (k < K)[None, :], inside_w & (k < K)[:, None]
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside_x, other=0.0)
        at = n[None, :] * K + k[:, None] if W_IS_NK else k[:, None] * N + n[None, :]
        w = tl.load(w_ptr + at, mask=inside_w, other=0.0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _gelu_store(
    acc, b_ptr, a_ptr, h_ptr, m, n0, M, N, KEEP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """h = acc + b and a = gelu(h) at rows m (of M that are left) and BN columns from n0 of a_ptr and h_ptr."""
    if BN > 64:
        left, right = halves(acc, BM, BN)
        _gelu_store(left, b_ptr, a_ptr, h_ptr, m, n0, M, N, KEEP, BM, BN // 2)
        _gelu_store(right, b_ptr, a_ptr, h_ptr, m, n0 + BN // 2, M, N, KEEP, BM, BN // 2)
    else:
        n = n0 + tl.arange(0, BN)
        inside, at = (m < M)[:, None] & (n < N)[None, :], m[:, None] * N + n[None, :]
        bias = tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        h = (acc + bias[None, :]).to(a_ptr.dtype.element_ty)
        if KEEP:
            tl.store(h_ptr + at, h, mask=inside)
        h = h.to(tl.float32)
        a = h * normal_cdf(h)
        tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dgelu_store(da, h_ptr, dh_ptr, a_ptr, db_ptr, m, n0, M, N, BM: tl.constexpr, BN: tl.constexpr):
    """dh, a and this tile's share of db1, as in `_gelu_store`."""
    if BN > 64:
        left, right = halves(da, BM, BN)
        _dgelu_store(left, h_ptr, dh_ptr, a_ptr, db_ptr, m, n0, M, N, BM, BN // 2)
        _dgelu_store(right, h_ptr, dh_ptr, a_ptr, db_ptr, m, n0 + BN // 2, M, N, BM, BN // 2)
    else:
        n = n0 + tl.arange(0, BN)
        inside, at = (m < M)[:, None] & (n < N)[None, :], m[:, None] * N + n[None, :]
        h = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
        cdf = normal_cdf(h)
        tl.store(a_ptr + at, (h * cdf).to(a_ptr.dtype.element_ty), mask=inside)
        dh = da * gelu_slope(h, cdf)
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(db_ptr + n, tl.sum(dh, 0), mask=n < N)  # da is zero in rows beyond M


@triton.jit(do_not_specialize=["M"])
def _linear_gelu(
    x_ptr, w_ptr, b_ptr, a_ptr, h_ptr, M, N, K,
    KEEP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row, column = _tile(M, N, BM, BN, GROUP)
    top = row.to(tl.int64) * BM  # M * N may pass 2^31; what is left within a tile may not
    m, n0, left = tl.arange(0, BM), column * BN, M - row * BM
    acc = _product(x_ptr + top * K, w_ptr, m, n0, left, N, K, True, EVEN_K, PRECISION, BM, BN, BK)
    _gelu_store(acc, b_ptr, a_ptr + top * N, h_ptr + top * N, m, n0, left, N, KEEP, BM, BN)


@triton.jit(do_not_specialize=["M"])
def _linear_dgelu(
    dy_ptr, w_ptr, h_ptr, dh_ptr, a_ptr, db_ptr, M, N, K,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """db_ptr: [row blocks, N] fp32, added up by the caller."""
    row, column = _tile(M, N, BM, BN, GROUP)
    top = row.to(tl.int64) * BM
    m, n0, left = tl.arange(0, BM), column * BN, M - row * BM
    da = _product(dy_ptr + top * K, w_ptr, m, n0, left, N, K, False, EVEN_K, PRECISION, BM, BN, BK)
    at = top * N
    _dgelu_store(da, h_ptr + at, dh_ptr + at, a_ptr + at, db_ptr + row * N, m, n0, left, N, BM, BN)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, keep: bool, precision: str, config: dict
) -> tuple[Tensor, Tensor]:
    """a [M, F], and h [M, F] if `keep`, else an empty tensor. x [M, D], weight [F, D], bias [F], contiguous, one dtype.

    config: BM, BN, BK, GROUP, num_warps, num_stages.
    """
    (M, K), N = x.shape, weight.shape[0]
    a = x.new_empty(M, N)
    h = x.new_empty(M if keep else 0, N)
    if M:
        _linear_gelu[_grid(M, N, config)](
            x, weight, bias, a, h, M, N, K, keep, K % config["BK"] == 0, precision, **config,
        )  # fmt: skip
    return a, h


def linear_dgelu(
    dy: Tensor, weight: Tensor, h: Tensor, precision: str, config: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [M, F], a [M, F], db1 [F] fp32. dy [M, D], weight [D, F], h [M, F], contiguous, one dtype, M > 0."""
    (M, K), N = dy.shape, weight.shape[1]
    dh, a = torch.empty_like(h), torch.empty_like(h)
    db = torch.empty(cdiv(M, config["BM"]), N, dtype=torch.float32, device=h.device)
    _linear_dgelu[_grid(M, N, config)](
        dy, weight, h, dh, a, db, M, N, K, K % config["BK"] == 0, precision, **config,
    )  # fmt: skip
    return dh, a, db.sum(0)


def _grid(M: int, N: int, config: dict) -> tuple[int]:
    return (cdiv(M, config["BM"]) * cdiv(N, config["BN"]),)


def aot_cases(arch: int) -> list[AotCase]:
    """Both kernels in every dtype, at widths that are multiples of BK, as BLIP's are."""
    sizes = {"M": "i32", "N": "i32:16", "K": "i32:16"}
    found = []
    for dtype in ("bf16", "fp16", "fp32"):
        cores = dtype != "fp32"
        forward, backward = (
            lookup("mlp", arch, *buckets(kind, not cores)) for kind in ("forward", "backward")
        )
        h = f"*{dtype}"
        shared = {"EVEN_K": True, "PRECISION": "ieee"}
        for keep in (True, False):
            found.append(
                aot_case(
                    f"linear_gelu {dtype}" + " keeps h" * keep, _linear_gelu,
                    {"x_ptr": h, "w_ptr": h, "b_ptr": h, "a_ptr": h, "h_ptr": h, **sizes},
                    {"KEEP": keep, **shared}, forward, cores,
                )
            )  # fmt: skip
        found.append(
            aot_case(
                f"linear_dgelu {dtype}", _linear_dgelu,
                {"dy_ptr": h, "w_ptr": h, "h_ptr": h, "dh_ptr": h, "a_ptr": h, "db_ptr": "*fp32", **sizes},
                shared, backward, cores,
            )
        )  # fmt: skip
    return found
